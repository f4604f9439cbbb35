"""What an earlier flaxdet wrote still loads, value for value. ``make.py`` tells how it was written."""

from __future__ import annotations

import contextlib
import json
import lzma
import shutil
import tarfile
from datetime import date, timedelta
from pathlib import Path

import jax
import jax.export
import numpy as np
import pytest

import flaxdet
from flaxdet.convert.state_dict import abstract_variables
from flaxdet.registry import make_model
from flaxdet.train import Checkpoints, create_state, sgd
from tests.detections import assert_same_in_any_order
from tests.saved.make import GEOMETRY, MODELS, NAMES, STEP, content, pytrees
from tests.tiny import FCOS_NAME, tiny_model, tiny_variables
from tests.tolerances import NET_F32

HERE = Path(__file__).parent
VERSIONS = sorted(path.name for path in HERE.iterdir() if path.is_dir() and not path.name.startswith("_"))
# jax runs what it exported within the last six months (docs.jax.dev/en/latest/export/export.html, "Compatibility
# guarantees"): after that an artifact may be too old, which is jax's to say.
WINDOW = timedelta(days=180)


def unpack(archive: Path, target: Path) -> Path:
    """A .tar.xz; returns the folder in it."""
    with lzma.open(archive) as compressed, tarfile.open(fileobj=compressed) as file:
        file.extractall(target, filter="data")
    return target / archive.name.removesuffix(".tar.xz")


def assert_same(found, expected) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path), strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "form", ["safetensors", *(pytest.param(form, marks=pytest.mark.ci) for form in ("hub", "pth"))]
)
def test_models(version, kind, form, tmp_path):
    builder, options = MODELS[kind]
    name = "model.pth" if form == "pth" else "model.safetensors"
    with lzma.open(HERE / version / kind / f"{name}.xz") as compressed, (tmp_path / name).open("wb") as file:
        shutil.copyfileobj(compressed, file)
    if form == "hub":
        shutil.copy(HERE / version / kind / "config.json", tmp_path)
        model, variables = flaxdet.load_pretrained(tmp_path)
    elif form == "pth":  # holds no options of the builder: those come from the caller, but the norms from the keys
        given = {name: value for name, value in options.items() if name != "frozen_bn"}
        model, variables = flaxdet.load(tmp_path / name, **GEOMETRY, **given)
    else:
        model, variables = flaxdet.load(tmp_path / name)
        assert flaxdet.load_categories(tmp_path / name) == NAMES
    expected = make_model(builder, num_classes=len(NAMES), **GEOMETRY, **options)
    assert model == expected
    assert_same(variables, content(abstract_variables(expected)))


@pytest.mark.parametrize("version", VERSIONS)
def test_training_checkpoint(version, tmp_path):
    folder = unpack(HERE / version / "checkpoints.tar.xz", tmp_path)
    model = tiny_model(FCOS_NAME, score_thresh=0.05, head=None)  # FCOS's own head
    variables = content(jax.tree.map(np.asarray, tiny_variables(model)))
    fresh = create_state(
        model, jax.tree.map(np.zeros_like, variables), sgd(0.1, momentum=0.9), key=jax.random.key(0), ema=True
    )
    with Checkpoints(folder, config={"epochs": 3}) as checkpoints:
        assert (checkpoints.last, checkpoints.best) == (STEP, STEP)
        state, place, info = checkpoints.restore(fresh)
    assert int(state.step) == STEP
    assert place == {"epoch": 1, "next": 2}
    assert info == {"step": STEP, "metrics": {"AP": 0.25}}
    for found in (state.variables, state.ema):
        assert_same(jax.device_get(found), variables)
    np.testing.assert_array_equal(state.key, jax.random.key_data(jax.random.key(3)))


@contextlib.contextmanager
def within_jaxs_window(written):
    """Skips the test where jax refuses what is too old for it."""
    try:
        yield
    except ValueError as error:
        if date.fromisoformat(written["written"]) + WINDOW > date.today():
            raise
        pytest.skip(f"jax {written['jax']} exported it on {written['written']}, {jax.__version__} refuses it: {error}")


@pytest.mark.parametrize("version", VERSIONS)
def test_exported_pytrees(version):
    """As arguments and results of a function that a user exported; fields that classes have lost are ignored."""
    written = json.loads((HERE / version / "exported.json").read_text())
    with within_jaxs_window(written):
        exported = jax.export.deserialize(bytearray((HERE / version / "pytrees.stablehlo").read_bytes()))
    arguments = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    assert jax.tree.structure(arguments) == jax.tree.structure(((pytrees(),), {}))
    results = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    assert jax.tree.structure(results) == jax.tree.structure(pytrees())
    detections = next(tree for tree in results if isinstance(tree, flaxdet.Detections))
    assert (detections.boxes.shape, detections.valid.shape, detections.valid.dtype) == ((1, 2, 4), (1, 2), bool)


@pytest.mark.parametrize("version", VERSIONS)
def test_exported_artifact(version, tmp_path):
    written = json.loads((HERE / version / "exported.json").read_text())
    folder = unpack(HERE / version / "exported.tar.xz", tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    with within_jaxs_window(written):
        (found,) = flaxdet.load_exported(folder)([image])
    assert len(written["scores"]) > 10
    written = {name: np.asarray(written[name]) for name in ("boxes", "scores", "labels")}
    assert_same_in_any_order(found, written, NET_F32)
