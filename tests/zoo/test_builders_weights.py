"""The builders' weights, without a download: a detector's, a backbone's, by default and by name."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import flaxdet
from flaxdet import FCOS_ResNet50_FPN_Weights, ResNet50_Weights, registry
from flaxdet.convert import StateDictError, to_torchvision
from flaxdet.convert.state_dict import abstract_variables
from flaxdet.zoo import build
from tests.drawn import drawn
from tests.models.cases import NAMES, equal
from tests.parity.sides import FCOS_NAME, V2_NAME


def count(variables) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


# Detectors


@NAMES
def test_detector_weights(name, server, drawn_models):
    """ "COCO_V1" gives the file's values, 91 classes and the published number of parameters."""
    frozen, kind = registry.get(name).freezable, registry.get(name).weights
    source, variables = drawn_models(name, frozen=frozen)
    server.files[kind.COCO_V1] = to_torchvision(source, variables)
    model, found = getattr(flaxdet, name)(weights="COCO_V1", progress=False)
    equal(found, variables)
    assert server.asked == [(kind.COCO_V1, False)]  # and no backbone, whatever the default of weights_backbone
    assert count(found) == kind.COCO_V1.meta["num_params"]
    assert model.num_classes == 91
    assert model.trainable_backbone_layers == 3
    assert model == getattr(flaxdet, name)(weights=kind.DEFAULT, num_classes=91)[0].clone(trainable_backbone_layers=3)
    assert model.backbone.body.frozen_bn == frozen


@NAMES
def test_detector_weights_fix_the_number_of_classes(name, server):
    with pytest.raises(ValueError, match=r"'num_classes' expected value 91 but got 5 instead"):
        getattr(flaxdet, name)(weights="DEFAULT", num_classes=5)
    assert not server.asked  # before a download


def test_weights_of_another_shape(server, drawn_models):
    """A file that isn't what its name says is refused whole."""
    model, variables = drawn_models(FCOS_NAME, 7)
    server.files[FCOS_ResNet50_FPN_Weights.COCO_V1] = to_torchvision(model, variables)
    with pytest.raises(StateDictError, match=r"cls_logits\.weight: expected \[91, 256, 3, 3\], found \[7, 256, 3, 3\]"):
        flaxdet.fcos_resnet50_fpn(weights="COCO_V1")


def test_a_frozen_model_is_frozen_throughout(drawn_models):
    _, variables = drawn_models(FCOS_NAME, 91, True)
    body = variables["batch_stats"]["backbone"]["body"]
    assert set(body["layer4_2"]["bn3"]) == {"scale", "bias", "mean", "var"}
    assert not [path for path in variables["params"]["backbone"]["body"] if path.startswith("bn")]


@pytest.mark.parametrize(
    ("name", "frozen", "parameters", "tensors"),
    [
        (FCOS_NAME, False, 32_322_720, 372),
        (FCOS_NAME, True, 32_269_600, 319),
        (V2_NAME, False, 43_712_278, 404),
    ],
)
def test_parameters_and_tensors(name, frozen, parameters, tensors):
    model = registry.make_model(name, num_classes=91, frozen_bn=frozen)
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


# Backbones


def resnet50(frozen: bool = False):
    """(the body's variables, the classifier's state_dict) as ImageNet weights bring them."""
    model = registry.make_model(FCOS_NAME, num_classes=1, frozen_bn=frozen)
    variables = drawn(abstract_variables(model), seed=1)
    prefix = "backbone.body."
    state = to_torchvision(model, variables)
    body = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    body |= {"fc.weight": np.zeros((1000, 2048), np.float32), "fc.bias": np.zeros(1000, np.float32)}
    return {name: leaves["backbone"]["body"] for name, leaves in variables.items()}, body


@NAMES
def test_backbone_weights(name, server, drawn_models, monkeypatch):
    """ImageNet's go into the body, frozen where torchvision freezes it; the rest keeps its initialisation."""
    frozen = registry.get(name).freezable
    model, initial = drawn_models(name, 7, frozen)
    monkeypatch.setattr(build, "initial_variables", lambda model, key: initial)
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


# Either


@NAMES
@pytest.mark.parametrize("argument", ["weights", "weights_backbone"])
def test_unknown_weights(name, argument, server):
    with pytest.raises(ValueError, match=r"has no 'COCO_V9'; expected one of "):
        getattr(flaxdet, name)(**{argument: "COCO_V9"})
    with pytest.raises(TypeError, match=r"weights: expected .*_Weights, its name or None, found int"):
        getattr(flaxdet, name)(**{argument: 1})
    other = next(each.weights for each in registry.architectures() if each.name != name)
    with pytest.raises(TypeError, match=f"expected .*_Weights, its name or None, found {other.__name__}"):
        getattr(flaxdet, name)(**{argument: other.COCO_V1})
    assert not server.asked
