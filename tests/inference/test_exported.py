"""Artifacts: their answers, also in a process without flaxdet, and what is said of broken ones."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import numpy as np
import pytest
from PIL import Image

import flaxdet
from flaxdet.cli.main import main
from flaxdet.convert.state_dict import abstract_variables
from flaxdet.inference.export import PLATFORMS
from flaxdet.inference.exported import ExportError
from flaxdet.registry import make_model
from flaxdet.xla.routes import routes_for
from tests.detections import assert_same_in_any_order
from tests.drawn import drawn
from tests.tiny import FCOS_NAME, V2_NAME, tiny_model, tiny_variables
from tests.tolerances import NET_F32

README = Path(__file__).resolve().parents[2] / "README.md"
pytestmark = pytest.mark.xdist_group("exported")


def noise(*size):
    return np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """Of a tiny FCOS, one bucket."""
    folder = tmp_path_factory.mktemp("artifact")
    model = tiny_model(FCOS_NAME, score_thresh=0.05)
    variables = tiny_variables(model)
    flaxdet.export(folder, model, variables, buckets=[(64, 96)], raw_size=128, categories=list("abcd"))
    return folder, model, variables


@pytest.fixture
def copy(artifact, tmp_path):
    for path in artifact[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("name", "options", "buckets", "platforms"),
    [
        # every other test here is of an FCOS
        pytest.param(FCOS_NAME, {"score_thresh": 0.05}, [(64, 96), (96, 64)], ("cpu",), marks=pytest.mark.release),
        pytest.param(V2_NAME, {"box_score_thresh": 0.2}, [(96, 96)], PLATFORMS, marks=pytest.mark.ci),
    ],
)
def test_the_answers_of_predict(name, options, buckets, platforms, tmp_path):
    """From two buckets that images fill, and from one that is larger than each."""
    model = tiny_model(name, **options)
    variables = tiny_variables(model)
    flaxdet.export(tmp_path, model, variables, buckets=buckets, raw_size=128, platforms=platforms)
    images = [noise(64, 80), noise(100, 70)]
    expected = flaxdet.predict(model, variables, images)
    assert all(len(found["scores"]) > 3 for found in expected)
    for found, other in zip(flaxdet.load_exported(tmp_path)(images), expected, strict=True):
        assert_same_in_any_order(found, other, NET_F32)


def test_one_file_for_all_platforms_and_batches(artifact):
    folder, model, variables = artifact
    signature = json.loads((folder / "signature.json").read_text())
    (program,) = signature["programs"]
    exported = jax.export.deserialize(bytearray((folder / program["file"]).read_bytes()))
    assert set(exported.platforms) == {"cpu", "cuda", "tpu"}
    assert (program["batch"], signature["categories"]) == (None, list("abcd"))
    weights = flaxdet.load_exported(folder).weights
    images = [noise(64, 80), noise(40, 60), noise(64, 80)[::-1]]
    padded, sizes = np.zeros((3, 128, 128, 3), np.uint8), np.array([image.shape[:2] for image in images], np.int32)
    for place, image in zip(padded, images, strict=True):
        place[: image.shape[0], : image.shape[1]] = image
    new_sizes = np.array([[64, 80], [64, 96], [64, 80]], np.int32)
    found = jax.device_get(exported.call(weights, padded, sizes, new_sizes))
    for i, expected in enumerate(flaxdet.predict(model, variables, images)):
        valid = found["valid"][i]
        assert_same_in_any_order(
            {name: found[name][i][valid] for name in ("boxes", "scores", "labels")}, expected, NET_F32
        )


@pytest.mark.ci  # test_transform.py has canvases of any size, and the tests above run programs
def test_one_canvas_of_any_size(tmp_path):
    """With ``fixed_size`` no canvas is smaller than its bucket, which need be no multiple of 32."""
    model = tiny_model(FCOS_NAME, score_thresh=0.05, fixed_size=(50, 70), size_divisible=1)
    variables, images = tiny_variables(model), [noise(64, 80), noise(30, 120)]
    flaxdet.export(tmp_path, model, variables, raw_size=128, platforms="cpu", batch_sizes=(1,))
    expected = flaxdet.predict(model, variables, images)
    assert all(len(found["scores"]) > 3 for found in expected)
    for detect in (flaxdet.load_exported(tmp_path), flaxdet.Predictor(model, variables, raw_sizes=(128,))):
        for found, other in zip(detect(images), expected, strict=True):
            assert_same_in_any_order(found, other, NET_F32)
    with pytest.raises(ValueError, match="size_divisible=1 gives canvases that don't fit into buckets"):
        flaxdet.export(tmp_path, model, variables, buckets=[(96, 64)])


@pytest.mark.ci  # the other tests read and run programs of one batch size
def test_a_program_for_each_batch_size(tmp_path):
    model = tiny_model(FCOS_NAME, score_thresh=0.05)
    variables = tiny_variables(model)
    options = {"buckets": [(64, 96)], "batch_sizes": (1, 2), "raw_size": 128, "platforms": ("cpu",), "fold": False}
    signature = flaxdet.export(tmp_path, model, variables, **options)
    assert [program["batch"] for program in signature["programs"]] == [1, 2]
    assert len({program["file"] for program in signature["programs"]}) == 2
    detector, calls = flaxdet.load_exported(tmp_path), []

    def counted(number):
        return lambda weights, images, *sizes: (
            calls.append((number, len(images))),
            detector._run(number)(weights, images, *sizes),
        )[1]

    images = [noise(64, 80), noise(40, 60), noise(64, 80)[::-1]]
    found = dataclasses.replace(detector, _run=counted)(images)
    assert calls == [(1, 2), (0, 1)]  # two images by the program for two, the third by the other
    for own, other in zip(found, flaxdet.predict(model, variables, images), strict=True):
        assert_same_in_any_order(own, other, NET_F32)
    with routes_for("gpu"):
        assert len(detector([])) == 0
        dataclasses.replace(detector, _run=counted)(images[:1])
    assert calls[2:] == [(0, 1)]


def test_the_readmes_code_without_flaxdet(artifact, tmp_path):
    """As printed, in a process that cannot import flaxdet."""
    folder, model, variables = artifact
    (tmp_path / "exported").symlink_to(folder)
    image = noise(64, 80)
    Image.fromarray(image).save(tmp_path / "photo.jpg", quality=100)
    code = re.search(r"<!-- exported -->\n```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
    blocked = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "flaxdet":
            raise ImportError("no flaxdet here")
sys.meta_path.insert(0, Blocked())
"""
    told = "\nprint(json.dumps({'boxes': boxes.tolist(), 'scores': scores.tolist(), 'labels': labels.tolist()}))"
    done = subprocess.run(
        [sys.executable, "-c", blocked + code + told], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = {name: np.array(values) for name, values in json.loads(done.stdout).items()}
    decoded = np.asarray(Image.open(tmp_path / "photo.jpg").convert("RGB"))
    assert_same_in_any_order(found, flaxdet.predict(model, variables, [decoded])[0], NET_F32)


def test_the_command(tmp_path, capsys):
    """Of a builder's model, lowered and not compiled."""
    path = tmp_path / "model.safetensors"
    model = make_model("tiny_fcos", num_classes=3, min_size=64, max_size=96)
    variables = drawn(abstract_variables(model))
    flaxdet.save(path, model, variables, categories=["__background__", "cat", "dog"])
    out = tmp_path / "out"
    arguments = ["export", out, "--weights", path, "--buckets", "64x96", "--batch-sizes", 2, "--no-progress"]
    assert main([str(argument) for argument in arguments]) == 0
    assert "1 programs for cpu, cuda, tpu" in capsys.readouterr().out
    signature = json.loads((out / "signature.json").read_text())
    assert signature["categories"] == ["__background__", "cat", "dog"]
    assert signature["programs"][0]["batch"] == 2
    exported = jax.export.deserialize(bytearray((out / signature["programs"][0]["file"]).read_bytes()))
    assert exported.out_avals[0].shape == (2, 100, 4)
    assert main(["export", str(out), "--weights", str(path), "--buckets", "64by96"]) == 2
    assert "--buckets should be ROWSxCOLUMNS such as 800x1088, got '64by96'" in capsys.readouterr().err


# Bad input


def test_no_artifact(tmp_path):
    with pytest.raises(ExportError, match=f"{tmp_path}: expected a folder with signature.json"):
        flaxdet.load_exported(tmp_path)
    (tmp_path / "signature.json").write_text("[]")
    with pytest.raises(ExportError, match=r"signature.json: expected the JSON that `flaxdet export` writes"):
        flaxdet.load_exported(tmp_path)


def test_another_version(copy):
    signature = json.loads((copy / "signature.json").read_text())
    (copy / "signature.json").write_text(json.dumps({**signature, "format": 99}))
    with pytest.raises(ExportError, match="has format 99, this flaxdet runs format 1"):
        flaxdet.load_exported(copy)


@pytest.mark.parametrize("file", ["weights.safetensors", "detect-64x96.stablehlo"])
def test_a_part_is_missing_or_another(copy, file):
    content = (copy / file).read_bytes()
    (copy / file).write_bytes(content[:-1] + b"x")
    with pytest.raises(ExportError, match=rf"{file}: is not the file that signature.json was written with"):
        flaxdet.load_exported(copy)
    (copy / file).unlink()
    with pytest.raises(ExportError, match=rf"{file}: No such file .* needs it beside signature.json"):
        flaxdet.load_exported(copy)


def changed(copy, **changes):
    signature = json.loads((copy / "signature.json").read_text())
    (copy / "signature.json").write_text(json.dumps({**signature, **changes}))
    return signature


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"weights": {"file": "../weights.safetensors", "sha256": "0" * 64}},
            r"weights\.file should be the name of a file",
        ),
        ({"weights": {"file": "/dev/zero", "sha256": "0" * 64}}, r"weights\.file should be the name of a file"),
        ({"weights": {"file": "NUL", "sha256": "0" * 64}}, r"weights\.file should be the name of a file"),
        ({"weights": {"file": "weights.safetensors"}}, r"weights\.sha256 is missing"),
        ({"programs": []}, "programs should be a list of 1 to"),
        ({"programs": {}}, "programs should be a list of 1 to"),
        ({"platforms": "cpu"}, "platforms should be a list"),
        ({"platforms": ["gpu"]}, r"platforms\[0\] should be one of cpu, cuda, rocm, tpu, got 'gpu'"),
        ({"raw_size": 1e9}, "raw_size should be an integer"),
        ({"raw_size": 0}, "raw_size should be an integer"),
        ({"resize": {}}, r"resize\.min_size is missing"),
        ({"categories": [1]}, r"categories\[0\] should be a text"),
        ({"date": "yesterday"}, "date should be a date"),
        (
            {"compiler_options": {"cpu": {"xla_dump_to": "dump"}}},
            r".*cpu\.xla_dump_to is no option that flaxdet sets",
        ),
    ],
)
def test_a_signature_that_is_none(copy, changes, expected):
    changed(copy, **changes)
    with pytest.raises(ExportError, match=rf"signature\.json: expected the JSON that .*\({expected}") as info:
        flaxdet.load_exported(copy)
    assert str(info.value).isprintable()


def test_a_signature_of_other_sizes(copy):
    changed(copy, raw_size=256)
    with pytest.raises(
        ExportError, match=r"it takes uint8\[batch, 128, 128, 3\], expected uint8\[batch, 256, 256, 3\]"
    ):
        flaxdet.load_exported(copy)


def test_files_that_are_none(copy):
    file = copy / "weights.safetensors"
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ExportError, match=r"weights\.safetensors: is not the file .* it is a Git LFS pointer"):
        flaxdet.load_exported(copy)
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), os.mkdir):
        file.unlink()
        make(file)
        with pytest.raises(ExportError, match=r"weights\.safetensors: (Not a regular file|Is a directory)"):
            flaxdet.load_exported(copy)
        if make is os.mkdir:
            file.rmdir()


def test_programs_that_jax_no_longer_reads(copy, monkeypatch):
    """The message says when and by what the artifact was exported, and both ways out."""
    signature = changed(copy, date="2025-03-01", jax="0.5.1", calling_convention_version=8)
    monkeypatch.setattr(jax.export, "minimum_supported_calling_convention_version", 9)
    ways = r"exported on 2025-03-01 by jax 0\.5\.1, .* 180 days: export it again .*flaxdet export.*'jax==0\.5\.1'"
    with pytest.raises(ExportError, match=rf"its calling convention is 8, and this jax knows 9 to \d+\)\. .*{ways}"):
        flaxdet.load_exported(copy)
    changed(copy, calling_convention_version=signature["calling_convention_version"])
    name = signature["programs"][0]["file"]
    content = (copy / name).read_bytes()[:-500]
    (copy / name).write_bytes(content)
    program = {**signature["programs"][0], "sha256": hashlib.sha256(content).hexdigest()}
    changed(copy, programs=[program])
    with pytest.raises(ExportError, match=rf"{name}: jax .* can't run the program .*{ways}"):
        flaxdet.load_exported(copy)


@pytest.mark.parametrize(
    ("age", "version", "told"), [(181, "0.5.1", True), (180, "0.5.1", False), (900, jax.__version__, False)]
)
def test_the_window_has_passed(copy, monkeypatch, age, version, told):
    signature = json.loads((copy / "signature.json").read_text())
    today = datetime.datetime.now(datetime.UTC).date()
    assert today - datetime.date.fromisoformat(signature["date"]) <= datetime.timedelta(days=1)
    assert signature["jax"] == jax.__version__
    changed(copy, jax=version, date=(today - datetime.timedelta(days=age)).isoformat())
    with (
        pytest.warns(UserWarning, match=rf"{age} days later.*pip install 'jax==") if told else contextlib.nullcontext()
    ):
        flaxdet.load_exported(copy)


def test_another_platform(copy):
    signature = json.loads((copy / "signature.json").read_text())
    (copy / "signature.json").write_text(json.dumps({**signature, "platforms": ["tpu"]}))
    with pytest.raises(ExportError, match="was exported for tpu, this process runs on cpu"):
        flaxdet.load_exported(copy)


@pytest.mark.parametrize(("exported", "fits"), [("rocm", True), ("cuda", False)])
def test_a_rocm_device(copy, monkeypatch, exported, fits):
    """jax calls an AMD GPU "gpu" as a backend and "rocm" as a platform of exported functions."""
    signature = json.loads((copy / "signature.json").read_text())
    (copy / "signature.json").write_text(json.dumps({**signature, "platforms": [exported]}))
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        patch.setattr(jax.export, "default_export_platform", lambda: "rocm")
        if fits:
            assert flaxdet.load_exported(copy).signature["platforms"] == ["rocm"]
        else:
            with pytest.raises(ExportError, match="was exported for cuda, this process runs on rocm"):
                flaxdet.load_exported(copy)


def test_bad_images(artifact):
    detector = flaxdet.load_exported(artifact[0])
    with pytest.raises(TypeError, match="image 0: expected uint8, got float32"):
        detector([np.zeros((8, 9, 3), np.float32)])
    with pytest.raises(ValueError, match="image 0: expected at most 128 pixels a side, got 129x20"):
        detector([noise(129, 20)])
    with pytest.raises(ValueError, match=r"image 0: its canvas of 96x64 .* fits none of the buckets 64x96"):
        detector([noise(90, 60)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buckets": [(64, 97)]}, r"bucket 64x97 \(rows x columns\) should have multiples of 32"),
        ({"raw_size": 0}, "should be at least 1, got 0"),
        ({"batch_sizes": (0,)}, "should be at least 1"),
        ({"platforms": ["cpu", "gpu"]}, r"should be some of .*, got \('cpu', 'gpu'\)"),
        ({"platforms": []}, r"should be some of .*, got \(\)"),
        ({"categories": ["cat"]}, "expected 4 names, got 1"),
        ({"categories": "abcd"}, "should be a list with the name of every label, got one 'abcd'"),
    ],
)
def test_bad_options(artifact, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        flaxdet.export(tmp_path / "none", *artifact[1:], **options)
    assert not (tmp_path / "none").exists()


def test_nothing_is_written_before_a_program_is_there(artifact, tmp_path, monkeypatch):
    def no_export(*args, **options):
        raise ModuleNotFoundError("No module named 'flatbuffers'")

    monkeypatch.setattr(jax.export, "export", no_export)
    with pytest.raises(ModuleNotFoundError):
        flaxdet.export(tmp_path / "none", *artifact[1:])
    assert not (tmp_path / "none").exists()
