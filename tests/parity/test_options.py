"""Default and unusual keyword arguments against torchvision, float64, on the small forms.

torchvision runs whole with every option. Our network runs twice for each detector, the second time on a canvas with
an odd side and another number of classes. Options of postprocessing are tried on the outputs of torchvision's network,
options of geometry without a network.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest
import torch

from flaxdet.convert import stages, verify
from flaxdet.images.transform import to_original, transform
from flaxdet.inference.detect import unpad
from flaxdet.models.levels import level_shapes
from flaxdet.structures import Detections, Proposals
from tests.parity import sides
from tests.tolerances import BOXES_F64, PIXELS_F64, SCORES_F64

SMALL = {"min_size": 128, "max_size": 200}
FEW = {"rpn_post_nms_top_n_test": 40}
PHOTO = "china"
UNUSUAL = {
    "num_classes": 2,
    "min_size": (48, 160, 96),
    "max_size": 150,
    "size_divisible": 1,
    "image_mean": [0.2, 0.5, 0.7],
    "image_std": [0.5, 0.4, 0.3],
}
FCOS_CASES = {
    "thresholds": {"score_thresh": 0.2, "nms_thresh": 0.3},
    "every candidate": {"score_thresh": 0.0, "nms_thresh": 0.9, "detections_per_img": 300},
    "top n": {"topk_candidates": 7, "detections_per_img": 5},
    "zero detections": {"score_thresh": 0.999},
}
BOX_CASES = {
    "thresholds": {"box_score_thresh": 0.15, "box_nms_thresh": 0.3},
    "every candidate": {"box_score_thresh": 0.0, "box_nms_thresh": 0.9, "box_detections_per_img": 300},
    "top n of other boxes": {"box_detections_per_img": 5, "bbox_reg_weights": (5.0, 4.0, 3.0, 2.0)},
    "zero detections": {"box_score_thresh": 0.999},
}
RPN_CASES = {
    "thresholds": {"rpn_nms_thresh": 0.5, "rpn_score_thresh": 0.97},
    "top n": {"rpn_pre_nms_top_n_test": 20, "rpn_post_nms_top_n_test": 15},
    "zero proposals": {"rpn_score_thresh": 1.1},
}
GEOMETRY = {
    "max_size binds": {"min_size": 200, "max_size": 150},
    "several min_size": {"min_size": (96, 160, 128)},
    "size_divisible": {"size_divisible": 50},
    "fixed_size": {"fixed_size": (160, 96)},
    "normalisation": {"image_mean": [0.2, 0.5, 0.7], "image_std": [0.5, 0.4, 0.3]},
}


def some_in_ci(cases: dict[str, Any], *outside: str) -> list[Any]:
    """The names of cases, of which others than those given run in CI alone."""
    return [pytest.param(case, marks=[] if case in outside else [pytest.mark.ci]) for case in cases]


def assert_same(ours: Any, theirs: Any) -> int:
    """The number of detections, of which every one has its counterpart."""
    match = verify.match_detections(ours, theirs, BOXES_F64, SCORES_F64)
    assert match.same, match
    return match.count


def detector(name: str, **options: Any) -> Any:
    return sides.both(name, dtype="float64", **(SMALL | sides.known(name, FEW) | options))


@pytest.mark.repeated  # test_rpn and test_box_head compare v2 in parts
def test_the_whole_detector(name, x64):
    compare_whole(name, {})


@pytest.mark.ci  # test_fcos, test_rpn and test_box_head compare the options in parts
@pytest.mark.repeated
def test_the_whole_detector_of_unusual_options(name, x64):
    compare_whole(name, UNUSUAL)


def compare_whole(name: str, options: dict[str, Any]) -> None:
    model, variables, theirs = detector(name, **options)
    found = verify.compare(model, variables, theirs, [sides.photo(PHOTO)])
    (match,) = found.matches
    assert found.same, (match, found.stages)
    assert match.count > 1
    sides_of_canvas = found.stages[0].shape[1:3]
    assert any(side % 2 for side in sides_of_canvas) == bool(options)


@pytest.fixture(scope="module")
def outputs():
    """By the builder's name: what torchvision's network with the default options gives, [1, ...], and our batch."""
    made: dict[str, Any] = {}

    def get(name: str):
        if name not in made:
            model, _, theirs = detector(name)
            batch = transform([sides.photo(PHOTO)], model.transform, canvas="batch", dtype=np.float64)
            _, given = stages.run_reference(theirs, [sides.photo(PHOTO)])
            np.testing.assert_allclose(batch.pixels, given["pixels"], rtol=0, atol=PIXELS_F64)
            if "proposals" in given:
                boxes, real = given["proposals"][None], np.ones((1, len(given["proposals"])), bool)
                given |= {name: given[name][None] for name in ("class_logits", "box_regression")}
                given["proposals"] = Proposals(boxes, np.zeros(real.shape), real)  # postprocess reads no scores
            made[name] = given, level_shapes({level: given[level] for level in sides.levels_of(model)}), batch
        return made[name]

    return get


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def part(model, method, shapes, batch, *args):
    """A method without parameters, of what the network gave; detections in the original image."""
    shapes = () if shapes is None else (shapes,)
    found = model.apply({}, *args, batch, *shapes, method=method)
    return to_original(found, batch) if isinstance(found, Detections) else found


@pytest.mark.xdist_group(f"test_options {sides.TINY_NAME}")
@pytest.mark.parametrize("case", some_in_ci(FCOS_CASES, "every candidate"))
def test_fcos(case, outputs, x64):
    model, _, theirs = detector(sides.TINY_NAME, **FCOS_CASES[case])
    (expected,), _ = stages.run_reference(theirs, [sides.photo(PHOTO)], keep_stages=False)
    given, shapes, batch = outputs(sides.TINY_NAME)
    head = {name: given[name] for name in ("cls_logits", "bbox_regression", "bbox_ctrness")}
    (found,) = unpad(part(model, "postprocess", shapes, batch, head))
    assert (assert_same(found, expected) == 0) == (case == "zero detections")


@pytest.mark.xdist_group(f"test_options {sides.V2_NAME}")
@pytest.mark.parametrize("case", some_in_ci(BOX_CASES, "every candidate", "top n of other boxes"))
def test_box_head(case, outputs, x64):
    model, _, theirs = detector(sides.V2_NAME, **BOX_CASES[case])
    (expected,), _ = stages.run_reference(theirs, [sides.photo(PHOTO)], keep_stages=False)
    given, _, batch = outputs(sides.V2_NAME)
    arguments = (given[name] for name in ("class_logits", "box_regression", "proposals"))
    # postprocess takes the batch last and no shapes
    (found,) = unpad(part(model, "postprocess", None, batch, *arguments))
    assert (assert_same(found, expected) == 0) == (case == "zero detections")


@pytest.mark.xdist_group(f"test_options {sides.V2_NAME}")
@pytest.mark.parametrize("case", some_in_ci(RPN_CASES, "top n", "zero proposals"))
def test_rpn(case, outputs, x64):
    """The proposals; and where there is none, no detection either."""
    model, _, theirs = detector(sides.V2_NAME, **RPN_CASES[case])
    (expected,), recorded = stages.run_reference(theirs, [sides.photo(PHOTO)])
    given, shapes, batch = outputs(sides.V2_NAME)
    ends = np.cumsum([3 * h * w for h, w in shapes])[:-1]
    levels = [np.split(given[name], ends, axis=1) for name in ("objectness", "pred_bbox_deltas")]
    proposals: Proposals = part(model, "filter_proposals", shapes, batch, *levels)
    np.testing.assert_allclose(proposals.boxes[proposals.valid], recorded["proposals"], rtol=0, atol=BOXES_F64)
    if case == "zero proposals":
        assert not proposals.valid.any()
        assert not len(expected["scores"])
        model, *_ = detector(sides.V2_NAME)
        found = part(model, "postprocess", None, batch, given["class_logits"], given["box_regression"], proposals)
        assert not found.valid.any()
    else:
        assert 5 < len(recorded["proposals"]) < given["proposals"].valid.sum()  # the options bind


@pytest.mark.parametrize("case", GEOMETRY)
def test_geometry(name, case, x64):
    """The models take the options to their transforms."""
    options = SMALL | GEOMETRY[case]
    theirs = sides.torch_detector(name, 2, **options)
    model = sides.flax_detector(name, 2, dtype=np.float64, **options)
    image = sides.photo(PHOTO)
    images, _ = theirs.transform([torch.from_numpy(image.copy()).permute(2, 0, 1).double() / 255])
    batch = transform([image], model.transform, dtype=np.float64)
    expected = images.tensors.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(batch.pixels, expected, rtol=0, atol=PIXELS_F64)
    # these take boxes back to the original image
    assert [tuple(size) for size in batch.size.tolist()] == images.image_sizes
    assert tuple(batch.original_size[0].tolist()) == image.shape[:2]
