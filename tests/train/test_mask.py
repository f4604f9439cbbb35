"""Which parameters train and which decay; counts and names as torchvision has them."""

from __future__ import annotations

import importlib.util

import jax
import numpy as np
import pytest
from flax import traverse_util

from flaxdet.convert import to_torchvision
from flaxdet.convert.state_dict import abstract_variables
from flaxdet.registry import make_model
from flaxdet.train import decay_mask, merge, norm_mask, split, trainable_mask
from tests.tiny import FCOS_NAME, V2_NAME, tiny_model, tiny_variables

FROZEN_FCOS = (FCOS_NAME, True)
LIVE_FCOS = (FCOS_NAME, False)
V2 = (V2_NAME, False)
COUNTS = {
    FROZEN_FCOS: (54, 64, 83, 96, 106, 107),
    V2: (50, 80, 137, 176, 206, 209),
    LIVE_FCOS: (54, 84, 141, 180, 210, 213),
}


def model_of(kind: tuple[str, bool], *, small: bool = False):
    name, frozen = kind
    return make_model(name, num_classes=91, frozen_bn=frozen, small=small)


def torch_names(model, mask) -> set[str]:
    """torchvision's names of the parameters where the mask is True."""
    shapes = abstract_variables(model)
    marked = jax.tree.map(lambda leaf, chosen: np.full(leaf.shape, chosen), shapes["params"], mask)
    other = jax.tree.map(lambda leaf: np.zeros(leaf.shape, bool), shapes["batch_stats"])
    state = to_torchvision(model, {"params": marked, "batch_stats": other})
    return {key for key, value in state.items() if value.any()}


@pytest.mark.parametrize("kind", COUNTS, ids=lambda kind: f"{kind[0]}-{'frozen' if kind[1] else 'live'}")
def test_counts_of_trainable_tensors(kind):
    model = model_of(kind)
    params = abstract_variables(model)["params"]
    found = [sum(jax.tree.leaves(trainable_mask(model, params, layers=layers))) for layers in range(6)]
    assert tuple(found) == COUNTS[kind]
    asked = model.clone(trainable_backbone_layers=2)
    assert trainable_mask(asked, params) == trainable_mask(model, params, layers=2)


@pytest.mark.parametrize("kind", [FROZEN_FCOS, V2], ids=[FCOS_NAME, V2_NAME])
def test_names_are_torchvisions(kind):
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("needs torchvision")
    from flaxdet.convert import reference

    split_norms = reference.torchvision().ops._utils.split_normalization_params
    name, frozen = kind
    model = model_of(kind, small=True)
    params = abstract_variables(model)["params"]
    for layers in range(6):
        # v2's builder trains everything without pretrained weights, so its layers are frozen as the builder does
        theirs = reference.build(
            name, frozen=frozen, small=True, **({"trainable_backbone_layers": layers} if frozen else {})
        )
        if not frozen:
            trained = ["layer4", "layer3", "layer2", "layer1", "conv1", "bn1"][: layers + (layers == 5)]
            for key, value in theirs.backbone.body.named_parameters():
                value.requires_grad_(key.startswith(tuple(trained)))
        expected = {key for key, value in theirs.named_parameters() if value.requires_grad}
        mask = trainable_mask(model, params, layers=layers)
        assert torch_names(model, mask) == expected

        norms, others = ({id(value) for value in group} for group in split_norms(theirs))
        for found, group in ((norm_mask(params), norms), (decay_mask(params), others)):
            chosen = jax.tree.map(lambda a, b: a and b, found, mask)
            assert torch_names(model, chosen) == {k for k, value in theirs.named_parameters() if id(value) in group}


def test_decay_mask():
    model = tiny_model(FCOS_NAME)
    params = tiny_variables(model)["params"]
    paths = traverse_util.flatten_dict(params)

    def chosen(mask):
        return {path for path, value in traverse_util.flatten_dict(mask).items() if value}

    kernels = {path for path in paths if path[-1] == "kernel"}
    assert chosen(decay_mask(params, biases=False)) == kernels
    assert chosen(decay_mask(params, norms=True)) == paths.keys()
    biases = {path for path in paths if path[-1] == "bias" and not path[-2].startswith(("bn", "norm"))}
    assert chosen(decay_mask(params)) == kernels | biases


def test_split_and_merge():
    params = {"a": {"b": 1, "c": 2}, "d": {"e": 3}}
    trainable, frozen = split(params, {"a": {"b": True, "c": False}, "d": {"e": False}})
    assert trainable == {"a": {"b": 1}}
    assert frozen == {"a": {"c": 2}, "d": {"e": 3}}
    assert merge(trainable, frozen) == params
    with pytest.raises(ValueError, match="only one of the two has a/c"):
        split(params, {"a": {"b": True}, "d": {"e": False}})
    with pytest.raises(ValueError, match="a/b is both trainable and frozen"):
        merge(params, trainable)


def test_other_backbones():
    model = tiny_model(V2_NAME)
    params = tiny_variables(model)["params"]
    assert all(jax.tree.leaves(trainable_mask(model, params)))
    with pytest.raises(ValueError, match=r"counts the layers of a ResNet, and the backbone's body is TinyBackbone"):
        trainable_mask(model, params, layers=3)
    for layers in (-1, 6):
        with pytest.raises(ValueError, match=rf"should be in the range \[0, 5\], got {layers}"):
            trainable_mask(model, params, layers=layers)
