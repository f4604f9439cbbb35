"""Options that no detector can have: each is refused where it is given, by one line that names part and option."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flaxdet.models import (
    FCOS,
    FasterRCNN,
    FastRCNNConvFCHead,
    FastRCNNPredictor,
    FCOSHead,
    MultiScaleRoIAlign,
    RPNHead,
    TwoMLPHead,
)
from flaxdet.nn import FeaturePyramidNetwork
from flaxdet.ops import AnchorGenerator
from tests.models.small import CLASSES, OwnRPNHead, Plain, faster_rcnn, fcos

FCOS_LEAST = {"num_classes": 1, "topk_candidates": 1, "detections_per_img": 0, "trainable_backbone_layers": 0}
RCNN_LEAST = {
    "num_classes": 2,
    "rpn_pre_nms_top_n_train": 0,
    "rpn_pre_nms_top_n_test": 1,
    "rpn_post_nms_top_n_train": 0,
    "rpn_post_nms_top_n_test": 1,
    "rpn_batch_size_per_image": 0,
    "box_batch_size_per_image": 1,
    "box_detections_per_img": 0,
    "trainable_backbone_layers": 0,
}
LEAST = [(FCOS, FCOS_LEAST), (FasterRCNN, RCNN_LEAST)]
COUNTS = [(kind, name, least) for kind, options in LEAST for name, least in options.items()]


@pytest.mark.parametrize(("kind", "name", "least"), COUNTS)
def test_counts(kind, name, least):
    def make(value):
        return kind(Plain(), **{"num_classes": CLASSES, name: value})

    assert getattr(make(least), name) == getattr(make(np.int64(least)), name) == least
    with pytest.raises(ValueError, match=f"^{kind.__name__}: {name} should be at least {least}, got {least - 1}$"):
        make(least - 1)
    for value in (float(least), "3", True, *([] if name == "num_classes" else [None])):
        with pytest.raises(TypeError, match=f"^{kind.__name__}: {name} should be a whole number, got "):
            make(value)


NUMBERS = [
    *((FCOS, name) for name in ("score_thresh", "nms_thresh", "center_sampling_radius")),
    *((FasterRCNN, f"{part}_{name}") for part in ("rpn", "box") for name in ("score_thresh", "nms_thresh")),
    *((FasterRCNN, f"{part}_{name}") for part in ("rpn", "box") for name in ("positive_fraction", "fg_iou_thresh")),
]


@pytest.mark.parametrize(("kind", "name"), NUMBERS)
def test_numbers(kind, name):
    for value in (None, "0.5", (0.5, 0.5)):
        with pytest.raises(TypeError, match=f"{kind.__name__}: {name} should be a number, got "):
            kind(Plain(), CLASSES, **{name: value})
    with pytest.raises(ValueError, match=f"{kind.__name__}: {name} should be a number.*, got nan"):
        kind(Plain(), CLASSES, **{name: float("nan")})
    assert getattr(kind(Plain(), CLASSES, **{name: np.float32(0.75)}), name) == 0.75


RANGES: list[tuple[type, dict[str, Any], type[Exception], str]] = [
    (FCOS, {"center_sampling_radius": -1}, ValueError, "center_sampling_radius should be a number of at least 0"),
    (
        FasterRCNN,
        {"rpn_positive_fraction": 2},
        ValueError,
        "rpn_positive_fraction should be a number from 0 to 1",
    ),
    (FasterRCNN, {"box_positive_fraction": -0.1}, ValueError, "box_positive_fraction should be a number from 0 to 1"),
    (FasterRCNN, {"rpn_fg_iou_thresh": 0.1}, ValueError, "rpn_bg_iou_thresh should not exceed rpn_fg_.*0.3 and 0.1"),
    (FasterRCNN, {"box_bg_iou_thresh": 0.9}, ValueError, "box_bg_iou_thresh should not exceed box_fg_.*0.9 and 0.5"),
    (FasterRCNN, {"bbox_reg_weights": (1, 2, 3)}, ValueError, "bbox_reg_weights: weights must be four numbers"),
    (FasterRCNN, {"bbox_reg_weights": ()}, ValueError, "bbox_reg_weights: weights must be four numbers"),
    (FasterRCNN, {"bbox_reg_weights": 5}, ValueError, "bbox_reg_weights: "),
    (FasterRCNN, {"min_size": "800"}, TypeError, "min_size should be a number"),
    (FCOS, {"max_size": None}, TypeError, "max_size should be a number"),
    (FCOS, {"max_size": (5, 6)}, TypeError, "max_size should be one number"),
    (FCOS, {"image_mean": 0.5}, ValueError, "image_mean and image_std should have 3 values"),
    (FCOS, {"fixed_size": "ab"}, TypeError, "fixed_size should be a number"),
    (FCOS, {"backbone": Plain}, TypeError, "backbone should be a flax.linen Module"),
    (FCOS, {"backbone": Plain(0)}, ValueError, "Plain: out_channels should be at least 1, got 0"),
    (FCOS, {"backbone": Plain(None)}, TypeError, "Plain: out_channels should be a whole number, got None"),
]


@pytest.mark.parametrize(("kind", "options", "error", "message"), RANGES)
def test_other_options(kind, options, error, message):
    with pytest.raises(error, match=message):
        kind(**{"backbone": Plain(), "num_classes": CLASSES} | options)


def part(kind: type, *args: Any, **options: Any):
    """kind(*args, **options), made when called."""
    return lambda: kind(*args, **options)


PARTS = [
    (part(FCOSHead, 32, 0, 5), ValueError, "FCOSHead: num_anchors should be at least 1, got 0"),
    (part(FCOSHead, 32, 1, 0), ValueError, "FCOSHead: num_classes should be at least 1, got 0"),
    (part(FCOSHead, 32, 1, 5, num_convs=-1), ValueError, "FCOSHead: num_convs should be at least 0, got -1"),
    (
        part(FCOSHead, 32, 1, 5, prior_probability=2),
        ValueError,
        "FCOSHead: prior_probability should lie between 0 and",
    ),
    (part(FCOSHead, 32, 1, 5, prior_probability=0), ValueError, "FCOSHead: prior_probability should lie between"),
    (part(RPNHead, 0, 3), ValueError, "RPNHead: in_channels should be at least 1, got 0"),
    (part(RPNHead, 32, [3]), TypeError, "RPNHead: num_anchors should be a whole number"),
    (part(RPNHead, 32, 3, -1), ValueError, "RPNHead: conv_depth should be at least 0"),
    (part(TwoMLPHead, 0, 4), ValueError, "TwoMLPHead: in_channels should be at least 1"),
    (part(TwoMLPHead, 4, 0), ValueError, "TwoMLPHead: representation_size should be at least 1"),
    (part(FastRCNNPredictor, 0, 5), ValueError, "FastRCNNPredictor: in_channels should be at least 1"),
    (part(FastRCNNPredictor, 8, 1), ValueError, "FastRCNNPredictor: num_classes should be at least 2, got 1"),
    (part(FastRCNNConvFCHead, (8, 7), (4,), (4,)), ValueError, "input_size should be 3 whole numbers"),
    (
        part(FastRCNNConvFCHead, (8, 7, 7), (4, 0), (4,)),
        ValueError,
        r"FastRCNNConvFCHead: conv_layers\[1\] should be",
    ),
    (part(FastRCNNConvFCHead, (8, 7, 7), (), 4), TypeError, "fc_layers should be a sequence of whole numbers, got 4"),
    (part(MultiScaleRoIAlign, "p2"), TypeError, "featmap_names should be names of maps, got 'p2'"),
    (part(MultiScaleRoIAlign, output_size=0), ValueError, r"MultiScaleRoIAlign: output_size\[0\] should be at least 1"),
    (part(MultiScaleRoIAlign, output_size=(7,)), ValueError, "output_size should be 2 whole numbers"),
    (part(MultiScaleRoIAlign, output_size=7.0), TypeError, r"output_size\[0\] should be a whole number, got 7.0"),
    (part(MultiScaleRoIAlign, sampling_ratio=0), ValueError, "MultiScaleRoIAlign: sampling_ratio should be at least 1"),
    (
        part(MultiScaleRoIAlign, canonical_scale=0),
        ValueError,
        "MultiScaleRoIAlign: canonical_scale should be at",
    ),
    (part(FeaturePyramidNetwork, 0), ValueError, "FeaturePyramidNetwork: out_channels should be at least 1, got 0"),
    (part(AnchorGenerator, 32), TypeError, "AnchorGenerator: sizes should be numbers, or numbers for every level"),
    (part(AnchorGenerator, ((32,),), "1"), TypeError, "AnchorGenerator: aspect_ratios should be numbers, or"),
    (part(AnchorGenerator, ((32, None),)), TypeError, "AnchorGenerator: sizes should be numbers, or"),
]


@pytest.mark.parametrize(("make", "error", "message"), PARTS)
def test_parts(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_sequences_of_every_kind_are_one_value():
    """Lists and numpy arrays make parts that are equal and static under jit."""
    head = FastRCNNConvFCHead((8, 7, 7), (4, 4), (16,))
    assert FastRCNNConvFCHead([8, 7, 7], np.array([4, 4]), [16]) == head  # pyright: ignore[reportArgumentType]
    assert hash(FastRCNNConvFCHead((8, 7, 7), [4, 4], (16,))) == hash(head)  # pyright: ignore[reportArgumentType]
    anchors = AnchorGenerator(((8.0,), (16.0,)), ((0.5, 1.0),) * 2)
    for sizes in (np.array([[8.0], [16.0]]), [np.array([8.0]), [16.0]], np.array([8.0, 16.0])):
        assert AnchorGenerator(sizes, np.array([0.5, 1.0])) == anchors  # pyright: ignore[reportArgumentType]
    assert hash(AnchorGenerator(np.array([8.0, 16.0]), [0.5, 1.0])) == hash(anchors)  # pyright: ignore[reportArgumentType]
    assert MultiScaleRoIAlign(output_size=np.int64(7)).output_size == (7, 7)  # pyright: ignore[reportArgumentType]
    assert hash(fcos(Plain(), min_size=np.array([96, 128]))) == hash(fcos(Plain(), min_size=(96, 128)))


# Anchors


UNEVEN = AnchorGenerator(((16, 32), (32,), (64,)), ((1.0,),) * 3)


def test_different_numbers_of_anchors_a_level():
    with pytest.raises(ValueError, match=r"rpn_anchor_generator should .* num_anchors=2, and has \[2, 1, 1\]"):
        FasterRCNN(Plain(), CLASSES, rpn_anchor_generator=UNEVEN)
    with pytest.raises(ValueError, match=r"the rpn_head predicts, num_anchors=4, and has \[3, 3, 3\]"):
        faster_rcnn(Plain(), rpn_head=RPNHead(32, 4))
    assert faster_rcnn(Plain(), rpn_head=OwnRPNHead(), rpn_anchor_generator=UNEVEN).rpn_anchor_generator == UNEVEN
    uneven = AnchorGenerator(((8,), (16, 32), (64,)), ((1.0,),) * 3)
    with pytest.raises(ValueError, match=r"num_anchors_per_location\(\)\[1\] should be 1 instead of 2"):
        fcos(Plain(), anchor_generator=uneven)
    with pytest.raises(ValueError, match="head has num_anchors=2, and FCOS has one anchor a location"):
        fcos(Plain(), head=FCOSHead(32, 2, CLASSES))
