"""Which state_dict of a file is read: of Lightning, FSDP, averages and teachers; and files that are none."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from flaxdet.convert import CheckpointError, read
from flaxdet.files import checkpoint
from flaxdet.files.torch_objects import placeholder_type

A, B = np.ones(2), np.zeros(())
PLAIN = {"a.weight": A, "b": B}


def prefixed(prefix: str) -> dict[str, np.ndarray]:
    return {prefix + key: value for key, value in PLAIN.items()}


@pytest.mark.parametrize(
    "prefix",
    [
        "model.",
        "detector.",
        "net.",
        "module.",
        "_orig_mod.",
        "_fsdp_wrapped_module.",
        "_checkpoint_wrapped_module.",
        "model.detector.",
        "model._orig_mod.",
        "_orig_mod.model.",
        "model.module._orig_mod.",
        "_fsdp_wrapped_module.model.net.module.",
        "net.net.",
    ],
)
@pytest.mark.parametrize("wrap", ["", "state_dict", "model", "network"])
def test_prefixes(prefix, wrap):
    outer = {wrap: prefixed(prefix), "epoch": 3, "hyper_parameters": {"lr": 0.1}} if wrap else prefixed(prefix)
    assert checkpoint.unwrap(outer) == PLAIN


def test_wrappers_inside():
    """FSDP and torch.compile wrap parts too; a prefix of some keys alone is a name."""
    state = {"backbone._fsdp_wrapped_module.body._orig_mod.conv.weight": A, "head._checkpoint_wrapped_module.b": B}
    assert checkpoint.unwrap(state) == {"backbone.body.conv.weight": A, "head.b": B}
    mixed = {"model.a": A, "loss.b": B}
    assert checkpoint.unwrap(mixed) == mixed
    twice = {"_orig_mod.a": A, "a": B}  # both are kept, for a report of the doubled key
    assert checkpoint.unwrap(twice) == twice


def test_choice_by_key():
    root = {
        "state_dict": {
            **{f"student.{k}": v for k, v in PLAIN.items()},
            "teacher.model.a.weight": B,
            "teacher.model.b": A,
        },
        "model_ema": {"n_averaged": np.array(5), "module.a.weight": B, "module.b": A},
        "callbacks": {"EMA.v2": {"weights": {"model.a.weight": B, "model.b": A}}},
        "ema": placeholder_type("timm.ModelEma")(),
    }
    other = {"a.weight": B, "b": A}
    assert checkpoint.unwrap(root, key="student") == PLAIN
    for key in ("teacher", "teacher.model", "model_ema", "callbacks.EMA.v2.weights", "callbacks.EMA.v2"):
        assert checkpoint.unwrap(root, key=key) == other, key
    assert checkpoint.unwrap(root, ema=True) == other
    assert len(checkpoint.unwrap(root)) == 4
    for key in ("model", "teach", "", "callbacks", "ema", "callbacks.EMA"):
        with pytest.raises(ValueError, match=r"holds no state_dict under|without tensors"):
            checkpoint.unwrap(root, key=key)
    with pytest.raises(ValueError, match=r'under "x"; it holds "state_dict", "model_ema", "student", "teacher"'):
        checkpoint.unwrap(root, key="x")


def test_several_without_a_name_to_prefer():
    with pytest.raises(ValueError, match=r'several state_dicts: choose one of "student", "teacher" by key='):
        checkpoint.unwrap({"student": PLAIN, "teacher": PLAIN, "epoch": 1})
    assert checkpoint.unwrap({"network": PLAIN, "optimizer": {"state": {}, "param_groups": []}}) == PLAIN
    assert checkpoint.unwrap({"state_dict": {"model": prefixed("module.")}}) == PLAIN


def test_averaged_model(tmp_path):
    """torch's own: a counter beside the module."""
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(2, 3)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for content in (averaged.state_dict(), {"model": averaged.state_dict()}, {"state_dict": averaged.state_dict()}):
        torch.save(content, tmp_path / "a")
        assert list(read(tmp_path / "a")) == ["weight", "bias"]
    assert list(checkpoint.unwrap({"n_averaged": A, "a.weight": A})) == [
        "n_averaged",
        "a.weight",
    ]  # a name like any other


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_modules(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(2, 3))
    for content, where in ((model, "Sequential, not"), ({"model": model, "epoch": 1}, 'Sequential under "model", not')):
        torch.save(content, tmp_path / "a", _use_new_zipfile_serialization=zipped)
        if zipped or content is model:
            with pytest.raises(
                CheckpointError, match=rf"holds a pickled module, .*{where} a state_dict: load it by torch"
            ):
                read(tmp_path / "a")
    if zipped:
        with pytest.raises(CheckpointError, match="holds a pickled module"):
            read(tmp_path / "a", key="model")


def test_torchscript(tmp_path):
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="is a TorchScript program, not a state_dict"):
        read(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
            "is a Git LFS pointer.*git lfs pull",
        ),
        (b"<!DOCTYPE html>\n<html><head>", "is a web page"),
        (b"\xef\xbb\xbf\n  <HTML>", "is a web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "is a web page"),
        (b"\x1f\x8b\x08\x00" + bytes(20), "is compressed by gzip"),
        (b"\x89HDF\r\n\x1a\n" + bytes(20), "is an HDF5 file"),
    ],
)
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "a.ckpt"])
def test_what_stands_in_place_of_a_file(tmp_path, content, expected, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}: is not a checkpoint: it {expected}") as info:
        read(tmp_path / name)
    assert str(info.value).isprintable()
