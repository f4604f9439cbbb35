"""Which ground-truth box, if any, each anchor or proposal of one image has to predict.

Ground truth is padded to static shapes: ``valid_gt`` says which boxes are real. Nothing here has a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int
from numpy.typing import ArrayLike

from flaxdet.ops.boxes import as_mask, box_area, upcast_float
from flaxdet.ops.iou import iou_without_gradient
from flaxdet.xla.barriers import materialise
from flaxdet.xla.routes import by_platform

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
    _check_thresholds(high_threshold, low_threshold)
    iou = jnp.asarray(iou)
    if iou.ndim != 2:
        raise ValueError(f"iou must be [G, N], found shape {list(iou.shape)}")
    iou = iou if jnp.issubdtype(iou.dtype, jnp.floating) else iou.astype(jnp.float32)
    count_gt, count = iou.shape
    valid_gt, valid = as_mask("valid_gt", valid_gt, count_gt), as_mask("valid", valid, count)
    if not (count_gt and count):
        return jnp.where(valid, BELOW_LOW_THRESHOLD, BETWEEN_THRESHOLDS).astype(jnp.int32)

    return _matches(iou, iou, iou, valid_gt, valid, high_threshold, low_threshold, allow_low_quality_matches)


def match_boxes(
    gt: Float[Array, "G 4"],
    boxes: Float[Array, "N 4"],
    *,
    high_threshold: float,
    low_threshold: float,
    allow_low_quality_matches: bool = False,
    valid_gt: Bool[Array, " G"],
    valid: Bool[Array, " N"],
) -> Int[Array, " N"]:
    """``match`` of ``box_iou(gt, boxes)``, a matrix that is written to memory on CPUs alone.

    Elsewhere each reduction of the matrix computes it again: for a batch of 16 images it would be 1.4 GB. The rule of
    low-quality matches compares numbers of two reductions, which have the same bits.

    Args:
        gt: [G, 4] xyxy in pixels of one image, the ground truth.
        boxes: [N, 4] xyxy in pixels of the same image, the predictions.
        high_threshold, low_threshold, allow_low_quality_matches, valid_gt, valid: as in ``match``.

    Returns:
        [N] int32, as ``match``.

    Raises:
        ValueError: if ``low_threshold`` exceeds ``high_threshold``.
    """
    _check_thresholds(high_threshold, low_threshold)
    options = {
        "high_threshold": high_threshold,
        "low_threshold": low_threshold,
        "allow_low_quality_matches": allow_low_quality_matches,
    }

    def written(gt: Array, boxes: Array, valid_gt: Array, valid: Array) -> Array:
        return match(iou_without_gradient(gt, boxes), **options, valid_gt=valid_gt, valid=valid)

    def computed_again(gt: Array, boxes: Array, valid_gt: Array, valid: Array) -> Array:
        gt, boxes, valid = materialise((gt, boxes, valid))  # not their computation in every kernel
        # Boxes twice as large have the same IoU to the bit, but XLA doesn't see that it is the same matrix, which it
        # would compute once (an optimization barrier doesn't hide it).
        one, two, four = (iou_without_gradient(scale * gt, scale * boxes) for scale in (1, 2, 4))
        return _matches(one, two, four, valid_gt, valid, **options)

    route = computed_again if len(gt) and len(boxes) else written
    return by_platform(gt, boxes, valid_gt, valid, cpu=written, default=route)


def _check_thresholds(high_threshold: float, low_threshold: float) -> None:
    if low_threshold > high_threshold:
        raise ValueError(
            f"low_threshold must not exceed high_threshold, found {low_threshold!r} and {high_threshold!r}"
        )


def _matches(
    for_best: Float[Array, "G N"],
    for_highest: Float[Array, "G N"],
    for_ties: Float[Array, "G N"],
    valid_gt: Bool[Array, " G"],
    valid: Bool[Array, " N"],
    high_threshold: float,
    low_threshold: float,
    allow_low_quality_matches: bool,
) -> Int[Array, " N"]:
    """``match`` of a matrix that is given once for each of its reductions."""
    # -1 and not 0: if no anchor overlaps some ground truth, the low-quality rule matches every anchor whose IoU with
    # that ground truth is 0. Such an anchor takes the ground truth of its highest IoU, which must not be padding.
    # What is found for predictions that don't count is replaced in the end.
    lowest = jnp.array(-1, for_best.dtype)
    overlap, best_gt = _best(jnp.where(valid_gt[:, None], for_best, lowest))
    matches = jnp.where(overlap < low_threshold, BELOW_LOW_THRESHOLD, best_gt)
    matches = jnp.where((overlap >= low_threshold) & (overlap < high_threshold), BETWEEN_THRESHOLDS, matches)
    if allow_low_quality_matches:
        highest = jnp.where(valid_gt, _highest(jnp.where(valid[None, :], for_highest, lowest)), jnp.nan)
        matches = jnp.where(jnp.any(for_ties == highest[:, None], axis=0), best_gt, matches)
    return jnp.where(valid, matches, BETWEEN_THRESHOLDS).astype(jnp.int32)


def _highest(iou: Float[Array, "G N"]) -> Float[Array, " G"]:
    """``max`` over N, NaN where there is one: XLA:CPU's own loses it in batches of some shapes."""
    lowest = jnp.array(-jnp.inf, iou.dtype)
    return lax.reduce(iou, lowest, lambda a, b: jnp.where((a > b) | jnp.isnan(a), a, b), (1,))


def _best(iou: Float[Array, "G N"]) -> tuple[Float[Array, " N"], Int[Array, " N"]]:
    """``max`` and ``argmax`` over G in one pass; NaN counts as the largest."""

    def better(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        (x, i), (y, j) = a, b
        first = (x > y) | ((x == y) & (i < j)) | (jnp.isnan(x) & ~(jnp.isnan(y) & (j < i)))
        return jnp.where(first, x, y), jnp.where(first, i, j)

    start = jnp.array(-jnp.inf, iou.dtype), jnp.array(len(iou), jnp.int32)
    return lax.reduce((iou, lax.broadcasted_iota(jnp.int32, iou.shape, 0)), start, better, (0,))


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
