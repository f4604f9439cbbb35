"""Images of every shape against torchvision: alone, as canvases inside one bucket, and in torchvision's batches."""

from __future__ import annotations

import numpy as np
import pytest

import flaxdet
from flaxdet.convert import stages, verify
from flaxdet.predict import jitted_detect, unpad
from flaxdet.transform import transform
from tests.parity import sides
from tests.tolerances import BOXES_F64, SCORES_F64

FEW = {sides.FCOS_NAME: {}, sides.V2_NAME: {"rpn_post_nms_top_n_test": 60}}
SHAPES = {
    "landscape": (100, 150),
    "portrait": (150, 100),
    "square": (128, 128),
    "97 rows": (97, 160),
    "1x1": (1, 1),
    "tiny": (3, 5),
}


def assert_same(ours, theirs):
    match = verify.match_detections(ours, theirs, BOXES_F64, SCORES_F64)
    assert match.same, match
    return match


@pytest.mark.parametrize("shape", SHAPES)
def test_canvas_in_a_bucket(name, shape, x64):
    """One compile serves them all: each sits on its own canvas inside a bucket of 192x192."""
    model, variables, theirs = sides.both(name, 18, dtype="float64", min_size=96, max_size=160, **FEW[name])
    image = sides.crop("china", *SHAPES[shape])
    (expected,), _ = stages.run_reference(theirs, [image], keep_stages=False)
    batch = transform([image], model.transform, bucket=(192, 192), dtype=np.float64)
    assert batch.canvas is not None
    (found,) = unpad(jitted_detect(model, variables, batch))
    match = assert_same(found, expected)
    assert match.count >= 3  # v2 finds just 3 in 1x1, which is one colour throughout


@pytest.mark.parametrize("shape", [(67, 1333), (1333, 40)])
def test_elongated_at_full_size(name, shape, x64):
    """RoIAlign infers scales of 1/2 to 1/16 at 67x1333, and strides depart from powers of two."""
    model, variables, theirs = sides.both(name, 18, dtype="float64", **FEW[name])
    image = sides.crop("flower", *shape)
    (expected,), _ = stages.run_reference(theirs, [image], keep_stages=False)
    (found,) = flaxdet.predict(model, variables, [image])
    match = assert_same(found, expected)
    assert match.count > 3


def test_torchvisions_batch(name, x64):
    """canvas="batch" reproduces what torchvision answers for this very list of images."""
    model, variables, theirs = sides.both(name, 18, dtype="float64", min_size=96, max_size=160, **FEW[name])
    images = [
        sides.crop("china", 100, 150),
        sides.crop("grace_hopper", 150, 100),
        sides.crop("flower", 40, 120),
    ]
    expected, _ = stages.run_reference(theirs, images, keep_stages=False)
    found = flaxdet.predict(model, variables, images, canvas="batch")
    for ours, reference in zip(found, expected, strict=True):
        assert_same(ours, reference)
    alone, _ = stages.run_reference(theirs, images[2:], keep_stages=False)
    # in torchvision an image's answer depends on its neighbours: without that this test shows nothing
    assert not verify.match_detections(found[2], alone[0], BOXES_F64, SCORES_F64).same


def test_floats_and_float32(name):
    """Images as floats in [0, 1] give what their uint8 originals give, also in float32."""
    model, variables, theirs = sides.both(name, 18, min_size=96, max_size=160, **FEW[name])
    image = sides.crop("china", 100, 150)
    (expected,), _ = stages.run_reference(theirs, [image], keep_stages=False)
    for given in (image, image.astype(np.float32) / 255):
        (found,) = flaxdet.predict(model, variables, [given])
        assert verify.match_detections(found, expected, *verify.TOLERANCES["float32"]).same
        assert found["boxes"].dtype == found["scores"].dtype == np.float32
        assert found["labels"].dtype == np.int32
