"""Losses depend neither on the bucket nor on padded targets; and what they may be asked for together."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from flaxdet.transform import transform, transform_targets
from tests.parity import sides
from tests.parity.test_losses import EXHAUSTIVE, IMAGES, SMALL, targets_of
from tests.tolerances import INVARIANCE_F64

CASE = "several boxes"


@pytest.fixture
def model_and_variables(name, x64):
    options = SMALL | (EXHAUSTIVE | {"rpn_post_nms_top_n_test": 40} if name == sides.V2_NAME else {})
    model, variables, _ = sides.both(name, 18, 11, dtype="float64", **options)
    return model, variables


def test_bucket_and_padding(model_and_variables):
    model, variables = model_and_variables
    images = [sides.crop(photo, *size) for photo, size in IMAGES.items()]

    @jax.jit
    def step(variables, batch, targets):
        return model.apply(
            variables,
            batch,
            targets,
            train=True,
            with_detections=True,
            rngs={"sampling": jax.random.key(0)},
            mutable=["batch_stats"],
        )

    results = []
    for bucket, slots in ((None, 4), ((192, 224), 9)):
        batch = transform(images, model.transform, bucket=bucket, dtype=np.float64)
        assert batch.canvas is not None  # a landscape and a portrait: each has its own
        targets = transform_targets(targets_of(CASE), batch, max_boxes=slots)
        results.append(step(variables, batch, targets))
    ((losses, detections), updates), ((other_losses, other_detections), other_updates) = results
    for key, loss in losses.items():
        np.testing.assert_allclose(other_losses[key], loss, rtol=INVARIANCE_F64, err_msg=key)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=INVARIANCE_F64, atol=INVARIANCE_F64)  # noqa: E731
    jax.tree.map(close, other_updates, updates)
    close(other_detections.boxes, detections.boxes)
    np.testing.assert_array_equal(other_detections.labels, detections.labels)
    assert int(detections.valid.sum()) > 10


def test_validation_losses_and_detections(model_and_variables):
    """train=False: running statistics, nothing written, and the detections are those without targets."""
    model, variables = model_and_variables
    images = [sides.crop("china", *IMAGES["china"])]
    batch = transform(images, model.transform, dtype=np.float64)
    targets = transform_targets(targets_of(CASE)[:1], batch)

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
    jax.tree.map(np.testing.assert_array_equal, detections, detections_alone)
    for key, loss in losses.items():
        assert np.isfinite(loss)
        np.testing.assert_allclose(losses_alone[key], loss, rtol=INVARIANCE_F64)
