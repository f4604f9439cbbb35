"""Exact greedy non-maximum suppression with static shapes: torchvision's answers, inside ``jit``.

`flaxdet.ops.greedy` has the algorithm.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int
from numpy.typing import ArrayLike

from flaxdet.ops.greedy import greedy


def nms(
    boxes: Float[ArrayLike, "N 4"],
    scores: Float[ArrayLike, " N"],
    iou_threshold: float | Float[Array, ""],
    *,
    max_output: int | None = None,
    valid: Bool[ArrayLike, " N"] | None = None,
) -> Int[Array, " K"]:
    """Keeps the best boxes, dropping those that overlap a better kept box too much.

    Reproduces ``torchvision.ops.nms`` (the C++ one), ties included: boxes are visited in stable descending
    order of score (among equal scores the lowest index first; NaN counts as the highest score, as in
    ``torch.sort``), and a kept box drops every later box if their IoU is greater than the threshold.
    Areas are signed, and a NaN IoU (two boxes without area, a NaN or infinite coordinate) drops nothing.

    Works under ``jit`` and ``vmap``. The result is an index, so no gradient flows to boxes or scores.

    Args:
        boxes: [N, 4] xyxy, any unit. float32 or float64; narrower floats are computed in float32.
        scores: [N], any range; infinities and NaN are allowed.
        iou_threshold: in [0, 1]. A Python float is compared in double precision, as in torchvision: with
            float32 boxes, an IoU of float32(0.6) is above 0.6, and an IoU of float32(0.7) is below 0.7. May be
            traced.
        max_output: K, how many indices to return; default N.
        valid: [N], False for boxes that don't take part; default all True.

    Returns:
        [K] int32 indices into ``boxes``, best first, filled up with -1.

    Raises:
        TypeError: if ``boxes`` or ``scores`` are not floating point, or ``valid`` is not boolean.
        ValueError: if a shape does not fit, or ``max_output`` is negative.
    """
    return _checked("nms", boxes, scores, None, iou_threshold, max_output, valid)


def batched_nms(
    boxes: Float[ArrayLike, "N 4"],
    scores: Float[ArrayLike, " N"],
    idxs: Int[ArrayLike, " N"],
    iou_threshold: float | Float[Array, ""],
    *,
    max_output: int | None = None,
    valid: Bool[ArrayLike, " N"] | None = None,
) -> Int[Array, " K"]:
    """``nms`` within categories: a box suppresses only boxes of the same category (class, pyramid level, ...).

    Reproduces the exact, per-category form of ``torchvision.ops.batched_nms``, which torchvision uses for large
    inputs. (For small inputs torchvision shifts the boxes of different categories far apart, and the rounding
    changes a few per cent of the float32 answers.) One pass handles all categories, however many there are.

    Args:
        boxes: [N, 4] xyxy, any unit, as for ``nms``.
        scores: [N].
        idxs: [N] integers, the category of each box.
        iou_threshold: in [0, 1], as for ``nms``.
        max_output: K, how many indices to return, of all categories together; default N.
        valid: [N], False for boxes that don't take part; default all True.

    Returns:
        [K] int32 indices into ``boxes``, best first over all categories, filled up with -1.

    Raises:
        TypeError: if ``boxes`` or ``scores`` are not floating point, ``idxs`` are not integer, or ``valid``
            is not boolean.
        ValueError: if a shape does not fit, or ``max_output`` is negative.
    """
    return _checked("batched_nms", boxes, scores, jnp.asarray(idxs), iou_threshold, max_output, valid)


def _checked(
    name: str,
    boxes: ArrayLike,
    scores: ArrayLike,
    idxs: jax.Array | None,
    iou_threshold: float | jax.Array,
    max_output: int | None,
    valid: ArrayLike | None,
) -> jax.Array:
    boxes, scores = jnp.asarray(boxes), jnp.asarray(scores)
    valid = None if valid is None else jnp.asarray(valid)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{name}: boxes must have shape [N, 4], got {list(boxes.shape)}")
    n = boxes.shape[0]
    arguments = {"scores": (scores, jnp.floating), "idxs": (idxs, jnp.integer), "valid": (valid, jnp.bool_)}
    for argument, (value, kind) in arguments.items():
        if value is None:
            continue
        if value.shape != (n,):
            raise ValueError(f"{name}: {argument} must have shape [{n}] as boxes has, got {list(value.shape)}")
        if not jnp.issubdtype(value.dtype, kind):
            raise TypeError(f"{name}: {argument} must be {kind.__name__}, got {value.dtype}")
    if not jnp.issubdtype(boxes.dtype, jnp.floating):
        raise TypeError(f"{name}: boxes must be floating, got {boxes.dtype}")
    if max_output is not None and max_output < 0:
        raise ValueError(f"{name}: max_output must not be negative, got {max_output}")
    capacity = n if max_output is None else int(max_output)
    if n == 0 or capacity == 0:
        return jnp.full((capacity,), -1, jnp.int32)
    threshold = _threshold(iou_threshold, _compute_dtype(boxes.dtype))
    return _kept(boxes, scores, idxs, valid, threshold, capacity=capacity)


@functools.partial(jax.jit, static_argnames="capacity")
def _kept(
    boxes: jax.Array,
    scores: jax.Array,
    idxs: jax.Array | None,
    valid: jax.Array | None,
    threshold: jax.Array,
    *,
    capacity: int,
) -> jax.Array:
    boxes = lax.stop_gradient(boxes).astype(_compute_dtype(boxes.dtype))
    keys = _sort_keys(lax.stop_gradient(scores), valid)
    rows = jax.tree.map(lambda x: x[None], (boxes, keys, idxs, threshold))
    return greedy(*rows, capacity=capacity)[0]


def _compute_dtype(dtype):
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def _sort_keys(scores, valid):
    """Keys that ``top_k`` orders on every backend as torch orders the scores; -inf marks a box that is not valid.

    A NaN score becomes +inf. Infinite scores become the largest and the lowest finite value.
    """
    scores = scores.astype(_compute_dtype(scores.dtype))
    largest = jnp.finfo(scores.dtype).max
    keys = jnp.where(jnp.isnan(scores), jnp.inf, jnp.clip(scores, -largest, largest))
    keys = jnp.where(keys == 0, jnp.zeros_like(keys), keys)  # top_k would rank 0.0 above -0.0
    return keys if valid is None else jnp.where(valid, keys, -jnp.inf)


def _threshold(iou_threshold, dtype):
    """The largest number of ``dtype`` not above the threshold, so that ``iou >`` it decides as in double precision."""
    if isinstance(iou_threshold, (int, float, np.floating)):
        with np.errstate(over="ignore"):
            rounded = np.asarray(iou_threshold, dtype)
        above = np.float64(rounded) > np.float64(iou_threshold)
        return jnp.asarray(np.nextafter(rounded, np.asarray(-np.inf, dtype)) if above else rounded)
    threshold = lax.stop_gradient(jnp.asarray(iou_threshold))
    if threshold.ndim != 0 or not jnp.issubdtype(threshold.dtype, jnp.floating):
        given = f"{threshold.dtype}{list(threshold.shape)}"
        raise ValueError(f"iou_threshold must be one floating-point number, got {given}")
    rounded = threshold.astype(dtype)
    wide = _compute_dtype(threshold.dtype) if dtype == jnp.float32 else jnp.float64
    below = jnp.nextafter(rounded, jnp.full_like(rounded, -jnp.inf))
    return jnp.where(rounded.astype(wide) > threshold.astype(wide), below, rounded)
