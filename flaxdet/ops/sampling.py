"""Random sampling of the anchors or proposals of one image that the losses are computed from."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int
from numpy.typing import ArrayLike

from flaxdet.ops.top_k import top_k


def balanced_sample(
    key: jax.Array, labels: Int[ArrayLike, " N"], batch_size: int, positive_fraction: float
) -> tuple[Bool[Array, " N"], Bool[Array, " N"]]:
    """Samples positives, up to a fraction of ``batch_size``, and fills up with negatives, uniformly at random.

    Reproduces ``torchvision.models.detection._utils.BalancedPositiveNegativeSampler``.

    Args:
        key: a JAX random key; equal keys choose equally.
        labels: [N] integers: -1 or less to be ignored, 0 negative, 1 and more positive.
        batch_size: largest number of elements to choose, static.
        positive_fraction: in [0, 1], static; at most ``int(batch_size * positive_fraction)`` positives are chosen.

    Returns:
        Two masks [N], the chosen positives and the chosen negatives. If too few are available, all are
        chosen; missing negatives are not replaced with positives.

    Raises:
        ValueError: if ``batch_size`` is negative, ``positive_fraction`` is not in [0, 1], or ``labels`` is no vector.
    """
    if batch_size < 0:
        raise ValueError(f"batch_size must not be negative, found {batch_size!r}")
    if not 0 <= positive_fraction <= 1:
        raise ValueError(f"positive_fraction must lie in [0, 1], found {positive_fraction!r}")
    labels = jnp.asarray(labels)
    if labels.ndim != 1:
        raise ValueError(f"labels must be [N], found shape {list(labels.shape)}")
    positive, negative = labels >= 1, labels == 0
    most_positive = int(batch_size * positive_fraction)
    positive_key, negative_key = jax.random.split(key)
    chosen_positive = _choose(positive_key, positive, jnp.int32(most_positive), most_positive)
    room = batch_size - jnp.sum(chosen_positive, dtype=jnp.int32)
    return chosen_positive, _choose(negative_key, negative, room, batch_size)


def _choose(key: jax.Array, candidates: jax.Array, count: jax.Array, most: int) -> jax.Array:
    """Mask of ``count`` candidates chosen uniformly at random, or of all if fewer; ``most`` is a static bound."""
    n = len(candidates)
    most = min(most, n)
    if not most:
        return jnp.zeros(n, bool)
    # top_k of random numbers rather than a permutation: N is 250,000 anchors, `most` is 256. With 31 bits, a tie
    # at the cut happens once in thousands of draws, and then concerns two elements only
    ticket = (jax.random.bits(key, (n,), jnp.uint32) >> 1).astype(jnp.int32)
    ticket, index = top_k(jnp.where(candidates, ticket, -1), most)
    chosen = (ticket >= 0) & (jnp.arange(most, dtype=jnp.int32) < count)
    return jnp.zeros(n, bool).at[index].set(chosen, unique_indices=True)
