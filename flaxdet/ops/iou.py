"""Overlap of every pair of boxes: IoU and its generalized, distance and complete forms.

Boxes are xyxy in absolute pixels unless a format is named. Functions take the boxes of one image; ``vmap``
them over a batch. All work under ``jit``. Gradients equal torch's, and are finite even where boxes lie apart
or have no area, so that a caller may mask a NaN value with ``where``.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Num
from numpy.typing import ArrayLike

from flaxdet.ops.boxes import as_boxes, box_area, box_convert, upcast
from flaxdet.xla.barriers import materialise


def box_iou(boxes1: Num[ArrayLike, "N 4"], boxes2: Num[ArrayLike, "M 4"], fmt: str = "xyxy") -> Float[Array, "N M"]:
    """Intersection over union of every pair. Reproduces ``torchvision.ops.box_iou``.

    Args:
        boxes1: [N, 4] in ``fmt``, in any unit.
        boxes2: [M, 4] in ``fmt``, in the same unit.
        fmt: "xyxy", "xywh" or "cxcywh".

    Returns:
        [N, M] in [0, 1]; NaN (0 / 0) where neither box has an area, with a gradient of 0.

    Raises:
        ValueError: if ``fmt`` is unknown or boxes don't have 4 coordinates.
    """
    boxes1, boxes2 = as_boxes("boxes1", boxes1), as_boxes("boxes2", boxes2)
    inter, union = _intersection_and_union(boxes1, boxes2, fmt)
    return _safe_divide(_as_float(inter), _as_float(union))


def iou_without_gradient(boxes1: Float[Array, "N 4"], boxes2: Float[Array, "M 4"]) -> Float[Array, "N M"]:
    """The values of ``box_iou``, in a form that XLA fuses into a reduction.

    Args:
        boxes1: [N, 4] xyxy in any unit, floating.
        boxes2: [M, 4] xyxy in the same unit, of the same dtype.

    Returns:
        [N, M] in [0, 1]; NaN where neither box has an area. No gradient flows through it.
    """
    boxes1, boxes2 = lax.stop_gradient((boxes1, boxes2))
    w, h = (  # not [N, M, 2], a slice of which XLA writes to memory
        _clamp_at_zero(
            jnp.minimum(boxes1[:, None, high], boxes2[None, :, high])
            - jnp.maximum(boxes1[:, None, low], boxes2[None, :, low])
        )
        for low, high in ((0, 2), (1, 3))
    )
    inter = w * h
    area1, area2 = materialise((box_area(boxes1), box_area(boxes2)))
    return inter / (area1[:, None] + area2[None, :] - inter)


def generalized_box_iou(boxes1: Num[ArrayLike, "N 4"], boxes2: Num[ArrayLike, "M 4"]) -> Float[Array, "N M"]:
    """Generalized IoU of every pair. Reproduces ``torchvision.ops.generalized_box_iou``.

    Args:
        boxes1: [N, 4] xyxy, in any unit.
        boxes2: [M, 4] xyxy, in the same unit.

    Returns:
        [N, M] in [-1, 1]: the IoU less the fraction of the smallest enclosing box that the union does not cover.
        NaN where the union or the enclosing box has no area.

    Raises:
        ValueError: if boxes don't have 4 coordinates.
    """
    boxes1, boxes2 = as_boxes("boxes1", boxes1), as_boxes("boxes2", boxes2)
    inter, union = (_as_float(x) for x in _intersection_and_union(boxes1, boxes2))
    w, h = _enclosing_size(boxes1, boxes2)
    enclosing = _as_float(w * h)
    return _safe_divide(inter, union) - _safe_divide(enclosing - union, enclosing)


def distance_box_iou(
    boxes1: Num[ArrayLike, "N 4"], boxes2: Num[ArrayLike, "M 4"], eps: float = 1e-7
) -> Float[Array, "N M"]:
    """Distance IoU of every pair. Reproduces ``torchvision.ops.distance_box_iou``.

    Args:
        boxes1: [N, 4] xyxy, in any unit.
        boxes2: [M, 4] xyxy, in the same unit.
        eps: added to the enclosing box's squared diagonal.

    Returns:
        [N, M] in [-1, 1]: the IoU less the squared distance of the centres over the squared diagonal of
        the smallest enclosing box. NaN where neither box has an area.

    Raises:
        ValueError: if boxes don't have 4 coordinates.
    """
    boxes1, boxes2 = as_boxes("boxes1", boxes1), as_boxes("boxes2", boxes2)
    return _distance_iou(upcast(boxes1), upcast(boxes2), eps)[0]


def complete_box_iou(
    boxes1: Num[ArrayLike, "N 4"], boxes2: Num[ArrayLike, "M 4"], eps: float = 1e-7
) -> Float[Array, "N M"]:
    """Complete IoU of every pair. Reproduces ``torchvision.ops.complete_box_iou``.

    Args:
        boxes1: [N, 4] xyxy, in any unit.
        boxes2: [M, 4] xyxy, in the same unit.
        eps: added to the enclosing box's squared diagonal and to the weight's denominator.

    Returns:
        [N, M]: the distance IoU less a weighted penalty on the difference of the aspect ratios; no gradient
        flows through the weight. NaN where neither box has an area.

    Raises:
        ValueError: if boxes don't have 4 coordinates.
    """
    boxes1, boxes2 = as_boxes("boxes1", boxes1), as_boxes("boxes2", boxes2)
    boxes1, boxes2 = upcast(boxes1), upcast(boxes2)
    diou, iou = _distance_iou(boxes1, boxes2, eps)
    penalty = aspect_penalty(boxes1[:, None], boxes2[None], iou, eps)
    return diou - penalty


def aspect_penalty(
    boxes1: Float[Array, "*N 4"], boxes2: Float[Array, "*N 4"], iou: Float[Array, "*N"], eps: float
) -> Float[Array, "*N"]:
    """The term on aspect ratios by which complete IoU differs from distance IoU.

    Args:
        boxes1: [..., 4] xyxy, broadcastable against ``boxes2``.
        boxes2: [..., 4] xyxy.
        iou: [...] of each pair.
        eps: added to the denominator of the penalty's weight.

    Returns:
        [...] the penalty times the weight; no gradient flows through the weight.
    """

    (w1, h1), (w2, h2) = (
        (_as_float(b[..., 2] - b[..., 0]), _as_float(b[..., 3] - b[..., 1])) for b in (boxes1, boxes2)
    )
    # The value is NaN for a box of neither width nor height and for an IoU of 0 / 0. These must not reach the products
    # below, whose gradient would be NaN even where the caller masks the value.
    no_angle = ((w1 == 0) & (h1 == 0)) | ((w2 == 0) & (h2 == 0)) | jnp.isnan(iou)
    angle1, angle2 = (
        jnp.arctan(_safe_divide(jnp.where(no_angle, 1, w), jnp.where(no_angle, 1, h))) for w, h in ((w1, h1), (w2, h2))
    )
    v = (4 / math.pi**2) * jnp.square(angle1 - angle2)
    # for two equal boxes v and 1 - iou are 0, and eps makes the weight 0 instead of NaN
    weight = lax.stop_gradient(v / (1 - jnp.where(no_angle, 0, iou) + v + eps))
    return jnp.where(no_angle, jnp.nan, weight * v)


def _intersection_and_union(boxes1: jax.Array, boxes2: jax.Array, fmt: str = "xyxy") -> tuple[jax.Array, jax.Array]:
    boxes1, boxes2 = upcast(boxes1), upcast(boxes2)  # before any difference, since unsigned integers wrap around
    area1, area2 = box_area(boxes1, fmt), box_area(boxes2, fmt)
    if fmt != "xyxy":
        boxes1, boxes2 = box_convert(boxes1, fmt, "xyxy"), box_convert(boxes2, fmt, "xyxy")
    top_left = jnp.maximum(boxes1[:, None, :2], boxes2[None, :, :2])
    bottom_right = jnp.minimum(boxes1[:, None, 2:], boxes2[None, :, 2:])
    size = _clamp_at_zero(bottom_right - top_left)
    inter = size[..., 0] * size[..., 1]
    return inter, (area1[:, None] + area2[None, :]).astype(inter.dtype) - inter


def _enclosing_size(boxes1: jax.Array, boxes2: jax.Array) -> tuple[jax.Array, jax.Array]:
    boxes1, boxes2 = upcast(boxes1), upcast(boxes2)
    top_left = jnp.minimum(boxes1[:, None, :2], boxes2[None, :, :2])
    bottom_right = jnp.maximum(boxes1[:, None, 2:], boxes2[None, :, 2:])
    size = _clamp_at_zero(bottom_right - top_left)
    return size[..., 0], size[..., 1]


def _distance_iou(boxes1: jax.Array, boxes2: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    iou = box_iou(boxes1, boxes2)
    w, h = _enclosing_size(boxes1, boxes2)
    diagonal = _as_float(w**2 + h**2) + eps
    centres1 = _as_float(boxes1[:, :2] + boxes1[:, 2:]) / 2
    centres2 = _as_float(boxes2[:, :2] + boxes2[:, 2:]) / 2
    offset = centres1[:, None] - centres2[None]
    distance = offset[..., 0] ** 2 + offset[..., 1] ** 2
    return iou - distance / diagonal, iou


def _safe_divide(a: jax.Array, b: jax.Array) -> jax.Array:
    """``a / b``; where b is 0 the value stays NaN or infinite, but the gradient is 0 instead of NaN."""
    zero = b == 0
    return jnp.where(zero, lax.stop_gradient(a / b), a / jnp.where(zero, 1, b))


def _clamp_at_zero(x: jax.Array) -> jax.Array:
    # `where` rather than `maximum`: as in torch's clamp, NaN stays, and the gradient is 1, not 0.5, at 0
    return jnp.where(x < 0, jnp.zeros_like(x), x)


def _as_float(x: jax.Array) -> jax.Array:
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)
