"""Exact greedy non-maximum suppression with static shapes: torchvision's answers, inside ``jit``.

How it works ("lazy tiles"). ``top_k`` takes the candidates best first, a chunk at a time; a chunk is processed in
tiles of 64 boxes. In each tile, first the boxes that an already selected box suppresses are removed. Then a fixpoint
iteration solves NMS among the rest of the tile (in at most 64 rounds, however the boxes overlap), and the survivors
are appended to the selected boxes. The algorithm stops when ``max_output`` boxes are selected or no candidate is left.
So the work grows with the number of selected boxes, not with the square of the number of candidates, and there is no
capacity that could overflow.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int
from numpy.typing import ArrayLike

from flaxdet.xla.barriers import materialise

TILE = 64
BLOCK = 512  # selected boxes that a tile is compared with at a time
MIN_CHUNK = 512  # lowest number of candidates sorted at a time: smaller chunks need more passes over all scores


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


def _checked(name, boxes, scores, idxs, iou_threshold, max_output, valid) -> jax.Array:
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
    boxes = lax.stop_gradient(boxes).astype(_compute_dtype(boxes.dtype))
    keys = _sort_keys(lax.stop_gradient(scores), valid)
    return _greedy(boxes, keys, idxs, _threshold(iou_threshold, boxes.dtype), capacity=capacity)


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


class _Boxes(NamedTuple):
    """Boxes as rows [5, n] of x1, y1, x2, y2 and signed area, so that vector instructions read contiguous memory."""

    rows: jax.Array
    idxs: jax.Array | None

    def slice(self, start, size):
        return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, size, axis=-1), self)


def _suppresses(a: _Boxes, b: _Boxes, threshold):
    """[m, n] bool: box i of ``a`` and box j of ``b`` are of one category, and their IoU is above the threshold."""
    a_x1, a_y1, a_x2, a_y2, a_area = a.rows[:, :, None]
    b_x1, b_y1, b_x2, b_y2, b_area = b.rows[:, None, :]
    zero = jnp.zeros((), a.rows.dtype)
    width = jnp.maximum(jnp.minimum(a_x2, b_x2) - jnp.maximum(a_x1, b_x1), zero)
    height = jnp.maximum(jnp.minimum(a_y2, b_y2) - jnp.maximum(a_y1, b_y1), zero)
    intersection = width * height
    overlaps = intersection / (a_area + b_area - intersection) > threshold  # False for NaN
    if a.idxs is None or b.idxs is None:
        return overlaps
    return overlaps & (a.idxs[:, None] == b.idxs[None, :])


def _resolve_tile(tile: _Boxes, alive, threshold):
    """Greedy NMS of one tile, whose boxes are in order, best first; ``alive`` [TILE] says which boxes take part."""
    order = jnp.arange(TILE, dtype=jnp.int32)
    earlier = order[:, None] < order[None, :]
    suppresses = _suppresses(tile, tile, threshold) & earlier & alive[:, None]

    def body(state):
        keep, _ = state
        after = alive & ~jnp.any(suppresses & keep[:, None], axis=0)
        return after, jnp.any(after != keep)

    # Box i is decided once all boxes before it are, so each round decides at least one more: TILE rounds at most.
    keep, _ = lax.while_loop(lambda state: state[1], body, (alive, jnp.any(suppresses)))
    return keep


@functools.partial(jax.jit, static_argnames="capacity")
def _greedy(boxes, keys, idxs, threshold, *, capacity):
    n = keys.shape[0]
    chunk = min(-(-n // TILE) * TILE, max(MIN_CHUNK, -(-2 * capacity // TILE) * TILE))
    taken = min(chunk, n)
    slots = -(-capacity // BLOCK) * BLOCK if capacity > BLOCK else capacity
    block = min(BLOCK, slots)
    index = jnp.arange(n, dtype=jnp.int32)

    def next_chunk(last_key, last_index):
        """The best ``chunk`` candidates after (last_key, last_index), in descending order of key."""
        later = (keys < last_key) | ((keys == last_key) & (index > last_index))
        # Without the barrier XLA slices inside top_k, which it then compiles as a full sort.
        best, order = materialise(lax.top_k(jnp.where(later, keys, -jnp.inf), taken))
        order = order.astype(jnp.int32)
        x1, y1, x2, y2 = boxes.at[order].get(mode="promise_in_bounds").T
        rows = jnp.stack([x1, y1, x2, y2, (x2 - x1) * (y2 - y1)])
        candidates = _Boxes(rows, None if idxs is None else idxs.at[order].get(mode="promise_in_bounds"))
        pad = chunk - taken
        candidates = jax.tree.map(lambda a: jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, pad)]), candidates)
        present = jnp.pad(best > -jnp.inf, (0, pad))
        return candidates, jnp.pad(order, (0, pad)), present, best[-1], order[-1]

    def suppressed_by_selected(tile: _Boxes, selected: _Boxes, count):
        def body(state):
            start, dead = state
            dead |= jnp.any(_suppresses(selected.slice(start, block), tile, threshold), axis=0)
            return start + block, dead

        start = (jnp.zeros((), jnp.int32), jnp.zeros(TILE, bool))
        return lax.while_loop(lambda state: state[0] < count, body, start)[1]

    def work_chunk(state):
        selected, indices, count, last_key, last_index, _ = state
        candidates, order, present, last_key, last_index = next_chunk(last_key, last_index)
        total = jnp.sum(present, dtype=jnp.int32)  # the candidates that are present come first

        def work_tile(state):
            start, selected, indices, count = state
            tile = candidates.slice(start, TILE)
            alive = lax.dynamic_slice_in_dim(present, start, TILE)
            alive &= ~suppressed_by_selected(tile, selected, count)
            keep = _resolve_tile(tile, alive, threshold)
            position = count + jnp.cumsum(keep, dtype=jnp.int32) - 1
            position = jnp.where(keep, position, slots)  # out of range: dropped
            put = functools.partial(_put, position=position)
            selected = jax.tree.map(put, selected, tile)
            indices = put(indices, lax.dynamic_slice_in_dim(order, start, TILE))
            return start + TILE, selected, indices, count + jnp.sum(keep, dtype=jnp.int32)

        def more_tiles(state):
            start, _, _, count = state
            return (start < total) & (count < capacity)

        start = (jnp.zeros((), jnp.int32), selected, indices, count)
        _, selected, indices, count = lax.while_loop(more_tiles, work_tile, start)
        # A chunk that is not full contains the last candidate.
        return selected, indices, count, last_key, last_index, total == taken

    def more_chunks(state):
        _, _, count, _, _, more = state
        return more & (count < capacity)

    # Free slots hold NaN boxes, which suppress nothing.
    selected = _Boxes(
        jnp.full((5, slots), jnp.nan, boxes.dtype),
        None if idxs is None else jnp.zeros(slots, idxs.dtype),
    )
    indices = jnp.full(slots, -1, jnp.int32)
    start = (selected, indices, jnp.int32(0), jnp.asarray(jnp.inf, keys.dtype), jnp.int32(-1), jnp.bool_(True))
    return lax.while_loop(more_chunks, work_chunk, start)[1][:capacity]


def _put(buffer, values, *, position):
    return buffer.at[..., position].set(values, mode="drop")
