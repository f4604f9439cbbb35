"""Labels outside a model's classes: an error where they can be read, NaN under jit, and no matter in padding."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdet.convert.state_dict import abstract_variables
from flaxdet.models import FCOS
from flaxdet.models.labels import check_targets
from flaxdet.structures import Proposals, Targets
from flaxdet.train import batch_inputs
from tests.drawn import drawn
from tests.tiny import FCOS_NAME, V2_NAME, tiny_model
from tests.train.cases import random_batch

NAMES = pytest.mark.parametrize("name", [FCOS_NAME, V2_NAME])


@functools.cache
def inputs(name: str) -> tuple[Any, Any, Any, Targets]:
    """A model of four classes, and two images: three boxes of padding, then three boxes."""
    model = tiny_model(name)
    arrays = {key: jnp.asarray(value) for key, value in random_batch(2).items() if key != "image_id"}
    return model, drawn(abstract_variables(model)), *batch_inputs(model, arrays)


def with_label(targets: Targets, label: int, image: int = 1, box: int = 2) -> Targets:
    labels = np.array(targets.labels)
    labels[image, box] = label
    return dataclasses.replace(targets, labels=jnp.asarray(labels))


SHAPES = ((8, 8), (4, 4))  # of the maps of 64x64 pixels
CELLS = sum(rows * columns for rows, columns in SHAPES)


def network(name: str) -> dict[str, Any]:
    """What the body and the heads would give, and the gradients go back to."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    if name == FCOS_NAME:
        regression = np.exp(normal(2, CELLS, 4))
        outputs = {
            "cls_logits": normal(2, CELLS, 4),
            "bbox_regression": regression,
            "bbox_ctrness": normal(2, CELLS, 1),
        }
        return {"outputs": outputs}
    return {
        "features": {str(i): normal(2, *shape, 32) for i, shape in enumerate(SHAPES)},
        "objectness": [normal(2, rows * columns * 3) for rows, columns in SHAPES],
        "deltas": [normal(2, rows * columns * 3, 4) for rows, columns in SHAPES],
    }


@functools.partial(jax.jit, static_argnums=0)
def loss_step(model: Any, variables: Any, arrays: dict[str, Any], images: Any, targets: Targets) -> Any:
    """(losses, gradients of their sum)."""
    options: dict[str, Any] = {"batch": images, "targets": targets, "method": "compute_loss"}
    if isinstance(model, FCOS):
        options["shapes"] = SHAPES
    else:
        corners = np.arange(40)[:, None] + np.array([[0, 0, 20, 20]])
        boxes = jnp.asarray(np.stack([corners] * 2), jnp.float32)
        proposals = Proposals(boxes=boxes, scores=boxes[..., 0], valid=jnp.ones(boxes.shape[:2], bool))
        options |= {"proposals": proposals, "keys": jax.random.split(jax.random.key(0), (2, 2)), "train": False}

    def total(arrays: dict[str, Any]) -> Any:
        losses = model.apply(variables, **arrays, **options)
        return sum(losses.values()), losses

    gradients, losses = jax.grad(total, has_aux=True)(arrays)
    return losses, gradients


def step(name: str, targets: Targets) -> Any:
    model, variables, images, _ = inputs(name)
    return loss_step(model, variables, network(name), images, targets)


@pytest.mark.parametrize("name", [FCOS_NAME, pytest.param(V2_NAME, marks=pytest.mark.ci)])
def test_losses_and_gradients_are_nan_under_jit(name):
    model, _, _, targets = inputs(name)
    allowed = {FCOS_NAME: [0, 1, 3], V2_NAME: [1, 3]}[name]  # as torchvision's heads count them
    assert list(model.target_labels) == list(range(allowed[0], 4))
    for label in allowed:
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(step(name, with_label(targets, label))))
    for label in {-1, 0, 4, 2**31 - 1} - set(allowed):
        losses, gradients = step(name, with_label(targets, label))
        assert all(np.isnan(loss) for loss in losses.values()), label
        for part, leaves in gradients.items():  # each level's offsets have a gradient only where an anchor is positive
            assert any(np.isnan(leaf).any() for leaf in jax.tree.leaves(leaves)), (label, part)


@pytest.mark.parametrize("name", [FCOS_NAME, pytest.param(V2_NAME, marks=pytest.mark.release)])
def test_a_box_without_anchors_is_looked_at_too(name):
    targets = inputs(name)[-1]
    speck = np.array(targets.boxes)
    speck[1, 2] = 3.2, 3.2, 3.3, 3.3
    losses, _ = step(name, with_label(dataclasses.replace(targets, boxes=jnp.asarray(speck)), 4))
    assert all(np.isnan(loss) for loss in losses.values())


@pytest.mark.parametrize("name", [FCOS_NAME, pytest.param(V2_NAME, marks=pytest.mark.ci)])
def test_padding_may_hold_any_label(name):
    targets = inputs(name)[-1]
    assert not targets.valid[0].any()
    expected = step(name, targets)
    for label in (-7, 0, 99):
        found = step(name, with_label(targets, label, image=0))
        jax.tree.map(np.testing.assert_array_equal, found, expected)


@NAMES
def test_an_error_where_labels_can_be_read(name):
    """Without jit, or where jit closes over the targets."""
    model, variables, images, targets = inputs(name)
    bad = with_label(targets, 4)
    first = {FCOS_NAME: 0, V2_NAME: 1}[name]
    message = (
        f"image 1, box 2: label 4 should be from {first} to 3: num_classes=4 counts the background, which is label 0"
    )
    apply = functools.partial(model.apply, rngs={"sampling": jax.random.key(0)})
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda variables: apply(variables, images, bad), variables)
    jax.eval_shape(apply, variables, images, bad)  # these can't be read
    padded = with_label(targets, 99, image=0)
    jax.eval_shape(lambda variables: apply(variables, images, padded), variables)
    half = dataclasses.replace(targets, labels=targets.labels.astype(jnp.float32))
    with pytest.raises(TypeError, match="labels should be integers, got float32"):
        jax.eval_shape(apply, variables, images, half)


class OwnPredictor(nn.Module):
    """Of three classes, which it tells nobody."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x), nn.Dense(12)(x)


def test_a_predictor_of_ones_own():
    model = tiny_model(V2_NAME).clone(num_classes=None, box_predictor=OwnPredictor())
    _, _, images, targets = inputs(V2_NAME)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    apply = functools.partial(model.apply, rngs={"sampling": jax.random.key(0)})
    zero, three = with_label(targets, 0), with_label(targets, 3)
    with pytest.raises(ValueError, match="image 1, box 2: label 0 should be 1 or more"):
        jax.eval_shape(lambda variables: apply(variables, images, zero), variables)
    jax.eval_shape(lambda variables: apply(variables, images, three), variables)  # NaN, if it runs


def test_rows_of_this_process():
    """Of an array divided over processes each looks at its own rows."""
    rows = {4: np.array([[1, 9]]), 5: np.array([[1, 8]])}

    def divided(parts: Any) -> Any:
        shards = [SimpleNamespace(index=(slice(row, row + 1),), data=data) for row, data in parts.items()]
        dtype = next(iter(parts.values())).dtype
        return SimpleNamespace(is_fully_addressable=False, addressable_shards=shards, dtype=dtype)

    valid = {4: np.array([[True, False]]), 5: np.array([[True, True]])}
    with pytest.raises(ValueError, match="image 5, box 1: label 8 should be from 1 to 3"):
        check_targets(divided(rows), divided(valid), range(1, 4))
