"""Losses with the names, arguments and values of ``torchvision.ops`` and ``torch.nn.functional``.

Inputs narrower than float32 are computed in float32. Gradients equal torch's, and are finite even for boxes
without area, so that ``jnp.where(valid, loss, 0)`` on ``reduction="none"`` masks padding safely.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int
from numpy.typing import ArrayLike

from flaxdet.ops.boxes import upcast_float
from flaxdet.ops.iou import aspect_penalty


def sigmoid_focal_loss(
    inputs: Float[ArrayLike, "*S"],
    targets: Float[ArrayLike, "*S"],
    alpha: float = 0.25,
    gamma: float = 2,
    reduction: str = "none",
) -> Float[Array, ...]:
    """Focal loss of binary classifications. Reproduces ``torchvision.ops.sigmoid_focal_loss``.

    Args:
        inputs: logits of any shape.
        targets: of the same shape, 1 for positive and 0 for negative; values between 0 and 1 interpolate.
        alpha: weight of the positives in [0, 1]; negatives have the weight 1 - alpha. -1 for no weights.
        gamma: exponent of the factor 1 - p, where p is the probability of the right answer; the larger, the less
            weight well-classified elements have.
        reduction: "none", "mean" or "sum".

    Returns:
        The losses, of the same shape, or their mean or sum (the mean of an empty array is NaN).

    Raises:
        ValueError: if ``alpha`` or ``reduction`` has another value, or the shapes differ.
    """
    if not (0 <= alpha <= 1) and alpha != -1:
        raise ValueError(f"alpha must lie in [0, 1], or be -1 for no weights, found {alpha!r}")
    inputs, targets = _pair(inputs, targets)
    p = jax.nn.sigmoid(inputs)
    cross_entropy = optax.losses.sigmoid_binary_cross_entropy(inputs, targets)
    p_t = p * targets + (1 - p) * (1 - targets)
    loss = cross_entropy * _power(1 - p_t, gamma)
    if alpha >= 0:
        loss = (alpha * targets + (1 - alpha) * (1 - targets)) * loss
    return _reduce(loss, reduction)


def generalized_box_iou_loss(
    boxes1: Float[ArrayLike, "*N 4"], boxes2: Float[ArrayLike, "*N 4"], reduction: str = "none", eps: float = 1e-7
) -> Float[Array, ...]:
    """1 - generalized IoU of paired boxes. Reproduces ``torchvision.ops.generalized_box_iou_loss``.

    Args:
        boxes1: [N, 4] xyxy, in any unit.
        boxes2: [N, 4] xyxy, in the same unit; row i is paired with row i of ``boxes1``.
        reduction: "none", "mean" or "sum".
        eps: added to the denominators.

    Returns:
        The losses [N] in [0, 2], or their mean or sum (0 if N is 0).

    Raises:
        ValueError: if ``reduction`` is unknown or the boxes' shapes differ or aren't [N, 4].
    """
    boxes1, boxes2 = _box_pair(boxes1, boxes2)
    inter, union = _intersection_and_union(boxes1, boxes2)
    width, height = _enclosing_size(boxes1, boxes2)
    enclosing = width * height
    giou = inter / (union + eps) - (enclosing - union) / (enclosing + eps)
    return _reduce(1 - giou, reduction, empty_mean=0.0)


def distance_box_iou_loss(
    boxes1: Float[ArrayLike, "*N 4"], boxes2: Float[ArrayLike, "*N 4"], reduction: str = "none", eps: float = 1e-7
) -> Float[Array, ...]:
    """1 - distance IoU of paired boxes. Reproduces ``torchvision.ops.distance_box_iou_loss``.

    Args:
        boxes1: [N, 4] xyxy, in any unit.
        boxes2: [N, 4] xyxy, in the same unit; row i is paired with row i of ``boxes1``.
        reduction: "none", "mean" or "sum".
        eps: added to the denominators.

    Returns:
        The losses [N] in [0, 2], or their mean or sum (0 if N is 0).

    Raises:
        ValueError: if ``reduction`` is unknown or the boxes' shapes differ or aren't [N, 4].
    """
    boxes1, boxes2 = _box_pair(boxes1, boxes2)
    return _reduce(_distance_loss(boxes1, boxes2, eps)[0], reduction, empty_mean=0.0)


def complete_box_iou_loss(
    boxes1: Float[ArrayLike, "*N 4"], boxes2: Float[ArrayLike, "*N 4"], reduction: str = "none", eps: float = 1e-7
) -> Float[Array, ...]:
    """1 - complete IoU of paired boxes. Reproduces ``torchvision.ops.complete_box_iou_loss``.

    Args:
        boxes1: [N, 4] xyxy, in any unit.
        boxes2: [N, 4] xyxy, in the same unit; row i is paired with row i of ``boxes1``.
        reduction: "none", "mean" or "sum".
        eps: added to the denominator of the aspect term's weight. As in torchvision, the other denominators
            have 1e-7 whatever ``eps`` is.

    Returns:
        The losses [N], or their mean or sum (0 if N is 0). NaN for a box of neither width nor height, where the
        gradient of the aspect term is 0.

    Raises:
        ValueError: if ``reduction`` is unknown or the boxes' shapes differ or aren't [N, 4].
    """
    boxes1, boxes2 = _box_pair(boxes1, boxes2)
    loss, iou = _distance_loss(boxes1, boxes2, 1e-7)
    return _reduce(loss + aspect_penalty(boxes1, boxes2, iou, eps), reduction, empty_mean=0.0)


def smooth_l1_loss(
    input: Float[ArrayLike, "*S"], target: Float[ArrayLike, "*S"], *, beta: float = 1.0, reduction: str = "mean"
) -> Float[Array, ...]:
    """Absolute error, squared near 0. Reproduces ``torch.nn.functional.smooth_l1_loss``.

    Args:
        input: of any shape.
        target: of the same shape.
        beta: error in the unit of ``input`` below which the loss is 0.5 * error**2 / beta; 0 for plain L1.
        reduction: "none", "mean" or "sum".

    Returns:
        The losses, of the same shape, or their mean or sum (the mean of an empty array is NaN).

    Raises:
        ValueError: if ``beta`` is negative, ``reduction`` unknown, or the shapes differ.
    """
    if beta < 0:
        raise ValueError(f"beta must not be negative, found {beta!r}")
    input, target = _pair(input, target)
    error = input - target
    error = error * jnp.sign(error)  # not `abs`, whose gradient at 0 is 1 in JAX and 0 in torch
    if beta > 0:
        error = jnp.where(error < beta, 0.5 * error * error / beta, error - 0.5 * beta)
    return _reduce(error, reduction)


def binary_cross_entropy_with_logits(
    input: Float[ArrayLike, "*S"], target: Float[ArrayLike, "*S"], *, reduction: str = "mean"
) -> Float[Array, ...]:
    """Cross entropy of independent binary classifications.

    Reproduces ``torch.nn.functional.binary_cross_entropy_with_logits``.

    Args:
        input: logits of any shape.
        target: probabilities of the same shape.
        reduction: "none", "mean" or "sum".

    Returns:
        The losses, of the same shape, or their mean or sum (the mean of an empty array is NaN).

    Raises:
        ValueError: if ``reduction`` is unknown or the shapes differ.
    """
    input, target = _pair(input, target)
    return _reduce(optax.losses.sigmoid_binary_cross_entropy(input, target), reduction)


def cross_entropy(
    input: Float[ArrayLike, "*N k"],
    target: Int[ArrayLike, "*N"],
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Float[Array, ...]:
    """Cross entropy of one of k classes. Reproduces ``torch.nn.functional.cross_entropy``.

    Args:
        input: [N, k] logits. The classes are the last axis (torch's are the second).
        target: [N] integer classes, 0..k-1.
        ignore_index: class of the rows to ignore: they have a loss of 0 and don't count in the mean.
        reduction: "none", "mean" or "sum".

    Returns:
        The losses [N], or their mean or sum (the mean of no counted row is NaN).

    Raises:
        ValueError: if ``reduction`` is unknown or the shapes don't fit.
    """
    input, target = jnp.asarray(input), jnp.asarray(target)
    if input.shape[:-1] != target.shape or not input.ndim:
        raise ValueError(
            f"input must be [N, k] and target [N], found input {list(input.shape)} and target {list(target.shape)}"
        )
    counted = target != ignore_index
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(upcast_float(input), jnp.where(counted, target, 0))
    loss = jnp.where(counted, loss, 0)
    if reduction == "mean":
        return jnp.sum(loss) / jnp.sum(counted, dtype=loss.dtype)
    return _reduce(loss, reduction)


def _power(base: jax.Array, exponent: float) -> jax.Array:
    """``base ** exponent`` with a gradient that is finite at 0, for exponents below 1 too."""
    if exponent == int(exponent):
        return base ** int(exponent)
    zero = base == 0
    return jnp.where(zero, 0, jnp.where(zero, 1, base) ** exponent)


def _intersection_and_union(boxes1: jax.Array, boxes2: jax.Array) -> tuple[jax.Array, jax.Array]:
    size1, size2 = boxes1[..., 2:] - boxes1[..., :2], boxes2[..., 2:] - boxes2[..., :2]
    overlap = jnp.minimum(boxes1[..., 2:], boxes2[..., 2:]) - jnp.maximum(boxes1[..., :2], boxes2[..., :2])
    inter = jnp.where(jnp.all(overlap > 0, axis=-1), overlap[..., 0] * overlap[..., 1], 0)
    return inter, size1[..., 0] * size1[..., 1] + size2[..., 0] * size2[..., 1] - inter


def _enclosing_size(boxes1: jax.Array, boxes2: jax.Array) -> tuple[jax.Array, jax.Array]:
    size = jnp.maximum(boxes1[..., 2:], boxes2[..., 2:]) - jnp.minimum(boxes1[..., :2], boxes2[..., :2])
    return size[..., 0], size[..., 1]


def _distance_loss(boxes1: jax.Array, boxes2: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    inter, union = _intersection_and_union(boxes1, boxes2)
    iou = inter / (union + eps)
    width, height = _enclosing_size(boxes1, boxes2)
    diagonal = width**2 + height**2 + eps
    offset = (boxes1[..., 2:] + boxes1[..., :2]) / 2 - (boxes2[..., :2] + boxes2[..., 2:]) / 2
    return 1 - iou + (offset[..., 0] ** 2 + offset[..., 1] ** 2) / diagonal, iou


def _pair(input: ArrayLike, target: ArrayLike) -> tuple[jax.Array, jax.Array]:
    input, target = jnp.asarray(input), jnp.asarray(target)
    if input.shape != target.shape:
        raise ValueError(f"input and target must have one shape, found {list(input.shape)} and {list(target.shape)}")
    input = upcast_float(input)
    return input, target.astype(input.dtype)


def _box_pair(boxes1: ArrayLike, boxes2: ArrayLike) -> tuple[jax.Array, jax.Array]:
    boxes1, boxes2 = jnp.asarray(boxes1), jnp.asarray(boxes2)
    if boxes1.shape != boxes2.shape or boxes1.shape[-1:] != (4,):
        raise ValueError(f"boxes1 and boxes2 must both be [N, 4], found {list(boxes1.shape)} and {list(boxes2.shape)}")
    return upcast_float(boxes1), upcast_float(boxes2)


def _reduce(loss: jax.Array, reduction: str, empty_mean: float | None = None) -> jax.Array:
    if reduction == "none":
        return loss
    if reduction == "sum":
        return jnp.sum(loss)
    if reduction == "mean":
        # as in torchvision, the mean of an empty array is 0 for box losses and NaN for the others
        return jnp.mean(loss) if loss.size or empty_mean is None else jnp.asarray(empty_mean, loss.dtype)
    raise ValueError(f'reduction must be "none", "mean" or "sum", found {reduction!r}')
