"""Greedy suppression in tiles: the algorithm of `flaxdet.ops.nms`, for a batch of images at once.

How it works ("lazy tiles"). A top-k takes the candidates best first, a chunk at a time; a chunk is processed in tiles.
In each tile, first the boxes that an already selected box suppresses are removed. Then a fixpoint iteration solves NMS
among the rest of the tile (in at most as many rounds as the tile has boxes, however the boxes overlap), and the
survivors are appended to the selected boxes. The algorithm stops when ``capacity`` boxes are selected or no candidate
is left. So the work grows with the number of selected boxes, not with the square of the number of candidates, and
there is no capacity that could overflow.

All images of a batch are in the same tile at the same time. An image that has finished takes part without effect, which
costs less than to mask the state of every loop, as ``jax.vmap`` of a loop would do.

The routes differ in the sizes alone. A CPU has least work with small tiles. A GPU or TPU has arithmetic to spare, and
each turn of a loop costs launches, so that large tiles take less time, and several rounds of the fixpoint iteration in
a turn. In eight photos of blood cells at 800x1088, with detectors trained on such photos, an accelerator's loops take
at most 12 turns for the 4,663 region proposals of a photo (34 with one round in a turn), and 4 for the detections.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from flaxdet.ops.top_k import top_k
from flaxdet.xla.routes import by_platform

LANES = 64  # a tile of fewer boxes than a route's is a multiple of it


class Sizes(NamedTuple):
    """Sizes of a route.

    Attributes:
        tile: boxes of a tile.
        block: selected boxes that a tile is compared with at a time.
        chunk: lowest number of candidates that one top-k takes: smaller chunks need more passes over all scores.
        whole: number of candidates up to which one chunk takes all of them.
        rounds: rounds of the fixpoint iteration in one turn of its loop.
    """

    tile: int
    block: int
    chunk: int
    whole: int
    rounds: int


CPU = Sizes(tile=64, block=512, chunk=512, whole=512, rounds=1)
ACCELERATOR = Sizes(tile=1024, block=4096, chunk=1024, whole=16384, rounds=4)


def greedy(
    boxes: jax.Array, keys: jax.Array, idxs: jax.Array | None, threshold: jax.Array, *, capacity: int
) -> jax.Array:
    """Selects boxes best first, dropping those that overlap a selected box of their category too much.

    ``jax.vmap`` of this function is this function of a larger batch. It has no derivative, so the arguments must be
    constants for differentiation (``lax.stop_gradient``).

    Args:
        boxes: [B, N, 4] xyxy.
        keys: [B, N], floating, no NaN: boxes are visited in descending order, among equal keys the lowest index first;
            -inf marks a box that doesn't take part.
        idxs: [B, N] integers, the category of each box; None for one category.
        threshold: [B], of the dtype of ``boxes``. A box is dropped if an IoU is greater.
        capacity: K, most boxes selected in each image, at least 1.

    Returns:
        [B, K] int32 indices, best first, filled up with -1.
    """
    return _of_capacity(capacity)(boxes, keys, idxs, threshold)


@functools.cache
def _of_capacity(capacity: int) -> Callable[..., jax.Array]:
    routes = {
        name: functools.partial(_greedy, capacity=capacity, sizes=sizes)
        for name, sizes in (("cpu", CPU), ("default", ACCELERATOR))
    }

    @jax.custom_batching.custom_vmap
    @jax.jit
    def select(boxes: jax.Array, keys: jax.Array, idxs: jax.Array | None, threshold: jax.Array) -> jax.Array:
        return by_platform(boxes, keys, idxs, threshold, **routes)

    @select.def_vmap
    def select_in_batches(axis_size: int, in_batched: Any, *args: Any) -> tuple[jax.Array, bool]:
        def merged(x: jax.Array, batched: bool) -> jax.Array:
            x = x if batched else jnp.broadcast_to(x[None], (axis_size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        kept = select(*jax.tree.map(merged, args, tuple(in_batched)))
        return kept.reshape(axis_size, -1, capacity), True

    return select


class _Boxes(NamedTuple):
    """Boxes as rows [B, 5, n] of x1, y1, x2, y2 and signed area, so that vector instructions read contiguous memory."""

    rows: jax.Array
    idxs: jax.Array | None

    def slice(self, start: jax.Array, size: int) -> _Boxes:
        return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, size, axis=-1), self)


def _suppresses(a: _Boxes, b: _Boxes, threshold: jax.Array) -> jax.Array:
    """[B, m, n] bool: box i of ``a`` and box j of ``b`` are of one category, and their IoU is above the threshold."""
    a_x1, a_y1, a_x2, a_y2, a_area = (a.rows[:, i, :, None] for i in range(5))
    b_x1, b_y1, b_x2, b_y2, b_area = (b.rows[:, i, None, :] for i in range(5))
    zero = jnp.zeros((), a.rows.dtype)
    width = jnp.maximum(jnp.minimum(a_x2, b_x2) - jnp.maximum(a_x1, b_x1), zero)
    height = jnp.maximum(jnp.minimum(a_y2, b_y2) - jnp.maximum(a_y1, b_y1), zero)
    intersection = width * height
    overlaps = intersection / (a_area + b_area - intersection) > threshold[:, None, None]  # False for NaN
    if a.idxs is None or b.idxs is None:
        return overlaps
    return overlaps & (a.idxs[:, :, None] == b.idxs[:, None, :])


def _resolve_tile(tile: _Boxes, alive: jax.Array, threshold: jax.Array, earlier: jax.Array, rounds: int) -> jax.Array:
    """Greedy NMS of one tile, whose boxes are in order, best first.

    Args:
        tile: boxes.
        alive: [B, T], the boxes that take part.
        threshold: [B], of the IoU.
        earlier: [T, T], True where the first index is before the second.
        rounds: rounds in a turn of the loop.

    Returns:
        [B, T], the boxes that are kept.
    """
    suppressed_by = _suppresses(tile, tile, threshold) & earlier.T[None] & alive[:, None, :]

    def body(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        before = after = state[0]
        for _ in range(rounds):
            before, after = after, alive & ~jnp.any(suppressed_by & after[:, None, :], axis=2)
        return after, jnp.any(after != before)

    # Box i is decided once all boxes before it are, so each round decides at least one more box: at most T rounds, and
    # the extra rounds of the last turn, which change nothing.
    keep, _ = lax.while_loop(lambda state: state[1], body, (alive, jnp.any(suppressed_by)))
    return keep


def _greedy(
    boxes: jax.Array, keys: jax.Array, idxs: jax.Array | None, threshold: jax.Array, *, capacity: int, sizes: Sizes
) -> jax.Array:
    batch, n = keys.shape
    in_lanes = -(-n // LANES) * LANES
    tile_size = min(sizes.tile, in_lanes)
    chunk = n if n <= sizes.whole else min(n, max(sizes.chunk, 2 * capacity))
    chunk = -(-chunk // tile_size) * tile_size
    taken = min(chunk, n)
    slots = -(-capacity // sizes.block) * sizes.block if capacity > sizes.block else capacity
    block = min(sizes.block, slots)
    index = jnp.arange(n, dtype=jnp.int32)[None]
    lane = jnp.arange(tile_size, dtype=jnp.int32)[None]
    earlier = lane > lane.T

    def next_chunk(last_key: jax.Array, last_index: jax.Array) -> tuple[_Boxes, jax.Array, jax.Array]:
        """The best ``chunk`` candidates after (last_key, last_index), in descending order of key."""
        rest = keys
        if taken < n:
            later = (keys < last_key[:, None]) | ((keys == last_key[:, None]) & (index > last_index[:, None]))
            rest = jnp.where(later, keys, -jnp.inf)
        best, order = top_k(rest, taken)
        x1, y1, x2, y2 = jnp.moveaxis(_take(boxes, order), -1, 0)
        rows = jnp.stack([x1, y1, x2, y2, (x2 - x1) * (y2 - y1)], axis=1)
        candidates = _Boxes(rows, None if idxs is None else _take(idxs, order))
        pad = chunk - taken
        candidates = jax.tree.map(lambda a: jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, pad)]), candidates)
        best = jnp.pad(best, [(0, 0), (0, pad)], constant_values=-jnp.inf)
        return candidates, jnp.pad(order, [(0, 0), (0, pad)]), best

    def suppressed_by_selected(tile: _Boxes, selected: _Boxes, count: jax.Array) -> jax.Array:
        if block == slots:
            return jnp.any(_suppresses(selected, tile, threshold), axis=1)

        def body(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            start, dead = state
            dead |= jnp.any(_suppresses(selected.slice(start, block), tile, threshold), axis=1)
            return start + block, dead

        start = (jnp.zeros((), jnp.int32), jnp.zeros((batch, tile_size), bool))
        return lax.while_loop(lambda state: state[0] < jnp.max(count), body, start)[1]

    def work_chunk(state: tuple[_Boxes, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]) -> tuple:
        selected, indices, count, last_key, last_index, _ = state
        candidates, order, best = next_chunk(last_key, last_index)
        total = jnp.sum(best > -jnp.inf, axis=1, dtype=jnp.int32)  # the candidates that are present come first

        def work_tile(state: tuple[jax.Array, _Boxes, jax.Array, jax.Array]) -> tuple:
            start, selected, indices, count = state
            tile = candidates.slice(start, tile_size)
            alive = (start + lane < total[:, None]) & (count < capacity)[:, None]
            alive &= ~suppressed_by_selected(tile, selected, count)
            keep = _resolve_tile(tile, alive, threshold, earlier, sizes.rounds)
            rank = jnp.sum(keep[:, :, None] & earlier[None], axis=1, dtype=jnp.int32)
            slot = jnp.where(keep, count[:, None] + rank, slots)  # out of range: dropped
            selected = jax.tree.map(functools.partial(_put, slot=slot), selected, tile)
            indices = _put(indices, lax.dynamic_slice_in_dim(order, start, tile_size, axis=1), slot=slot)
            return start + tile_size, selected, indices, count + rank[:, -1] + keep[:, -1].astype(jnp.int32)

        def more_tiles(state: tuple[jax.Array, _Boxes, jax.Array, jax.Array]) -> jax.Array:
            start, _, _, count = state
            return jnp.any((start < total) & (count < capacity))

        start = (jnp.zeros((), jnp.int32), selected, indices, count)
        _, selected, indices, count = lax.while_loop(more_tiles, work_tile, start)
        # A chunk that is not full contains the last candidate.
        return selected, indices, count, best[:, taken - 1], order[:, taken - 1], total == taken

    def more_chunks(state: tuple[_Boxes, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]) -> jax.Array:
        _, _, count, _, _, more = state
        return jnp.any(more & (count < capacity))

    # Free slots hold NaN boxes, which suppress nothing.
    selected = _Boxes(
        jnp.full((batch, 5, slots), jnp.nan, boxes.dtype),
        None if idxs is None else jnp.zeros((batch, slots), idxs.dtype),
    )
    indices = jnp.full((batch, slots), -1, jnp.int32)
    zeros = jnp.zeros(batch, jnp.int32)
    start = (selected, indices, zeros, jnp.full(batch, jnp.inf, keys.dtype), zeros - 1, jnp.ones(batch, bool))
    end = work_chunk(start) if taken == n else lax.while_loop(more_chunks, work_chunk, start)
    return end[1][:, :capacity]


@jax.vmap
def _take(values: jax.Array, index: jax.Array) -> jax.Array:
    return values.at[index].get(mode="promise_in_bounds")


def _put(buffer: jax.Array, values: jax.Array, *, slot: jax.Array) -> jax.Array:
    return jax.vmap(lambda buffer, values, slot: buffer.at[..., slot].set(values, mode="drop"))(buffer, values, slot)
