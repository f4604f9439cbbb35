"""Models in files, in both formats: everything comes back, and what is damaged or newer is refused."""

from __future__ import annotations

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxdet
from flaxdet import registry
from flaxdet.convert import CheckpointError, StateDictError, reference, to_torchvision
from flaxdet.convert.state_dict import abstract_variables
from flaxdet.files import checkpoint
from tests.drawn import drawn
from tests.models.cases import NAMES, equal
from tests.parity.sides import FCOS_NAME, V2_NAME, flax_detector, known
from tests.tiny import build_small_models

FILES = pytest.mark.xdist_group("fcos_files")
EVERY = pytest.mark.parametrize("name", registry.names())


@pytest.fixture
def folder(tmp_path):
    """A folder whose files (150 MB each) are not kept."""
    yield tmp_path
    for file in tmp_path.iterdir():
        file.unlink()


# Round trips


OPTIONS = {
    "anchor_generator": flaxdet.AnchorGenerator(((4,), (16,), (32,), (64,), (128,)), (1.0,)),
    "score_thresh": np.float32(0.3),
    "image_std": [0.3, 0.25, 0.2],
    "box_roi_pool": flaxdet.models.MultiScaleRoIAlign(("p2", "p3"), 7, 1),
    "bbox_reg_weights": (5.0, 5.0, 2.0, 2.0),
    "box_nms_thresh": 0.25,
}


@pytest.mark.ci  # whole ResNet-50s; test_hub.py saves and loads one in every run
@FILES
@EVERY
def test_safetensors_round_trip(name, folder, drawn_models):
    """Model, options, names of labels and every bit of every tensor."""
    options = {"min_size": (96, 128), "fixed_size": (64, 32), "trainable_backbone_layers": 2, **known(name, OPTIONS)}
    frozen = registry.get(name).freezable
    if frozen:
        options |= {"frozen_bn": True, "norm_eps": 0.0}
    model = registry.make_model(name, num_classes=4, **options)
    _, variables = drawn_models(name, 4, frozen)
    path = folder / "model.safetensors"
    categories = ["__background__", "RBC", "WBC", "plaquette Ω"]
    flaxdet.save(path, model, variables, categories=categories)
    found_model, found = flaxdet.load(path)
    assert found_model == model
    assert found_model.transform == model.transform
    equal(found, variables)
    assert flaxdet.load_categories(path) == categories

    threshold = registry.get(name).kind.score_field
    other, found = flaxdet.load(path, **{threshold: 0.7}, min_size=320, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert getattr(other, threshold) == 0.7
    assert other.min_size == 320
    assert other.fixed_size == (64, 32)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'min_sise'"):
        flaxdet.load(path, min_sise=1)
    with pytest.raises(StateDictError, match=rf"(?s){path} does not fit .*expected \[5"):
        flaxdet.load(path, num_classes=5)


@pytest.mark.ci  # whole ResNet-50s; the next test reads one from torchvision's file in every run
@FILES
@EVERY
def test_pth_round_trip(name, folder, drawn_models):
    """What a .pth holds is told from its tensors; the rest has torchvision's defaults, or is given."""
    model, variables = drawn_models(name, 4)
    path = folder / "model.pth"
    flaxdet.save(path, model, variables)
    found_model, found = flaxdet.load(path)
    assert found_model == model
    equal(found, variables)
    assert flaxdet.load_categories(path) is None
    assert os.listdir(folder) == ["model.pth"]
    torch = pytest.importorskip("torch")
    theirs = reference.build(name, num_classes=4)
    theirs.load_state_dict(torch.load(path, weights_only=True), strict=True)
    assert flaxdet.load(path, max_size=99)[0] == model.clone(max_size=99)


@FILES
def test_load_of_torchvisions_own_file(folder):
    torch = pytest.importorskip("torch")
    theirs = reference.build(FCOS_NAME, num_classes=2, frozen=True)
    torch.save({"model": theirs.state_dict(), "epoch": 3}, folder / "checkpoint.pth")
    model, variables = flaxdet.load(folder / "checkpoint.pth")
    assert model == registry.make_model(FCOS_NAME, num_classes=2, frozen_bn=True)
    for key, value in to_torchvision(model, variables).items():
        np.testing.assert_array_equal(value, theirs.state_dict()[key].numpy(), err_msg=key)
    live, found = flaxdet.load(folder / "checkpoint.pth", frozen_bn=False)  # the caller overrules
    assert not live.backbone.body.frozen_bn
    assert "bn1" in found["params"]["backbone"]["body"]


# What is not saved, what is not loaded


def test_save_checks_before_it_writes(tmp_path, drawn_models):
    model, variables = drawn_models(FCOS_NAME, 4)
    with pytest.raises(ValueError, match=r"expected 4 names, got 2"):
        flaxdet.save(tmp_path / "m.safetensors", model, variables, categories=["a", "b"])
    for names in (["a", "b", "c", 4], ["a", "b", "c", "d\n"], ["a", "b", "c", None]):
        with pytest.raises(ValueError, match=r"m\.safetensors: categories\[3\] should be a text of one line"):
            flaxdet.save(tmp_path / "m.safetensors", model, variables, categories=names)
    for name in ("m.pt", "m.onnx", "m"):
        with pytest.raises(ValueError, match=rf"{name}: expected a name ending in .safetensors or .pth"):
            flaxdet.save(tmp_path / name, model, variables)
    with pytest.raises(StateDictError, match="the variables do not fit FCOS"):
        flaxdet.save(tmp_path / "m.pth", model, {"params": variables["params"]})
    with pytest.raises(OSError, match=r"nowhere/m\.pth: cannot be written"):
        flaxdet.save(tmp_path / "nowhere" / "m.pth", model, variables)
    assert not os.listdir(tmp_path)


@NAMES
def test_a_model_of_no_builder(name, folder):
    """Its tensors can be saved for torchvision, but no builder would make it again."""
    model = flax_detector(name, 3)
    variables = drawn(abstract_variables(model))
    with pytest.raises(
        ValueError, match=rf"no builder of this class \(.*{name}.*\) makes this model.*; flaxdet\.save_variables"
    ):
        flaxdet.save(folder / "m.safetensors", model, variables)
    assert not os.listdir(folder)
    flaxdet.save(folder / "m.pth", model, variables)
    with pytest.raises(CheckpointError, match=r"m\.pth: holds .*expected torchvision's fcos_resnet50_fpn or"):
        flaxdet.load(folder / "m.pth")


def test_tampered_metadata(folder, monkeypatch):
    build_small_models(monkeypatch)
    model = registry.make_model(FCOS_NAME, num_classes=4)
    variables = drawn(abstract_variables(model))
    # shapes and keys are enough for most faults: constant tensors are quick to make
    state = {key: np.zeros(value.shape, np.float16) for key, value in to_torchvision(model, variables).items()}
    state = {key: np.zeros((), np.int64) if key.endswith("tracked") else value for key, value in state.items()}
    good = {"builder": FCOS_NAME, "options": {"num_classes": 4, "frozen_bn": False}, "categories": None}
    path = folder / "model.safetensors"

    def load(description):
        text = description if isinstance(description, str) else json.dumps(description)
        checkpoint.write_safetensors(path, state, {"flaxdet": text})
        return flaxdet.load(path)

    assert load(good)[0] == model
    unreadable = "expected flaxdet's description of the model in its metadata, got something unreadable"
    for description in (
        "not JSON",
        "[]",
        "null",
        {**good, "options": [1]},
        {**good, "options": {"anchor_generator": {"type": "Popen", "args": "rm"}}},
        {**good, "options": {"anchor_generator": {"type": "AnchorGenerator", "nonsense": 1}}},
        {key: value for key, value in good.items() if key != "categories"},
        {**good, "categories": "abcd"},
        {**good, "categories": ["a", 2, "c", "d"]},
        {**good, "categories": ["a", "b\n", "c", "d"]},
        {**good, "builder": ["x"]},
        {**good, "options": {"score_thresh": float("nan")}},
        {**good, "options": {"max_size": 10**400}},
        {**good, "options": {"anchor_generator": {"sizes": [[1]]}}},
        json.dumps(good)[:-1] + ', "builder": "x"}',
        "[" * 100_000,
        '"\\ud800"',
    ):
        with pytest.raises(CheckpointError, match=f"{path}: {unreadable}"):
            load(description)
        with pytest.raises(CheckpointError, match=f"{path}: {unreadable}"):
            flaxdet.load_categories(path)
    with pytest.raises(CheckpointError, match=f"{path}: its metadata says {V2_NAME}, its keys say {FCOS_NAME}"):
        load({**good, "builder": V2_NAME})
    for options, message in (
        ({"builder": "x"}, "unexpected keyword argument 'builder'"),
        ({"backbone": "x"}, "unexpected keyword argument 'backbone'"),
        ({"anchor_generator": "x"}, "anchor_generator should be of type AnchorGenerator"),
        ({"min_size": -1}, "min_size should be one or more positive numbers"),
    ):
        with pytest.raises(CheckpointError, match=f"{path}: the options in its metadata make no model: .*{message}"):
            load({**good, "options": good["options"] | options})
    with pytest.raises(CheckpointError, match=f"{path}: its metadata has 2 names of categories for 4 classes"):
        load({**good, "categories": ["a", "b"]})
    with pytest.raises(StateDictError, match=rf"{path} does not fit FCOS: 2 wrong shape"):
        load({**good, "options": {"num_classes": 5}})


def test_the_format_is_versioned(folder, monkeypatch):
    """Files say which format they have; those of before it was written still load, newer ones are refused by name."""
    build_small_models(monkeypatch)
    model = registry.make_model(FCOS_NAME, num_classes=4)
    variables = drawn(abstract_variables(model))
    path = folder / "model.safetensors"
    flaxdet.save(path, model, variables)
    state, metadata = checkpoint.read(path), checkpoint.read_metadata(path)
    description = json.loads(metadata["flaxdet"])
    assert description["format"] == 1
    assert description["flaxdet"] == flaxdet.__version__

    def load(**changes):
        changed = {key: value for key, value in {**description, **changes}.items() if value is not ...}
        checkpoint.write_safetensors(path, state, {"flaxdet": json.dumps(changed)})
        return flaxdet.load(path)

    assert load(format=..., flaxdet=...)[0] == model
    newer = rf"was written by flaxdet 9\.1 in format 2, and this flaxdet {flaxdet.__version__} reads format 1 at most"
    with pytest.raises(CheckpointError, match=f"{path}: {newer}: install a newer flaxdet"):
        load(format=2, flaxdet="9.1", options="of a kind unknown today")
    with pytest.raises(CheckpointError, match=newer):
        flaxdet.load_categories(path)
    with pytest.raises(CheckpointError, match="by flaxdet of an unknown version in format 2"):
        load(format=2, flaxdet=...)
    for number in (0, -1, 1.5, "2", None, True):
        with pytest.raises(CheckpointError, match=f"{path}: expected flaxdet's description .* \\(format "):
            load(format=number)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(OSError, match=f"{tmp_path}: is a folder; .* use flaxdet.load_pretrained"):
        flaxdet.load(tmp_path)


def test_files_that_are_no_detector(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError, match=str(path)):
        flaxdet.load(path)
    path.write_text("hello")
    with pytest.raises(CheckpointError, match=rf"{path}: is not a checkpoint"):
        flaxdet.load(path)
    resnet = {key: np.zeros(1, np.float32) for key in ("conv1.weight", "layer1.0.conv1.weight", "fc.weight")}
    checkpoint.write_pth(path, resnet)
    with pytest.raises(CheckpointError, match=rf"{path}: holds a ResNet classifier.*expected torchvision's fcos"):
        flaxdet.load(path)
