"""Which ground-truth box, if any, each anchor or proposal of one image has to predict.

Ground truth is padded to static shapes: ``valid_gt`` says which boxes are real. Nothing here has a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from numpy.typing import ArrayLike

from flaxdet.ops.boxes import as_mask, box_area, upcast_float

BELOW_LOW_THRESHOLD = -1
BETWEEN_THRESHOLDS = -2


def match(
    iou: Float[ArrayLike, "G N"],
    *,
    high_threshold: float,
    low_threshold: float,
    allow_low_quality_matches: bool = False,
    valid_gt: Bool[ArrayLike, " G"] | None = None,
    valid: Bool[ArrayLike, " N"] | None = None,
) -> Int[Array, " N"]:
    """Matches each prediction to the ground truth with the highest IoU, if the IoU is high enough.

    Reproduces ``torchvision.models.detection._utils.Matcher``. As in torchvision, thresholds are compared in the
    dtype of ``iou``, and the first ground truth wins a tie.

    Args:
        iou: [G, N], the IoU of every ground truth with every prediction.
        high_threshold: a prediction whose highest IoU is at least this is matched.
        low_threshold: a prediction whose highest IoU is below this is background; between the two thresholds it
            is ignored.
        allow_low_quality_matches: if True, also matches every prediction that has the highest IoU with some
            ground truth (ties included), however low this IoU is.
        valid_gt: [G], False for padding. Default: all are valid.
        valid: [N], False for predictions that don't count, such as anchors outside the image's canvas.
            Default: all are valid.

    Returns:
        [N] int32: the index of the ground truth, -1 (``BELOW_LOW_THRESHOLD``, background) or -2
        (``BETWEEN_THRESHOLDS``, ignored; also for predictions that are not valid). Without valid ground truth,
        where torchvision raises, every valid prediction is background.

    Raises:
        ValueError: if ``low_threshold`` exceeds ``high_threshold``, ``iou`` is not a matrix, or a mask doesn't fit the
            shape of ``iou``.
        TypeError: if a mask is not boolean.
    """
    if low_threshold > high_threshold:
        raise ValueError(
            f"low_threshold must not exceed high_threshold, found {low_threshold!r} and {high_threshold!r}"
        )
    iou = jnp.asarray(iou)
    if iou.ndim != 2:
        raise ValueError(f"iou must be [G, N], found shape {list(iou.shape)}")
    iou = iou if jnp.issubdtype(iou.dtype, jnp.floating) else iou.astype(jnp.float32)
    count_gt, count = iou.shape
    valid_gt, valid = as_mask("valid_gt", valid_gt, count_gt), as_mask("valid", valid, count)
    if not (count_gt and count):
        return jnp.where(valid, BELOW_LOW_THRESHOLD, BETWEEN_THRESHOLDS).astype(jnp.int32)

    # -1 and not 0: if no anchor overlaps some ground truth, the low-quality rule matches every anchor whose IoU with
    # that ground truth is 0. Such an anchor takes the ground truth of its highest IoU, which must not be padding.
    real = valid_gt[:, None] & valid[None, :]
    iou = jnp.where(real, iou, jnp.array(-1, iou.dtype))
    best_gt = jnp.argmax(iou, axis=0).astype(jnp.int32)
    overlap = jnp.max(iou, axis=0)
    matches = jnp.where(overlap < low_threshold, BELOW_LOW_THRESHOLD, best_gt)
    matches = jnp.where((overlap >= low_threshold) & (overlap < high_threshold), BETWEEN_THRESHOLDS, matches)
    if allow_low_quality_matches:
        is_best = (iou == jnp.max(iou, axis=1, keepdims=True)) & real
        matches = jnp.where(jnp.any(is_best, axis=0), best_gt, matches)
    return jnp.where(valid, matches, BETWEEN_THRESHOLDS).astype(jnp.int32)


def fcos_match(
    anchors: Float[ArrayLike, "N 4"],
    boxes: Float[ArrayLike, "G 4"],
    num_anchors_per_level: Sequence[int],
    *,
    center_sampling_radius: float = 1.5,
    valid_gt: Bool[ArrayLike, " G"] | None = None,
    valid: Bool[ArrayLike, " N"] | None = None,
) -> Int[Array, " N"]:
    """FCOS's assignment: each location predicts the smallest box among its candidates.

    A box is a candidate of a location if the location lies strictly inside the box and near the centre of the
    box (within ``center_sampling_radius`` anchor sizes in x and in y), and if the farthest side of the box is
    between 4 and 8 anchor sizes away. The first level has no lower limit, and the last level no upper one.
    Reproduces the first half of ``torchvision.models.detection.FCOS.compute_loss``.

    Args:
        anchors: [N, 4] xyxy in pixels, all levels one after another; only centre and width count.
        boxes: [G, 4] xyxy in pixels of the same image, the ground truth.
        num_anchors_per_level: static number of anchors of each level, including padding. The first number tells
            which anchors have no lower limit, and the last which have no upper limit.
        center_sampling_radius: in anchor sizes.
        valid_gt: [G], False for padding. Default: all are valid.
        valid: [N], False for anchors outside the image's canvas. Default: all are valid.

    Returns:
        [N] int32: the index of the box, or -1 for none. As in torchvision, areas are compared as ``1e8 - area`` in
        the boxes' dtype (in float32, 5000 and 5003 tie), and the first box wins a tie.

    Raises:
        ValueError: if shapes don't fit, or the levels don't add up to N.
        TypeError: if a mask is not boolean.
    """
    anchors, boxes = jnp.asarray(anchors), jnp.asarray(boxes)
    for name, array in (("anchors", anchors), ("boxes", boxes)):
        if array.ndim != 2 or array.shape[1] != 4:
            raise ValueError(
                f"{name} must be [{'N' if name == 'anchors' else 'G'}, 4], found shape {list(array.shape)}"
            )
    count, num_anchors_per_level = len(anchors), tuple(int(number) for number in num_anchors_per_level)
    valid_gt, valid = as_mask("valid_gt", valid_gt, len(boxes)), as_mask("valid", valid, count)
    if sum(num_anchors_per_level) != count:
        raise ValueError(f"num_anchors_per_level must add up to {count} anchors, found {num_anchors_per_level}")
    if not len(boxes):
        return jnp.full(count, -1, jnp.int32)

    anchors, boxes = upcast_float(anchors), upcast_float(boxes)
    centre = (anchors[:, None, :2] + anchors[:, None, 2:]) / 2  # [N, 1, 2]
    size = anchors[:, 2:3] - anchors[:, 0:1]  # [N, 1]
    box_centre = ((boxes[:, :2] + boxes[:, 2:]) / 2)[None]  # [1, G, 2]
    distances = jnp.concatenate((centre - boxes[None, :, :2], boxes[None, :, 2:] - centre), axis=-1)

    index = jnp.arange(count, dtype=jnp.int32)[:, None]
    lower = jnp.where(index < num_anchors_per_level[0], 0, size * 4)
    upper = jnp.where(index >= count - num_anchors_per_level[-1], jnp.inf, size * 8)
    farthest = jnp.max(distances, axis=-1)
    fits = jnp.max(jnp.abs(centre - box_centre), axis=-1) < center_sampling_radius * size
    fits &= jnp.min(distances, axis=-1) > 0
    fits &= (farthest > lower) & (farthest < upper)
    fits &= valid_gt[None, :] & valid[:, None]

    preference = jnp.where(fits, (1e8 - box_area(boxes))[None, :], 0)
    best = jnp.argmax(preference, axis=1).astype(jnp.int32)
    return jnp.where(jnp.max(preference, axis=1) < 1e-5, jnp.int32(-1), best)
