"""torchvision's builder rules, without a download: which layers train, and keywords."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import pytest

import flaxdet
from flaxdet import registry
from flaxdet.convert import reference
from flaxdet.zoo import build
from flaxdet.zoo.weights import ResNet50_Weights
from tests.models.cases import NAMES
from tests.parity.sides import FCOS_NAME, V2_NAME

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


@pytest.mark.parametrize("layers", [None, 0, 2, 5])
@NAMES
def test_trainable_layers_with_weights(name, layers, server, abstract_init, monkeypatch):
    monkeypatch.setattr(build, "backbone_from_torchvision", lambda model, variables, state_dict: variables)
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
    other = "box_score_thresh" if registry.get(name).kind.score_field == "score_thresh" else "score_thresh"
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{other}'"):
        build(weights_backbone=None, **{other: 0.5})


@pytest.mark.parametrize("part", ["rpn_anchor_generator", "rpn_head", "box_head"])
def test_parts_that_version_2_makes_itself(part, abstract_init):
    """torchvision raises a TypeError for them, too: they come twice in its call."""
    with pytest.raises(TypeError, match=f"got multiple values for keyword argument '{part}'"):
        flaxdet.fasterrcnn_resnet50_fpn_v2(**{part: None})


@NAMES
def test_keywords_reach_the_model(name, abstract_init):
    prefix = registry.get(name).kind.score_field.removesuffix("score_thresh")
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
    monkeypatch.setattr(build, "initial_variables", lambda model, key: keys.append(key) or {})
    for key in (None, jax.random.key(0), jax.random.key(1)):
        flaxdet.fasterrcnn_resnet50_fpn_v2(key=key)
    data = [jax.random.key_data(key).tolist() for key in keys]
    assert data[0] == data[1] != data[2]


def test_make_model_checks():
    with pytest.raises(ValueError, match="unknown model 'yolo'; expected one of fcos_resnet50_fpn, fasterrcnn"):
        registry.make_model("yolo", num_classes=3)
    with pytest.raises(ValueError, match="num_classes should be at least 1, got 0"):
        registry.make_model(FCOS_NAME, num_classes=0)
    with pytest.raises(ValueError, match="live BatchNorm throughout"):
        registry.make_model(V2_NAME, num_classes=3, frozen_bn=True)
    with pytest.raises(ValueError, match="min_size should be one or more positive numbers"):
        registry.make_model(FCOS_NAME, num_classes=3, min_size=0)
    with pytest.raises(ValueError, match="dtype=float64 needs jax's 64-bit mode"):
        registry.make_model(FCOS_NAME, num_classes=3, dtype="float64")
