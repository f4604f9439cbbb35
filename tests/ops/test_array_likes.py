"""Every operator takes lists and numpy arrays as it takes jax arrays. Answers are worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdet import ops
from tests.tolerances import HAND_F32

BOXES = [[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 5.0], [20.0, 20.0, 24.0, 22.0]]
ONE = [[0.0, 0.0, 10.0, 10.0]]
UP, OFF = [[0.0, 0.0, 10.0, 10.0]], [[5.0, 0.0, 15.0, 10.0]]  # IoU 50 / 150
IOU = [[0.9, 0.2, 0.5], [0.1, 0.2, 0.6]]
MAP = [[[1.0], [3.0]], [[5.0], [7.0]]]  # 2x2 pixels
GENERATOR = ops.AnchorGenerator(((2,),), ((1.0,),))
# centres 5 apart: the union leaves nothing of the enclosing 15x10 empty; 25 / (225 + 100) of the diagonal
DISTANCE = 1 / 3 - 25 / 325

# name: (function, arguments that are arrays, other arguments, the answer)
CASES: dict[str, tuple[Any, list[Any], dict[str, Any], Any]] = {
    "box_area": (ops.box_area, [BOXES], {}, [100, 50, 8]),
    "box_convert": (ops.box_convert, [[[1, 2, 4, 6]]], {"in_fmt": "xyxy", "out_fmt": "xywh"}, [[1, 2, 3, 4]]),
    "clip_boxes_to_image": (ops.clip_boxes_to_image, [[[-1.0, -2.0, 9.0, 9.0]], [6, 8]], {}, [[0, 0, 8, 6]]),
    "remove_small_boxes": (ops.remove_small_boxes, [BOXES], {"min_size": 3}, [True, True, False]),
    "resize_boxes": (ops.resize_boxes, [[[2, 4, 6, 8]], [10, 20], [5, 30]], {}, [[3, 2, 9, 4]]),
    "box_iou": (ops.box_iou, [ONE, BOXES], {}, [[1, 0.5, 0]]),
    "generalized_box_iou": (ops.generalized_box_iou, [UP, OFF], {}, [[1 / 3]]),
    "distance_box_iou": (ops.distance_box_iou, [UP, OFF], {}, [[DISTANCE]]),
    "complete_box_iou": (ops.complete_box_iou, [UP, OFF], {}, [[DISTANCE]]),  # squares both
    "generalized_box_iou_loss": (ops.generalized_box_iou_loss, [UP, OFF], {}, [2 / 3]),
    "distance_box_iou_loss": (ops.distance_box_iou_loss, [UP, OFF], {}, [1 - DISTANCE]),
    "complete_box_iou_loss": (ops.complete_box_iou_loss, [UP, OFF], {}, [1 - DISTANCE]),
    "sigmoid_focal_loss": (ops.sigmoid_focal_loss, [[0.0], [1]], {"alpha": -1}, [math.log(2) / 4]),
    "smooth_l1_loss": (ops.smooth_l1_loss, [[1.0, 5.0], [1.5, 2]], {"reduction": "none"}, [0.125, 2.5]),
    "binary_cross_entropy": (ops.binary_cross_entropy_with_logits, [[0.0, 0.0], [0, 1]], {}, math.log(2)),
    "cross_entropy": (ops.cross_entropy, [[[0.0, 0.0], [3.0, 3.0]], [0, 1]], {}, math.log(2)),
    "nms": (ops.nms, [BOXES, [0.9, 0.8, 0.7]], {"iou_threshold": 0.4}, [0, 2, -1]),
    "batched_nms": (ops.batched_nms, [BOXES, [0.9, 0.8, 0.7], [0, 1, 0]], {"iou_threshold": 0.4}, [0, 1, 2]),
    "match": (ops.match, [IOU], {"high_threshold": 0.6, "low_threshold": 0.3}, [0, -1, 1]),
    "fcos_match": (ops.fcos_match, [[[3.0, 3.0, 7.0, 7.0]], ONE, [1]], {}, [0]),
    "roi_align": (ops.roi_align, [MAP, [[0.0, 0.0, 1.0, 1.0]], [1, 1]], {"sampling_ratio": 1}, [[[[4.0]]]]),
    "multiscale_roi_align": (
        lambda level, boxes, size, scales: ops.multiscale_roi_align(
            [level], boxes, size, scales=scales, sampling_ratio=1
        ),
        [MAP, [[0.0, 0.0, 1.0, 1.0]], [1, 1], [1.0]],
        {},
        [[[[4.0]]]],
    ),
    "BoxCoder.encode": (ops.BoxCoder().encode, [OFF, UP], {}, [[0.5, 0, 0, 0]]),
    "BoxCoder.decode": (ops.BoxCoder().decode, [[[0.5, 0, 0, 0]], UP], {}, OFF),
    "BoxLinearCoder.encode": (ops.BoxLinearCoder().encode, [UP, OFF], {}, [[0, 0.5, 1, 0.5]]),
    "BoxLinearCoder.decode": (ops.BoxLinearCoder().decode, [[[0, 0.5, 1, 0.5]], UP], {}, OFF),
    "AnchorGenerator": (
        lambda *args: GENERATOR(*args)[0],
        [[8, 8], [[1, 2]], [[1, 2]]],
        {},
        [[-1, -1, 1, 1], [3, -1, 5, 1]],
    ),
    "AnchorGenerator.valid": (lambda *args: GENERATOR.valid(*args)[0], [[[1, 1]], [[1, 2]]], {}, [True, False]),
}


def as_numpy(value: Any) -> np.ndarray:
    """As jax has them too: no wider than 32 bits."""
    array = np.asarray(value)
    return array.astype({"f": np.float32, "i": np.int32}.get(array.dtype.kind, array.dtype))


KINDS = {"lists": lambda value: value, "numpy": as_numpy}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_takes(name, kind):
    function, arrays, options, expected = CASES[name]
    found = function(*map(KINDS[kind], arrays), **options)
    assert isinstance(found, jax.Array)
    np.testing.assert_allclose(found, expected, rtol=HAND_F32, atol=HAND_F32)


def test_every_operator_is_here():
    """Balanced sampling is below; the rest are constants and classes whose methods are here."""
    operators = {name for name in ops.__all__ if callable(getattr(ops, name))} - {"balanced_sample"}
    assert operators <= {getattr(case[0], "__name__", "") for case in CASES.values()} | {
        name.split(".")[0] for name in CASES
    }


MASK = [True, False, True]


@pytest.mark.parametrize("kind", KINDS)
def test_masks(kind):
    """The first box is the best, and not valid where the mask is turned around."""
    make = KINDS[kind]
    boxes, scores, mask = make(BOXES), make([0.9, 0.8, 0.7]), make(MASK)
    assert ops.nms(boxes, scores, 0.9, valid=mask).tolist() == [0, 2, -1]
    assert ops.batched_nms(boxes, scores, make([0, 0, 0]), 0.9, valid=mask).tolist() == [0, 2, -1]
    thresholds = {"high_threshold": 0.6, "low_threshold": 0.3}
    found = ops.match(make(IOU), valid_gt=make([False, True]), valid=mask, **thresholds)
    assert found.tolist() == [-1, -2, 1]
    anchors = make([[3.0, 3.0, 7.0, 7.0]] * 3)
    found = ops.fcos_match(anchors, make(ONE), [3], valid_gt=make([True]), valid=mask)
    assert found.tolist() == [0, -1, 0]
    positive, negative = ops.balanced_sample(jax.random.key(0), make([1, 0, -1]), 2, 0.5)
    assert positive.tolist() == [True, False, False]
    assert negative.tolist() == [False, True, False]


def test_masks_that_are_none():
    options = {"high_threshold": 0.6, "low_threshold": 0.3}
    with pytest.raises(TypeError, match=r"nms: valid must be bool.*, got int32"):
        ops.nms(BOXES, [0.9, 0.8, 0.7], 0.5, valid=[1, 0, 1])
    with pytest.raises(TypeError, match="valid_gt must be boolean, found int32"):
        ops.match(IOU, valid_gt=[1, 0], **options)
    with pytest.raises(ValueError, match=r"valid must have shape \[3\], found \[2\]"):
        ops.match(IOU, valid=[True, False], **options)
    with pytest.raises(ValueError, match=r"valid_gt must have shape \[1\], found \[2\]"):
        ops.fcos_match([[3.0, 3.0, 7.0, 7.0]], ONE, [1], valid_gt=[True, True])


@pytest.mark.parametrize("size", [2, np.int64(2), (2, 2), [2, 2], np.array([2, 2])])
def test_output_sizes(size):
    boxes = [[0.0, 0.0, 1.0, 1.0]]
    assert ops.roi_align(MAP, boxes, size, sampling_ratio=1).shape == (1, 2, 2, 1)
    with pytest.raises(ValueError, match="output_size must be one number or two"):
        ops.roi_align(MAP, boxes, (1, 2, 3), sampling_ratio=1)


def test_integer_boxes_are_resized_as_real_ones():
    """Half of an odd number; the ratios are no integers."""
    found = ops.resize_boxes(jnp.asarray([[1, 2, 5, 8]], jnp.int32), (10, 10), (5, 5))
    np.testing.assert_array_equal(found, np.float32([[0.5, 1, 2.5, 4]]))
