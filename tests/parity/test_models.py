"""The whole ResNet-50 detectors against torchvision on real photos, stage by stage."""

from __future__ import annotations

import contextlib

import jax
import pytest

from flaxdet import registry
from flaxdet.convert import verify
from tests.parity import sides
from tests.tolerances import BOXES_F32, BOXES_F64, ROI_STAGE_F32, SCORES_F32, SCORES_F64, STAGE_F32, STAGE_F64

BARS = {
    "float32": (STAGE_F32, ROI_STAGE_F32, BOXES_F32, SCORES_F32),
    "float64": (STAGE_F64, STAGE_F64, BOXES_F64, SCORES_F64),
}
AFTER_PROPOSALS = {"roi_features", "class_logits", "box_regression", "class_scores"}


@pytest.mark.whole
@pytest.mark.repeated  # test_options.py compares small forms stage by stage, cli/test_verify.py the whole FCOS
@pytest.mark.parametrize(
    "dtype",
    ["float64", pytest.param("float32", marks=pytest.mark.release)],
)
def test_resnet50(name, dtype):
    # few proposals: the box head's convolutions are most of the time
    options = sides.known(name, {"min_size": 160, "max_size": 256, "rpn_post_nms_top_n_test": 150})
    frozen = registry.get(name).freezable  # as with any pretrained weights; live BatchNorm is test_options' case
    with jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext():
        model, variables, theirs = sides.both(name, 91, small=False, frozen=frozen, dtype=dtype, **options)
        images = [sides.photo("grace_hopper"), sides.photo("china")]
        found = verify.compare(model, variables, theirs, images)
    stage_bar, roi_bar, box_bar, score_bar = BARS[dtype]
    expected = {"pixels", "c2", "c3", "c4", "c5", *sides.levels_of(model), *model._own_stages}
    assert {stage.name for stage in found.stages} == expected
    bars = {stage.name: roi_bar if stage.name in AFTER_PROPOSALS else stage_bar for stage in found.stages}
    first_difference = [stage for stage in found.stages if not stage.relative <= bars[stage.name]][:1]
    assert not first_difference
    for match in found.matches:
        assert match.count > 20
        assert match.same, match
        assert match.box_error <= box_bar
        assert match.score_error <= score_bar
    labels = {int(label) for detection in found.theirs for label in detection["labels"]}
    assert len(labels) > 5
