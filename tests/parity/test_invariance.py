"""The answer for an image depends on nothing but the image: not on its bucket, not on its neighbours."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from flaxdet.convert import stages, verify
from flaxdet.images.transform import transform
from flaxdet.inference.detect import jitted_detect, unpad
from tests.parity import sides
from tests.tolerances import (
    BOXES_BF16,
    BOXES_F64,
    CANVAS_STAGE_F64,
    INVARIANCE_F64,
    SCORES_BF16,
    SCORES_F64,
    SHARE_BF16,
)

SMALL = {"min_size": 80, "max_size": 128}
FEW = {"rpn_post_nms_top_n_test": 60}
SHAPES = {
    "landscape": (100, 150),
    "portrait": (150, 100),
    "square": (128, 128),
    "97 rows": (97, 160),
    "1x1": (1, 1),
    "tiny": (3, 5),
}
IMAGE = SHAPES["landscape"]


@pytest.fixture(scope="module")
def in_company():
    """By the builder's name: both models, and what ours gives for all shapes as one batch in one bucket, float64."""
    made: dict[str, Any] = {}

    def get(name: str):
        if name not in made:
            model, variables, theirs = sides.both(name, dtype="float64", **SMALL, **sides.known(name, FEW))
            images = [sides.crop("china", *shape) for shape in SHAPES.values()]
            batch = transform(images, model.transform, bucket=(128, 128), dtype=np.float64)
            assert batch.canvas is not None
            detections, sown = jax.device_get(stages._apply(model, variables, batch))
            made[name] = model, variables, theirs, unpad(detections), sown
        return made[name]

    return get


@pytest.mark.repeated
@pytest.mark.parametrize("shape", SHAPES)
def test_in_a_bucket_among_others(name, shape, in_company, x64):
    """Each image on its own canvas, its neighbours on theirs: torchvision's answer for the image alone."""
    _, _, theirs, found, _ = in_company(name)
    (expected,), _ = stages.run_reference(theirs, [sides.crop("china", *SHAPES[shape])], keep_stages=False)
    match = verify.match_detections(found[list(SHAPES).index(shape)], expected, BOXES_F64, SCORES_F64)
    assert match.same, match
    assert match.count >= (1 if shape == "1x1" else 3), match  # 1x1 is one colour throughout


@pytest.mark.repeated
def test_every_stage(name, in_company, x64):
    """Every stage, cropped to the canvas, equals the stage of the image alone: the first to differ is at fault."""
    model, variables, _, found, sown = in_company(name)
    batch = transform([sides.crop("china", *IMAGE)], model.transform, dtype=np.float64)
    assert batch.canvas is None
    detections, alone = jax.device_get(stages._apply(model, variables, batch))
    compared = set()
    for stage, expected in alone.items():
        row = sown[stage]
        if stage == "proposals":
            expected, row = expected.boxes, row.boxes
        row = row[list(SHAPES).index("landscape")][None]
        if expected.ndim == 4:
            row = row[:, : expected.shape[1], : expected.shape[2]]
        elif row.shape != expected.shape:
            continue  # flattened head outputs have the bucket's cells; postprocessing shows them
        compared.add(stage)
        bar = CANVAS_STAGE_F64 * np.abs(expected).max()
        np.testing.assert_allclose(row, expected, rtol=0, atol=bar, err_msg=stage)
    later = {"proposals", "roi_features", "class_scores"} & model._own_stages
    assert compared >= {"c2", "c3", "c4", "c5", *sides.levels_of(model), *later}

    (expected,) = unpad(detections)
    assert len(expected["scores"]) > 5  # the image has 80 x 120 pixels (above 10 at 96 x 144)
    own = found[list(SHAPES).index("landscape")]
    assert verify.match_detections(own, expected, INVARIANCE_F64, INVARIANCE_F64).same
    np.testing.assert_array_equal(own["labels"], expected["labels"])


@pytest.mark.ci  # the tests above show it in float64
@pytest.mark.repeated
def test_float32_in_a_bucket(name):
    """float32, of uint8 pixels and of the same as floats in [0, 1]."""
    model, variables, theirs = sides.both(name, **SMALL, **sides.known(name, FEW))
    image = sides.crop("china", *IMAGE)
    (expected,), _ = stages.run_reference(theirs, [image], keep_stages=False)
    for given in (image, image.astype(np.float32) / 255):
        batch = transform([given], model.transform, bucket=(160, 160))
        (found,) = unpad(jitted_detect(model, variables, batch))
        assert verify.match_detections(found, expected, *verify.TOLERANCES["float32"]).same
        assert found["boxes"].dtype == found["scores"].dtype == np.float32
        assert found["labels"].dtype == np.int32


@pytest.mark.ci  # nn/test_bfloat16_sums.py and inference/test_predictor.py compute in bfloat16 in every run
@pytest.mark.repeated
def test_bfloat16(name):
    """bfloat16 computes, but boxes and scores are float32, and the answer stays near torchvision's in float32."""
    _, variables, theirs = sides.both(name, **SMALL, **sides.known(name, FEW))
    half = sides.flax_detector(name, dtype=jax.numpy.bfloat16, **SMALL, **sides.known(name, FEW))
    image = sides.crop("china", *IMAGE)
    found = jitted_detect(half, variables, transform([image], half.transform))
    assert found.boxes.dtype == found.scores.dtype == np.float32
    (expected,), _ = stages.run_reference(theirs, [image], keep_stages=False)
    match = verify.match_detections(unpad(found)[0], expected, BOXES_BF16, SCORES_BF16)
    assert match.matched >= SHARE_BF16 * match.count
