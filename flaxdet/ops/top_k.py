"""The largest values of rows: ``lax.top_k``, by a route that suits each platform.

GPUs and TPUs sort the whole row for a large k. The route of groups sorts a small part of the row: the k largest values
are in the k groups with the largest maxima. (If a value's group is not among them, then each of the k groups has a
value that is larger, or equal with a lower index.) So the maxima of groups are ranked first, in groups of their own if
they are many; then the values of the best k groups, likewise.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from flaxdet.xla.barriers import materialise
from flaxdet.xla.routes import by_platform

SORTED = 8192  # a row of at most this many values is sorted as a whole
# Sizes of groups: the first size that divides the row into at least FEWEST * k groups, else the last.
GROUPS, FEWEST = (64, 8), 4


def top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest values along the last axis; among equal values, the lowest index first.

    Args:
        x: [..., N], floating or signed integers.
        k: at most N.

    Returns:
        The values [..., k] in descending order, and their int32 indices. NaN counts as the largest value.
    """
    route = functools.partial(_in_groups, k=k) if x.shape[-1] > SORTED else functools.partial(_by_sorting, k=k)
    # without the barrier XLA:CPU may fuse a slice into the top-k, and then compiles a full sort
    return materialise(by_platform(x, cpu=functools.partial(_by_sorting, k=k), default=route))


def _by_sorting(x: jax.Array, *, k: int) -> tuple[jax.Array, jax.Array]:
    values, index = lax.top_k(x, k)
    return values, index.astype(jnp.int32)


def _in_groups(x: jax.Array, *, k: int) -> tuple[jax.Array, jax.Array]:
    index = _best(_ordered(x), k)
    return jnp.take_along_axis(x, index, axis=-1, mode="promise_in_bounds"), index


def _ordered(x: jax.Array) -> jax.Array:
    """Integers in the order in which ``lax.top_k`` ranks floats, -0 below 0: a maximum of them is one of them."""
    if jnp.issubdtype(x.dtype, jnp.integer):
        return x
    kind, bits = (jnp.int64, 63) if x.dtype == jnp.float64 else (jnp.int32, 31)
    x = jnp.where(jnp.isnan(x), jnp.nan, x if kind == jnp.int64 else x.astype(jnp.float32))
    signed = lax.bitcast_convert_type(x, kind)
    return jnp.where(signed < 0, signed ^ kind((1 << bits) - 1), signed)


def _best(keys: jax.Array, k: int) -> jax.Array:
    """Indices of the k largest integers along the last axis."""
    n = keys.shape[-1]
    groups = [-(-n // size) for size in GROUPS]
    size = next((size for size, count in zip(GROUPS, groups, strict=True) if count >= FEWEST * k), GROUPS[-1])
    count = -(-n // size)
    if n <= SORTED or count <= k:
        return lax.top_k(keys, k)[1].astype(jnp.int32)
    # padding has the lowest key and the highest indices
    pad = [(0, 0)] * (keys.ndim - 1) + [(0, count * size - n)]
    rows = jnp.pad(keys, pad, constant_values=jnp.iinfo(keys.dtype).min).reshape(*keys.shape[:-1], count, size)
    # in ascending order, so that equal values keep their order
    chosen = jnp.sort(_best(rows.max(axis=-1), k), axis=-1)
    candidates = jnp.take_along_axis(rows, chosen[..., None], axis=-2, mode="promise_in_bounds")
    place = _best(candidates.reshape(*keys.shape[:-1], k * size), k)
    group = jnp.take_along_axis(chosen, place // size, axis=-1, mode="promise_in_bounds")
    return group * size + place % size
