"""Losses depend neither on the bucket nor on padded targets; and what they may be asked for together."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from flaxdet.convert.state_dict import abstract_variables
from flaxdet.images.transform import transform, transform_targets
from flaxdet.models import FastRCNNConvFCHead
from tests.drawn import drawn
from tests.tiny import FCOS_NAME, V2_NAME, tiny_model
from tests.tolerances import INVARIANCE_F64

# What is drawn at random would follow the number of anchors, which the bucket decides: nothing is left to chance.
EXHAUSTIVE = {"rpn_batch_size_per_image": 1_000_000, "box_batch_size_per_image": 400}
TARGETS = [
    {"boxes": np.asarray([[10.0, 12, 60, 50], [30.5, 20.25, 78, 58]]), "labels": np.asarray([1, 3])},
    {"boxes": np.asarray([[5.0, 5, 55, 75]]), "labels": np.asarray([2])},
]


@functools.cache
def images():
    """A landscape and a portrait: each has its own canvas."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((60, 80), (80, 60))]


def model_and_variables(name):
    """With BatchNorm in the backbone and, for Faster R-CNN, in the box head."""
    model = tiny_model(name, dtype=np.float64)
    if name == V2_NAME:
        head = FastRCNNConvFCHead((32, 7, 7), (16,), (32,), use_norm=True, dtype=np.float64)
        model = model.clone(box_head=head, **EXHAUSTIVE)
    return model, drawn(abstract_variables(model))


@functools.partial(jax.jit, static_argnums=0)
def step(model, variables, batch, targets):
    options = {"train": True, "with_detections": True, "mutable": ["batch_stats"]}
    return model.apply(variables, batch, targets, rngs={"sampling": jax.random.key(0)}, **options)


@pytest.mark.ci  # parity/test_losses compares losses in canvases, parity/test_invariance detections in a bucket
@pytest.mark.parametrize("name", [FCOS_NAME, V2_NAME])
def test_bucket_and_padding(name, x64):
    model, variables = model_and_variables(name)
    results = []
    for bucket, slots in ((None, 2), ((128, 160), 9)):
        batch = transform(images(), model.transform, bucket=bucket, dtype=np.float64)
        assert batch.canvas is not None
        assert not np.array_equal(*batch.canvas)
        results.append(step(model, variables, batch, transform_targets(TARGETS, batch, model=model, max_boxes=slots)))
    ((losses, detections), updates), ((other_losses, other_detections), other_updates) = results
    for key, loss in losses.items():
        assert loss > 0
        np.testing.assert_allclose(other_losses[key], loss, rtol=INVARIANCE_F64, err_msg=key)
    close = functools.partial(np.testing.assert_allclose, rtol=INVARIANCE_F64, atol=INVARIANCE_F64)
    jax.tree.map(close, other_updates, updates)
    close(other_detections.boxes, detections.boxes)
    np.testing.assert_array_equal(other_detections.labels, detections.labels)
    assert int(detections.valid.sum()) > 10


@pytest.mark.parametrize("name", [FCOS_NAME, pytest.param(V2_NAME, marks=pytest.mark.release)])
def test_validation_losses_and_detections(name, x64):
    """train=False: running statistics, nothing written, and the detections are those without targets."""
    model, variables = model_and_variables(name)
    batch = transform(images()[:1], model.transform, dtype=np.float64)
    targets = transform_targets(TARGETS[:1], batch, model=model)

    @jax.jit
    def both(variables, batch, targets):
        rngs = {"sampling": jax.random.key(0)}
        return (
            model.apply(variables, batch, targets, with_detections=True, rngs=rngs),
            model.apply(variables, batch, targets, rngs=rngs),
            model.apply(variables, batch),
        )

    (losses, detections), losses_alone, detections_alone = both(variables, batch, targets)
    assert losses.keys() == losses_alone.keys()
    assert detections.valid.any()
    jax.tree.map(np.testing.assert_array_equal, detections, detections_alone)
    for key, loss in losses.items():
        assert np.isfinite(loss)
        np.testing.assert_allclose(losses_alone[key], loss, rtol=INVARIANCE_F64)
