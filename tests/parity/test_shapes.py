"""Elongated images at full size, and torchvision's batches, against torchvision."""

from __future__ import annotations

import pytest

import flaxdet
from flaxdet.convert import stages, verify
from tests.parity import sides
from tests.tolerances import BOXES_F64, SCORES_F64

FEW = {"rpn_post_nms_top_n_test": 40}


def assert_same(ours, theirs):
    match = verify.match_detections(ours, theirs, BOXES_F64, SCORES_F64)
    assert match.same, match
    return match


@pytest.mark.whole
@pytest.mark.repeated  # tests/models/test_elongated.py has smaller ones
def test_elongated_at_full_size(name, x64):
    """At 67x1333 a first image would teach torchvision other scales of RoIAlign; strides depart from powers of two."""
    model, variables, theirs = sides.both(name, dtype="float64", **sides.known(name, FEW))
    image = sides.crop("flower", *((67, 1333) if sides.has_proposals(name) else (1333, 40)))
    (expected,), _ = stages.run_reference(theirs, [image], keep_stages=False)
    (found,) = flaxdet.predict(model, variables, [image])
    match = assert_same(found, expected)
    assert match.count > 5


@pytest.mark.ci  # inference/test_predict.py has the shared canvas in every run
@pytest.mark.repeated
def test_torchvisions_batch(name, x64):
    """canvas="batch" reproduces what torchvision answers for this very list of images."""
    model, variables, theirs = sides.both(name, dtype="float64", min_size=96, max_size=160, **sides.known(name, FEW))
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
