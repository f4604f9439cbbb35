"""What every registered detector shows without being run: keys, number of parameters, recognition, first values."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch

from flaxdet import registry
from flaxdet.convert import CheckpointError, identify, reference, to_torchvision
from flaxdet.convert.rules import COUNTER, rules
from flaxdet.convert.state_dict import abstract_variables
from flaxdet.models.detector import example_batch
from flaxdet.models.initial import initial_variables
from tests.models.test_init import compare, torch_initial
from tests.parity import sides


def kinds(name: str) -> list[bool]:
    """Frozen or not: the forms of BatchNorm in the body that torchvision's builder makes."""
    return [True, False] if registry.get(name).freezable else [False]


def theirs(name: str, frozen: bool = False, **options) -> torch.nn.Module:
    """torchvision's, without memory for weights."""
    with torch.device("meta"):
        return reference.build(name, frozen=frozen, **options)


def test_every_tensor_of_torchvision_in_its_order(name):
    for frozen in kinds(name):
        model = registry.make_model(name, num_classes=91, frozen_bn=frozen)
        abstract = abstract_variables(model)
        rows = rules(model, abstract)
        expected = theirs(name, frozen).state_dict()
        assert [(row.key, row.shape) for row in rows] == [(key, tuple(x.shape)) for key, x in expected.items()]
        # every leaf has a row of its own, so that the conversion can be inverted
        targets = [(row.collection, row.path) for row in rows if row.collection]
        assert len(set(targets)) == len(targets) == len(jax.tree.leaves(abstract))


def test_number_of_parameters(name):
    """Of the published weights, as torchvision states it, and of torchvision's model with nothing pretrained."""
    for frozen in kinds(name):
        model = registry.make_model(name, num_classes=91, frozen_bn=frozen)
        count = sum(leaf.size for leaf in jax.tree.leaves(abstract_variables(model)["params"]))
        assert count == sum(parameter.numel() for parameter in theirs(name, frozen).parameters())
        weights = registry.get(name).weights
        if weights is not None and frozen == registry.get(name).freezable:
            assert count == weights.DEFAULT.meta["num_params"]


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("classes", [2, 91])
def test_recognised_by_keys_alone(name, classes, prefix):
    for frozen in kinds(name):
        state = theirs(name, frozen, num_classes=classes).state_dict()
        state = {prefix + key: np.broadcast_to(np.float32(0), tensor.shape) for key, tensor in state.items()}
        if registry.get(name).keys is None:  # never guessed
            with pytest.raises(CheckpointError):
                identify(state)
            continue
        assert identify(state) == (name, {"num_classes": classes, "frozen_bn": frozen})
        without = {key: array for key, array in state.items() if not key.endswith(COUNTER)}
        assert identify(without) == (name, {"num_classes": classes, "frozen_bn": registry.get(name).freezable})


def test_described_by_its_options(name):
    options = {"min_size": (64, 96), "image_mean": (0.0, 0.5, 1.0), registry.get(name).kind.score_field: 0.25}
    model = registry.make_model(name, num_classes=7, freeze_bn=True, trainable_backbone_layers=2, **options)
    architecture, described = registry.describe(model)
    assert architecture.name == name
    assert described == {
        "num_classes": 7,
        "frozen_bn": False,
        "freeze_bn": True,
        "remat": False,
        "trainable_backbone_layers": 2,
        **options,
    }


def test_small_form_has_torchvisions_keys(name):
    model = registry.make_model(name, num_classes=3, small=True)
    expected = theirs(name, num_classes=3, small=True).state_dict()
    assert [row.key for row in rules(model, abstract_variables(model))] == list(expected)


def test_shapes_and_stages_without_computing(name):
    model = registry.make_model(name, num_classes=91, small=True)
    variables = abstract_variables(model)
    run = jax.eval_shape(lambda v, b: model.apply(v, b, mutable=["intermediates"]), variables, example_batch())
    detections, sown = run[0], run[1]["intermediates"]
    assert detections.boxes.shape == (1, 100, 4)
    assert {"c2", "c3", "c4", "c5", *sides.levels_of(model)} < set(sown)
    assert all(len(values) == 1 for values in sown.values()), "each is sown once"


@pytest.mark.repeated  # tests/models/test_init.py compares the heads
def test_initialised_as_torchvision_does(name):
    initialised_as_torchvision_does(name, small=True)


@pytest.mark.whole
@pytest.mark.release
def test_a_whole_resnet_50_is_initialised_as_torchvision_does(name):
    initialised_as_torchvision_does(name, small=False)


def initialised_as_torchvision_does(name, *, small):
    def build() -> torch.nn.Module:
        return reference.build(name, small=small)

    first, second = torch_initial(build, 2)
    drawn = sum(not np.array_equal(first[key], second[key]) for key in first)
    model = registry.make_model(name, num_classes=91, small=small)
    variables = initial_variables(model, jax.random.key(0))
    compare([to_torchvision(model, variables)], [first], drawn)


def test_eps_with_the_published_weights_is_torchvisions(name, monkeypatch):
    """torchvision's builders call overwrite_eps with some of the published weights; nothing is downloaded here."""
    architecture = registry.get(name)
    if architecture.weights is None:
        return
    tv = reference.torchvision()
    state = theirs(name, architecture.freezable).state_dict()
    monkeypatch.setattr(tv.models.WeightsEnum, "get_state_dict", lambda *_, **__: state)
    with torch.device("meta"):
        published = getattr(tv.models.detection, name)(weights="DEFAULT")
    frozen = [module for module in published.modules() if isinstance(module, tv.ops.misc.FrozenBatchNorm2d)]
    assert bool(frozen) == architecture.freezable
    eps = architecture.weights.DEFAULT.options.get("norm_eps", registry.FROZEN_EPS)
    assert {module.eps for module in frozen} <= {eps}
