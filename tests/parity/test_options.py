"""Default and unusual keyword arguments against torchvision, float64, on a ResNet-18."""

from __future__ import annotations

import pytest

from flaxdet.convert import verify
from tests.parity import sides
from tests.tolerances import BOXES_F64, SCORES_F64

SMALL = {"min_size": 128, "max_size": 200}
FCOS_CASES = {
    "defaults": {},
    "one class": {"num_classes": 1},
    "thresholds": {"score_thresh": 0.3, "nms_thresh": 0.3},
    "every candidate": {"score_thresh": 0.0, "nms_thresh": 0.9, "detections_per_img": 300},
    "top n": {"topk_candidates": 7, "detections_per_img": 5},
    "zero detections": {"score_thresh": 0.999},
    "max_size binds": {"min_size": 200, "max_size": 150},
    "several min_size": {"min_size": (96, 160, 128)},
    "size_divisible": {"size_divisible": 50},
    "no padding": {"size_divisible": 1},
    "fixed_size": {"fixed_size": (160, 96)},
    "normalisation": {"image_mean": [0.2, 0.5, 0.7], "image_std": [0.5, 0.4, 0.3]},
}
V2_CASES = {
    "defaults": {},
    "two classes": {"num_classes": 2},
    "thresholds": {"box_score_thresh": 0.15, "box_nms_thresh": 0.3, "rpn_nms_thresh": 0.5},
    "every candidate": {"box_score_thresh": 0.0, "box_nms_thresh": 0.9, "box_detections_per_img": 300},
    "rpn_score_thresh": {"rpn_score_thresh": 0.6},
    "top n": {
        "rpn_pre_nms_top_n_test": 20,
        "rpn_post_nms_top_n_test": 15,
        "box_detections_per_img": 5,
    },
    "zero detections": {"box_score_thresh": 0.999},
    "zero proposals": {"rpn_score_thresh": 1.1},
    "bbox_reg_weights": {"bbox_reg_weights": (5.0, 4.0, 3.0, 2.0)},
    "max_size binds": {"min_size": 200, "max_size": 150},
    "size_divisible": {"size_divisible": 50},
    "fixed_size": {"fixed_size": (160, 96)},
    "normalisation": {"image_mean": [0.2, 0.5, 0.7], "image_std": [0.5, 0.4, 0.3]},
}
NOTHING = {"zero detections", "zero proposals"}


def check(name: str, case: str, options: dict) -> None:
    options = SMALL | options
    if name == sides.V2_NAME:
        options = {"rpn_post_nms_top_n_test": 60} | options
    num_classes = options.pop("num_classes", 11)
    model, variables, theirs = sides.both(name, 18, num_classes, dtype="float64", **options)
    found = verify.compare(model, variables, theirs, [sides.photo("china")])
    (match,) = found.matches
    assert match.same, (match, found.stages)
    assert match.box_error <= BOXES_F64
    assert match.score_error <= SCORES_F64
    assert (match.count == 0) == (case in NOTHING)


@pytest.mark.xdist_group("fcos")
@pytest.mark.parametrize("case", FCOS_CASES)
def test_fcos(case, x64):
    check(sides.FCOS_NAME, case, FCOS_CASES[case])


@pytest.mark.xdist_group("v2")
@pytest.mark.parametrize("case", V2_CASES)
def test_faster_rcnn(case, x64):
    check(sides.V2_NAME, case, V2_CASES[case])
