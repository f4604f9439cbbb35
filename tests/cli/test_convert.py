"""``flaxdet convert``: both formats, bit for bit, and what can go wrong."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

import flaxdet
from flaxdet import registry
from flaxdet.cli import options
from flaxdet.convert import read, write_pth
from flaxdet.files import models
from tests.cli.conftest import NAMES, files

pytestmark = pytest.mark.xdist_group("convert")


@pytest.fixture(scope="session")
def weights(real_weights):
    return real_weights


@pytest.fixture(scope="module")
def pth(weights, tmp_path_factory):
    """The shared model as a .pth."""
    from flaxdet.cli.main import main

    path = tmp_path_factory.mktemp("pth") / "cells.pth"
    assert main(["convert", str(weights), str(path)]) == 0
    return path


def assert_same_bits(found: dict, expected: dict):
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert (found[key].dtype, found[key].shape) == (value.dtype, value.shape), key
        assert found[key].tobytes() == value.tobytes(), key


def test_there_and_back_bit_for_bit(run, weights, pth, reads, tmp_path):
    middle, back = tmp_path / "middle.safetensors", tmp_path / "back.pth"
    names = tmp_path / "names.txt"
    names.write_text("\n".join(NAMES))
    found = run("convert", pth, middle, "--categories", names, "--min-size", "200", "--max-size", "300")
    assert (found.status, found.err) == (0, "")
    assert found.out == f"FCOS, 4 classes, 32,122,185 parameters -> {middle}\n"
    assert run("convert", middle, back).status == 0
    assert reads == [str(pth), str(middle)]  # each once
    first = read(pth)
    assert len(first) == 372
    assert_same_bits(read(back), first)
    # .safetensors sorts its tensors, and nothing else
    for path in (weights, middle):
        assert_same_bits(dict(sorted(read(path).items())), dict(sorted(first.items())))
    assert flaxdet.load_categories(middle) == NAMES
    assert flaxdet.load_categories(back) is None
    assert files(tmp_path) == ["back.pth", "middle.safetensors", "names.txt"]

    model, variables = flaxdet.load(middle)
    assert (model.min_size, model.max_size, model.num_classes) == (200, 300, 4)
    kernel = variables["params"]["backbone"]["body"]["conv1"]["kernel"]
    np.testing.assert_array_equal(np.transpose(kernel, (3, 2, 0, 1)), first["backbone.body.conv1.weight"])


def test_a_detector_inside_another_module(run, pth, tmp_path):
    """As Lightning writes it, with the tensors of a metric beside; the name of another state_dict is refused."""
    source, target = tmp_path / "last.ckpt", tmp_path / "plain.pth"
    expected = read(pth)
    write_pth(source, {"val_map.total": np.ones(3)} | {f"model.{key}": value for key, value in expected.items()})
    found = run("convert", source, target, "--key", "ema")
    assert f'{source}: holds no state_dict under "ema"; it holds "model", "val_map"' in found.error
    found = run("convert", source, target)
    assert found.status == 0
    assert found.err == f"{source}: reads the tensors under model., leaves out val_map.total\n"
    assert_same_bits(read(target), expected)
    target.unlink()
    found = run("convert", source, target, "--key", "model")
    assert (found.status, found.err) == (0, "")
    assert_same_bits(read(target), expected)


def test_torchvision_takes_the_pth(pth):
    torch = pytest.importorskip("torch")
    from flaxdet.convert import reference

    model = reference.build("fcos_resnet50_fpn", num_classes=4)
    state = torch.load(pth, weights_only=True)
    assert str(model.load_state_dict(state, strict=True)) == "<All keys matched successfully>"


def test_batch_norm_overruled(run, pth, tmp_path):
    frozen, live = tmp_path / "frozen.safetensors", tmp_path / "live.pth"
    assert run("convert", pth, frozen, "--frozen-bn").status == 0
    state = read(frozen)
    assert len(state) == 319
    assert not any(key.endswith("num_batches_tracked") for key in state)
    assert flaxdet.load(frozen)[0].backbone.body.frozen_bn is True
    assert run("convert", frozen, live, "--no-frozen-bn").status == 0
    assert_same_bits(read(live), read(pth))


@pytest.mark.parametrize("target", ["model.onnx", "model", "model.pt"])
def test_unknown_format(run, weights, tmp_path, target):
    found = run("convert", weights, tmp_path / target)
    assert (found.status, files(tmp_path)) == (2, [])
    assert f"{target}: expected a name ending in .safetensors or .pth" in found.error


def test_missing_source(run, tmp_path):
    found = run("convert", tmp_path / "none.pth", tmp_path / "x.pth")
    assert (found.status, files(tmp_path)) == (2, [])
    assert "none.pth: cannot be read: No such file or directory; expected a state_dict" in found.error


def test_source_of_another_kind(run, weights, tmp_path):
    text = tmp_path / "notes.pth"
    text.write_text("not weights")
    assert "notes.pth: is not a checkpoint; expected a state_dict" in run("convert", text, tmp_path / "x.pth").error
    found = run("convert", weights, tmp_path / "x.pth", "--model", "fasterrcnn_resnet50_fpn_v2")
    assert "expected weights of fasterrcnn_resnet50_fpn_v2, found fcos_resnet50_fpn" in found.error
    assert files(tmp_path) == ["notes.pth"]


def test_wrong_number_of_categories(run, weights, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("one\ntwo")
    found = run("convert", weights, tmp_path / "x.safetensors", "--categories", names)
    assert (found.status, files(tmp_path)) == (2, ["names.txt"])
    assert "names.txt: expected 4 names, one for each label" in found.error


def test_target_folder_is_missing(run, weights, tmp_path):
    found = run("convert", weights, tmp_path / "deep" / "x.pth")
    assert (found.status, files(tmp_path)) == (2, [])
    assert f"there is no folder {tmp_path / 'deep'} to write it to" in found.error


def test_target_is_a_folder(run, weights, tmp_path):
    (tmp_path / "x.pth").mkdir()
    found = run("convert", weights, tmp_path / "x.pth")
    assert (found.status, files(tmp_path)) == (2, ["x.pth"])
    assert "x.pth: cannot be written: Is a directory" in found.error


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_disk_full(run, weights, tmp_path, monkeypatch, suffix):
    target = tmp_path / f"x.{suffix}"
    target.write_text("of an earlier run")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    found = run("convert", weights, target)
    assert (found.status, files(tmp_path)) == (2, [target.name])
    assert f"{target}: cannot be written: No space left on device; nothing was changed" in found.error
    assert target.read_text() == "of an earlier run"


def test_published_weights_with_batch_norm_overruled(monkeypatch, tmp_path):
    """The builders decide on the kind of BatchNorm themselves; overruled, the file is loaded as any other."""
    file = tmp_path / "published.pth"
    enum = flaxdet.FCOS_ResNet50_FPN_Weights
    given = []
    monkeypatch.setattr(enum, "get_path", lambda self, progress: file)
    monkeypatch.setattr(models, "read_model", lambda path: path)
    monkeypatch.setattr(models, "make", lambda path, **kept: given.append((path, kept)) or ("model", "variables"))
    found = options.load_model(None, "COCO_V1", frozen_bn=False, min_size=None)
    assert found == ("model", "variables", enum.COCO_V1.meta["categories"])
    assert given == [(file, {"frozen_bn": False})]


def test_published_weights_go_to_the_builder(monkeypatch):
    given = {}

    def builder(**kept):
        given.update(kept)
        return "model", "variables"

    for name in registry.names():
        option = registry.get(name).kind.score_field
        monkeypatch.setattr(flaxdet, name, builder)
        _, _, names = options.load_model(name, "DEFAULT", threshold=0.3, max_size=None, progress=False)
        assert len(names) == 91
        assert given.pop("weights").meta["categories"] == names
        assert given == {"progress": False, option: 0.3}
        given.clear()
    v2 = flaxdet.FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1
    options.load_model(None, str(v2))  # the enum's name says which model
    assert given["weights"] is v2


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("COCO_V1", False),
        ("DEFAULT", False),
        ("FCOS_ResNet50_FPN_Weights.COCO_V1", False),
        ("model.pth", True),
        ("weights.v2.ckpt", True),
        (os.path.join("runs", "last"), True),
    ],
)
def test_names_and_files(weights, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert options.is_file_name(weights) is expected
    (tmp_path / "last").write_text("x")
    assert options.is_file_name("last")
