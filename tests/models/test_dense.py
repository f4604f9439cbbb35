"""The parts of a detector of one stage, put together as RetinaNet's: torchvision's detections and matches."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdet.convert import verify
from flaxdet.inference.detect import unpad
from flaxdet.models.dense import DenseDetector
from flaxdet.ops import AnchorGenerator, BoxCoder, box_iou
from flaxdet.ops.matching import match
from tests.models.small import CLASSES, Plain, TwoConvHead, batch_of
from tests.tolerances import BOXES_F64, SCORES_F64

torch = pytest.importorskip("torch")

ANCHORS = ((16, 20), (32, 40), (64, 80)), ((0.5, 1.0, 2.0),) * 3
SHAPES = ((8, 12), (4, 6), (2, 3))  # of Plain's maps, for 64 x 96 pixels
COUNTS = tuple(6 * h * w for h, w in SHAPES)


class RetinaNet(DenseDetector):
    loss_names = ("classification", "bbox_regression")
    box_coder = BoxCoder((1.0, 1.0, 1.0, 1.0))

    def scores(self, outputs):
        return nn.sigmoid(outputs["cls_logits"])

    def match(self, anchors, admitted, boxes, valid, counts):
        overlaps = box_iou(boxes, anchors)
        thresholds: dict[str, Any] = {"high_threshold": 0.5, "low_threshold": 0.4, "allow_low_quality_matches": True}
        return match(overlaps, **thresholds, valid_gt=valid, valid=admitted)


@pytest.fixture
def both(x64):
    """Our model and torchvision's, which never runs its network."""
    from flaxdet.convert import reference

    detection = reference.torchvision().models.detection
    backbone = torch.nn.Identity()
    backbone.out_channels = 8
    theirs = detection.retinanet.RetinaNet(
        backbone, CLASSES, anchor_generator=detection.anchor_utils.AnchorGenerator(*ANCHORS)
    ).eval()
    options = {"anchor_generator": AnchorGenerator(*ANCHORS), "head": TwoConvHead(), "dtype": jnp.float64}
    return RetinaNet(Plain(), CLASSES, **options), theirs


def test_detections(both):
    model, theirs = both
    rng = np.random.default_rng(0)
    outputs = {
        "cls_logits": rng.normal(-3, 2, (2, sum(COUNTS), CLASSES)),
        "bbox_regression": rng.normal(0, 0.5, (2, sum(COUNTS), 4)),
    }
    batch = batch_of()
    anchors = our_anchors(model)
    split = {name: list(torch.from_numpy(x).split(COUNTS, dim=1)) for name, x in outputs.items()}
    levels = [list(torch.from_numpy(anchors).split(COUNTS))] * 2
    expected = theirs.postprocess_detections(split, levels, [(64, 96)] * 2)
    detect = jax.jit(lambda outputs: model.apply({}, outputs, batch, SHAPES, method="postprocess"))
    found = unpad(detect(outputs))
    for ours, reference in zip(found, expected, strict=True):
        reference = {name: value.numpy() for name, value in reference.items()}
        assert verify.match_detections(ours, reference, BOXES_F64, SCORES_F64).same
        assert 100 < len(ours["scores"]) <= 300


@functools.partial(jax.jit, static_argnums=0)
def anchors_of_levels(generator):
    return generator(np.asarray((64, 96)), np.asarray(SHAPES), SHAPES, jnp.float64)


def our_anchors(model):
    return np.concatenate(anchors_of_levels(model.anchor_generator))


def test_matches(both):
    model, theirs = both
    anchors, boxes = our_anchors(model), np.asarray([[10, 5, 40, 33], [0, 0, 90, 60], [50, 20, 62, 26.0]])
    ious = torch.from_numpy(np.array(jax.jit(box_iou)(boxes, anchors)))
    expected = theirs.proposal_matcher(ious).numpy()
    run = jax.jit(lambda *arrays: model.match(*arrays, COUNTS))
    found = run(anchors, np.ones(len(anchors), bool), boxes, np.ones(3, bool))
    np.testing.assert_array_equal(found, expected)
    assert set(expected) == {-2, -1, 0, 1, 2}


def test_a_part_that_is_missing_is_named():
    model = DenseDetector(Plain(), CLASSES, anchor_generator=AnchorGenerator(*ANCHORS), head=TwoConvHead())
    with pytest.raises(NotImplementedError, match="DenseDetector should define box_coder"):
        _ = model.box_coder
    for part in ("scores", "match", "matched_losses"):
        with pytest.raises(NotImplementedError, match=f"DenseDetector should define {part}"):
            getattr(model, part)(*(None,) * (1 if part == "scores" else 5))
