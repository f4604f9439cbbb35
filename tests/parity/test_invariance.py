"""The answer for an image depends on nothing but the image: not on its bucket, not on its neighbours."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from flaxdet.convert import verify
from flaxdet.convert.stages import run
from flaxdet.predict import jitted_detect, unpad
from flaxdet.transform import transform
from tests.parity import sides
from tests.tolerances import BOXES_BF16, CANVAS_STAGE_F64, INVARIANCE_F64, SCORES_BF16, SHARE_BF16

FEW = {sides.FCOS_NAME: {}, sides.V2_NAME: {"rpn_post_nms_top_n_test": 60}}
IMAGE = (100, 150)


@pytest.fixture
def model_and_variables(name, x64):
    model, variables, _ = sides.both(name, 18, dtype="float64", min_size=96, max_size=160, **FEW[name])
    return model, variables


def test_bucket_and_neighbours(model_and_variables):
    model, variables = model_and_variables
    image = sides.crop("china", *IMAGE)
    alone_batch = transform([image], model.transform, dtype=np.float64)
    assert alone_batch.canvas is None
    (alone,) = unpad(jitted_detect(model, variables, alone_batch))
    assert len(alone["scores"]) > 10

    neighbours = [sides.crop("grace_hopper", 150, 100), image, sides.crop("flower", 50, 120)]
    for batch, index in (
        (transform([image], model.transform, bucket=(192, 224), dtype=np.float64), 0),
        (transform([image], model.transform, bucket=(96, 256), dtype=np.float64), 0),
        (transform(neighbours, model.transform, dtype=np.float64), 1),
    ):
        found = unpad(jitted_detect(model, variables, batch))[index]
        assert verify.match_detections(found, alone, INVARIANCE_F64, INVARIANCE_F64).same
        np.testing.assert_array_equal(found["labels"], alone["labels"])


def test_rubbish_beyond_the_canvas_is_not_seen(model_and_variables):
    """Every stage, cropped to the canvas, equals the stage of the image alone: the first to differ is at fault."""
    model, variables = model_and_variables
    image = sides.crop("china", *IMAGE)
    _, alone = run(model, variables, transform([image], model.transform, dtype=np.float64))
    _, padded = run(model, variables, transform([image], model.transform, bucket=(192, 224), dtype=np.float64))
    compared = 0
    for stage, expected in alone.items():
        if expected.ndim == 4 and stage != "roi_features":
            found = padded[stage][:, : expected.shape[1], : expected.shape[2]]
        elif padded[stage].shape == expected.shape:
            found = padded[stage]
        else:
            continue  # flattened head outputs have the bucket's cells; postprocessing shows them
        compared += 1
        np.testing.assert_allclose(
            found, expected, rtol=0, atol=CANVAS_STAGE_F64 * np.abs(expected).max(), err_msg=stage
        )
    assert compared >= 9


def test_float32_bucket(name):
    model, variables, _ = sides.both(name, 18, min_size=96, max_size=160, **FEW[name])
    image = sides.crop("china", *IMAGE)
    alone, padded = (
        unpad(jitted_detect(model, variables, transform([image], model.transform, bucket=bucket)))[0]
        for bucket in (None, (192, 224))
    )
    assert verify.match_detections(padded, alone, *verify.TOLERANCES["float32"]).same


def test_bfloat16(name):
    """bfloat16 computes, but boxes and scores are float32, and the answer stays near float32's."""
    model, variables, _ = sides.both(name, 18, min_size=96, max_size=160, **FEW[name])
    half = sides.flax_detector(name, 18, 11, dtype=jax.numpy.bfloat16, min_size=96, max_size=160, **FEW[name])
    batch = transform([sides.crop("china", *IMAGE)], model.transform)
    found = jitted_detect(half, variables, batch)
    assert found.boxes.dtype == found.scores.dtype == np.float32
    (found,), (expected,) = unpad(found), unpad(jitted_detect(model, variables, batch))
    match = verify.match_detections(found, expected, BOXES_BF16, SCORES_BF16)
    assert match.matched >= SHARE_BF16 * match.count
    _, state = jax.eval_shape(lambda *args: half.apply(*args, mutable=["intermediates"]), variables, batch)
    assert state["intermediates"]["p3"][0].dtype == jax.numpy.bfloat16
