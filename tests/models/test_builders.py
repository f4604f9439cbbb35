"""torchvision's builder rules, without a download; models in files, in both formats."""

from __future__ import annotations

import json
import os
import types
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxdet
from flaxdet import builders
from flaxdet.convert import CheckpointError, StateDictError, checkpoint, reference, to_torchvision
from flaxdet.convert.state_dict import abstract_variables
from flaxdet.weights import FasterRCNN_ResNet50_FPN_V2_Weights, FCOS_ResNet50_FPN_Weights, ResNet50_Weights, WeightsEnum
from tests.drawn import drawn
from tests.parity.sides import FCOS_NAME, V2_NAME, flax_detector

NAMES = pytest.mark.parametrize(
    "name",
    [
        pytest.param(FCOS_NAME, marks=pytest.mark.xdist_group("fcos_files")),
        pytest.param(V2_NAME, marks=pytest.mark.xdist_group("v2_files")),
    ],
)
FILES = pytest.mark.xdist_group("fcos_files")


def count(variables) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def equal(found: Any, expected: Any) -> None:
    """Bit for bit, and of the same dtypes."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture(scope="module")
def drawn_models():
    """(model, variables) by (builder, classes, frozen), drawn once."""
    made: dict[Any, Any] = {}

    def get(name: str, num_classes: int = 91, frozen: bool = False):
        key = (name, num_classes, frozen)
        if key not in made:
            model = builders.make_model(name, num_classes=num_classes, frozen_bn=frozen)
            made[key] = model, drawn(abstract_variables(model))
        return made[key]

    return get


@pytest.fixture
def server(monkeypatch):
    """Instead of a download: `server.files[member]` is the state_dict, `server.asked` what was asked for."""

    server = types.SimpleNamespace(files={}, asked=[])

    def get_state_dict(self, progress=True):
        server.asked.append((self, progress))
        return server.files[self]

    monkeypatch.setattr(WeightsEnum, "get_state_dict", get_state_dict)
    return server


@pytest.fixture
def abstract_init(monkeypatch):
    """Nothing is initialised, only shaped: the rules under test don't depend on it."""
    monkeypatch.setattr(builders, "initial_variables", lambda model, key: abstract_variables(model))


def resnet50(frozen: bool = False):
    """(the body's variables, the classifier's state_dict) as ImageNet weights bring them."""
    model = builders.make_model(FCOS_NAME, num_classes=1, frozen_bn=frozen)
    variables = drawn(abstract_variables(model), seed=1)
    prefix = "backbone.body."
    state = to_torchvision(model, variables)
    body = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    body |= {"fc.weight": np.zeros((1000, 2048), np.float32), "fc.bias": np.zeros(1000, np.float32)}
    return {name: leaves["backbone"]["body"] for name, leaves in variables.items()}, body


# Weights


@NAMES
def test_detector_weights(name, server, drawn_models):
    """ "COCO_V1" gives the file's values, 91 classes and the published number of parameters."""
    frozen = name == FCOS_NAME
    kind = FCOS_ResNet50_FPN_Weights if frozen else FasterRCNN_ResNet50_FPN_V2_Weights
    source, variables = drawn_models(name, frozen=frozen)
    server.files[kind.COCO_V1] = to_torchvision(source, variables)
    model, found = getattr(flaxdet, name)(weights="COCO_V1", progress=False)
    equal(found, variables)
    assert server.asked == [(kind.COCO_V1, False)]  # and no backbone, whatever the default of weights_backbone
    assert count(found) == kind.COCO_V1.meta["num_params"] == (32_269_600 if frozen else 43_712_278)
    assert model.num_classes == 91
    assert model.trainable_backbone_layers == 3
    assert model == getattr(flaxdet, name)(weights=kind.DEFAULT, num_classes=91)[0].clone(trainable_backbone_layers=3)
    assert model.backbone.body.frozen_bn == frozen


@NAMES
def test_detector_weights_fix_the_number_of_classes(name, server):
    with pytest.raises(ValueError, match=r"'num_classes' expected value 91 but got 5 instead"):
        getattr(flaxdet, name)(weights="DEFAULT", num_classes=5)
    assert not server.asked  # before a download


@pytest.mark.parametrize(
    ("name", "frozen", "parameters", "tensors"),
    [
        (FCOS_NAME, False, 32_322_720, 372),
        (FCOS_NAME, True, 32_269_600, 319),
        (V2_NAME, False, 43_712_278, 404),
    ],
)
def test_parameters_and_tensors(name, frozen, parameters, tensors):
    model = builders.make_model(name, num_classes=91, frozen_bn=frozen)
    variables = abstract_variables(model)
    assert count(variables) == parameters
    counters = 0 if frozen else sum("var" in leaves for leaves in norms(variables["batch_stats"]))
    assert len(jax.tree.leaves(variables)) + counters == tensors


def norms(tree):
    if any(hasattr(leaf, "shape") for leaf in tree.values()):
        yield tree
    else:
        for branch in tree.values():
            yield from norms(branch)


@NAMES
def test_backbone_weights(name, server, drawn_models, monkeypatch):
    """ImageNet's go into the body, frozen in FCOS and live in version 2; the rest keeps its initialisation."""
    frozen = name == FCOS_NAME
    model, initial = drawn_models(name, 7, frozen)
    monkeypatch.setattr(builders, "initial_variables", lambda model, key: initial)
    body, server.files[ResNet50_Weights.IMAGENET1K_V2] = resnet50(frozen)
    found_model, found = getattr(flaxdet, name)(weights_backbone="IMAGENET1K_V2", num_classes=7)
    assert found_model == model.clone(trainable_backbone_layers=3)
    assert server.asked == [(ResNet50_Weights.IMAGENET1K_V2, True)]
    equal({c: found[c]["backbone"]["body"] for c in body}, body)
    for variables in (found, initial):
        assert ("bn1" in variables["params"]["backbone"]["body"]) != frozen

    def rest(variables):
        flat = jax.tree_util.tree_leaves_with_path(variables)
        return {str(path): leaf for path, leaf in flat if "'body'" not in str(path)}

    equal(rest(found), rest(initial))


def test_backbone_weights_by_default(server, abstract_init):
    """As in torchvision: FCOS starts from ImageNet unless told otherwise, version 2 doesn't."""
    _, server.files[ResNet50_Weights.IMAGENET1K_V1] = resnet50(frozen=True)
    flaxdet.fcos_resnet50_fpn(num_classes=2)
    assert server.asked == [(ResNet50_Weights.IMAGENET1K_V1, True)]
    model, _ = flaxdet.fasterrcnn_resnet50_fpn_v2()
    assert len(server.asked) == 1
    assert model.num_classes == 91


@NAMES
@pytest.mark.parametrize("argument", ["weights", "weights_backbone"])
def test_unknown_weights(name, argument, server):
    with pytest.raises(ValueError, match=r"has no 'COCO_V9'; expected one of "):
        getattr(flaxdet, name)(**{argument: "COCO_V9"})
    with pytest.raises(TypeError, match=r"weights: expected .*_Weights, its name or None, found int"):
        getattr(flaxdet, name)(**{argument: 1})
    other = FasterRCNN_ResNet50_FPN_V2_Weights if name == FCOS_NAME else FCOS_ResNet50_FPN_Weights
    with pytest.raises(TypeError, match=f"expected .*_Weights, its name or None, found {other.__name__}"):
        getattr(flaxdet, name)(**{argument: other.COCO_V1})
    assert not server.asked


def test_weights_of_another_shape(server, drawn_models):
    """A file that isn't what its name says is refused whole."""
    model, variables = drawn_models(FCOS_NAME, 7)
    server.files[FCOS_ResNet50_FPN_Weights.COCO_V1] = to_torchvision(model, variables)
    with pytest.raises(StateDictError, match=r"cls_logits\.weight: expected \[91, 256, 3, 3\], found \[7, 256, 3, 3\]"):
        flaxdet.fcos_resnet50_fpn(weights="COCO_V1")


# Trainable layers


@NAMES
@pytest.mark.parametrize("layers", [None, 0, 3, 7])
def test_trainable_layers_with_nothing_pretrained(name, layers, abstract_init):
    expected = expected_layers(False, layers)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, _ = getattr(flaxdet, name)(weights_backbone=None, trainable_backbone_layers=layers)
    assert model.trainable_backbone_layers == expected == 5
    assert len(caught) == (layers is not None)
    for warning in caught:
        assert "trainable_backbone_layers has no effect" in str(warning.message)
        assert warning.filename == __file__  # points at the caller


@pytest.mark.parametrize("layers", [None, *range(6)])
@NAMES
def test_trainable_layers_with_weights(name, layers, server, abstract_init, monkeypatch):
    monkeypatch.setattr(builders, "backbone_from_torchvision", lambda model, variables, state_dict: variables)
    server.files[ResNet50_Weights.DEFAULT] = {}
    model, _ = getattr(flaxdet, name)(weights_backbone="DEFAULT", trainable_backbone_layers=layers)
    assert model.trainable_backbone_layers == expected_layers(True, layers) == (3 if layers is None else layers)


@pytest.mark.parametrize("layers", [-1, 6])
@NAMES
def test_trainable_layers_out_of_range(name, layers, server):
    with pytest.raises(ValueError, match=rf"Trainable backbone layers should be in the range \[0, ?5\].* got {layers}"):
        getattr(flaxdet, name)(weights="DEFAULT", trainable_backbone_layers=layers)
    assert not server.asked


def expected_layers(is_trained: bool, layers: int | None) -> int:
    """torchvision's own rule, where it is installed."""
    if layers is None:
        return 3 if is_trained else 5
    pytest.importorskip("torch")
    rule = reference.torchvision().models.detection.backbone_utils._validate_trainable_layers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return rule(is_trained, layers, 5, 3)


# Keywords


@NAMES
def test_unknown_keywords(name, abstract_init):
    build = getattr(flaxdet, name)
    with pytest.raises(
        TypeError, match=rf"{name}\(\) got an unexpected keyword argument 'min_sise'; it takes .*min_size"
    ):
        build(weights_backbone=None, min_sise=800)
    for reserved in ("backbone", "parent", "name"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{reserved}'"):
            build(weights_backbone=None, **{reserved: None})
    other = "box_score_thresh" if name == FCOS_NAME else "score_thresh"
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{other}'"):
        build(weights_backbone=None, **{other: 0.5})


@pytest.mark.parametrize("part", ["rpn_anchor_generator", "rpn_head", "box_head"])
def test_parts_that_version_2_makes_itself(part, abstract_init):
    """torchvision raises a TypeError for them, too: they come twice in its call."""
    with pytest.raises(TypeError, match=f"got multiple values for keyword argument '{part}'"):
        flaxdet.fasterrcnn_resnet50_fpn_v2(**{part: None})


@NAMES
def test_keywords_reach_the_model(name, abstract_init):
    prefix = "" if name == FCOS_NAME else "box_"
    options = {
        "min_size": (400, 500),
        "max_size": 700,
        "image_mean": [0.1, 0.2, 0.3],
        "fixed_size": [640, 480],
        "size_divisible": 64,
        f"{prefix}score_thresh": 0.4,
        f"{prefix}detections_per_img": 7,
    }
    model, variables = getattr(flaxdet, name)(
        weights_backbone=None, num_classes=3, dtype=jnp.bfloat16, precision="high", **options
    )
    for option, value in options.items():
        assert getattr(model, option) == (tuple(value) if isinstance(value, list) else value)
    assert model.transform.min_size == (400, 500)
    assert model.dtype == model.backbone.fpn.dtype == jnp.bfloat16
    assert model.precision == model.backbone.body.precision == "high"
    assert model.num_classes == 3
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_keys_decide_the_initialisation(monkeypatch):
    keys = []
    monkeypatch.setattr(builders, "initial_variables", lambda model, key: keys.append(key) or {})
    for key in (None, jax.random.key(0), jax.random.key(1)):
        flaxdet.fasterrcnn_resnet50_fpn_v2(key=key)
    data = [jax.random.key_data(key).tolist() for key in keys]
    assert data[0] == data[1] != data[2]


def test_make_model_checks():
    with pytest.raises(ValueError, match="unknown model 'yolo'; expected one of fcos_resnet50_fpn, fasterrcnn"):
        builders.make_model("yolo", num_classes=3)
    with pytest.raises(ValueError, match="num_classes should be at least 1, got 0"):
        builders.make_model(FCOS_NAME, num_classes=0)
    with pytest.raises(ValueError, match="live BatchNorm throughout"):
        builders.make_model(V2_NAME, num_classes=3, frozen_bn=True)
    with pytest.raises(ValueError, match="min_size should be one or more positive numbers"):
        builders.make_model(FCOS_NAME, num_classes=3, min_size=0)
    with pytest.raises(ValueError, match="dtype=float64 needs jax's 64-bit mode"):
        builders.make_model(FCOS_NAME, num_classes=3, dtype="float64")


# Files


@pytest.fixture
def folder(tmp_path):
    """A folder whose files (150 MB each) are not kept."""
    yield tmp_path
    for file in tmp_path.iterdir():
        file.unlink()


OPTIONS = {
    FCOS_NAME: {
        "anchor_generator": flaxdet.AnchorGenerator(((4,), (16,), (32,), (64,), (128,)), (1.0,)),
        "score_thresh": np.float32(0.3),
        "image_std": [0.3, 0.25, 0.2],
        "frozen_bn": True,
    },
    V2_NAME: {
        "box_roi_pool": flaxdet.models.MultiScaleRoIAlign(("p2", "p3"), 7, 1),
        "bbox_reg_weights": (5.0, 5.0, 2.0, 2.0),
        "box_nms_thresh": 0.25,
    },
}


@NAMES
def test_safetensors_round_trip(name, folder, drawn_models):
    """Model, options, names of labels and every bit of every tensor."""
    options = {"min_size": (96, 128), "fixed_size": (64, 32), "trainable_backbone_layers": 2, **OPTIONS[name]}
    model = builders.make_model(name, num_classes=4, **options)
    _, variables = drawn_models(name, 4, options.get("frozen_bn", False))
    path = folder / "model.safetensors"
    categories = ["__background__", "RBC", "WBC", "plaquette Ω"]
    flaxdet.save(path, model, variables, categories=categories)
    found_model, found = flaxdet.load(path)
    assert found_model == model
    assert found_model.transform == model.transform
    equal(found, variables)
    assert flaxdet.load_categories(path) == categories

    threshold = "score_thresh" if name == FCOS_NAME else "box_score_thresh"
    other, found = flaxdet.load(path, **{threshold: 0.7}, min_size=320, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert getattr(other, threshold) == 0.7
    assert other.min_size == 320
    assert other.fixed_size == (64, 32)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'min_sise'"):
        flaxdet.load(path, min_sise=1)
    with pytest.raises(StateDictError, match=rf"(?s){path} does not fit .*expected \[5"):
        flaxdet.load(path, num_classes=5)


@NAMES
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
    assert model == builders.make_model(FCOS_NAME, num_classes=2, frozen_bn=True)
    for key, value in to_torchvision(model, variables).items():
        np.testing.assert_array_equal(value, theirs.state_dict()[key].numpy(), err_msg=key)
    live, found = flaxdet.load(folder / "checkpoint.pth", frozen_bn=False)  # the caller overrules
    assert not live.backbone.body.frozen_bn
    assert "bn1" in found["params"]["backbone"]["body"]


def test_save_checks_before_it_writes(tmp_path, drawn_models):
    model, variables = drawn_models(FCOS_NAME, 4)
    with pytest.raises(ValueError, match=r"expected 4 names, got 2"):
        flaxdet.save(tmp_path / "m.safetensors", model, variables, categories=["a", "b"])
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
    model = flax_detector(name, 18, 3)
    variables = drawn(abstract_variables(model))
    with pytest.raises(ValueError, match=rf"stores the options of {name}, and this model has parts .*save it as \.pth"):
        flaxdet.save(folder / "m.safetensors", model, variables)
    assert not os.listdir(folder)
    flaxdet.save(folder / "m.pth", model, variables)
    with pytest.raises(CheckpointError, match=r"m\.pth: holds .*expected torchvision's fcos_resnet50_fpn or"):
        flaxdet.load(folder / "m.pth")


@FILES
def test_tampered_metadata(folder, drawn_models):
    model, variables = drawn_models(FCOS_NAME, 4)
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
    ):
        with pytest.raises(CheckpointError, match=f"{path}: {unreadable}"):
            load(description)
        with pytest.raises(CheckpointError, match=f"{path}: {unreadable}"):
            flaxdet.load_categories(path)
    with pytest.raises(CheckpointError, match=f"{path}: its metadata says {V2_NAME}, its keys say {FCOS_NAME}"):
        load({**good, "builder": V2_NAME})
    for options, message in (
        ({"builder": "x"}, "multiple values"),
        ({"backbone": "x"}, "unexpected keyword argument 'backbone'"),
        ({"anchor_generator": "x"}, "anchor_generator should be of type AnchorGenerator"),
        ({"min_size": -1}, "min_size should be one or more positive numbers"),
    ):
        with pytest.raises(CheckpointError, match=f"{path}: the options in its metadata make no model: .*{message}"):
            load({**good, "options": good["options"] | options})
    with pytest.raises(StateDictError, match=rf"{path} does not fit FCOS: 2 wrong shape"):
        load({**good, "options": {"num_classes": 5}})


@FILES
def test_the_format_is_versioned(folder, drawn_models):
    """Files say which format they have; those of before it was written still load, newer ones are refused by name."""
    model, variables = drawn_models(FCOS_NAME, 4)
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


def test_a_frozen_model_is_frozen_throughout(drawn_models):
    _, variables = drawn_models(FCOS_NAME, 91, True)
    body = variables["batch_stats"]["backbone"]["body"]
    assert set(body["layer4_2"]["bn3"]) == {"scale", "bias", "mean", "var"}
    assert not [path for path in variables["params"]["backbone"]["body"] if path.startswith("bn")]
