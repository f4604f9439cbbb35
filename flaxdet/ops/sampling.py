"""Random choice of the anchors or proposals of one image that training looks at."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int
from numpy.typing import ArrayLike


def balanced_sample(
    key: jax.Array, labels: Int[ArrayLike, " N"], batch_size: int, positive_fraction: float
) -> tuple[Bool[Array, " N"], Bool[Array, " N"]]:
    """Chooses positives up to a share of the batch, and fills it with negatives, both uniformly at random.

    Reproduces ``torchvision.models.detection._utils.BalancedPositiveNegativeSampler``.

    Args:
        key: a JAX random key; equal keys choose equally.
        labels: [N] integers: -1 or less to be ignored, 0 negative, 1 and more positive.
        batch_size: most elements to choose, static.
        positive_fraction: in [0, 1], static; at most ``int(batch_size * positive_fraction)`` are positives.

    Returns:
        Two masks [N], the chosen positives and the chosen negatives. Where too few are available, all are
        chosen; positives don't fill up for missing negatives.

    Raises:
        ValueError: if ``batch_size`` is negative ``positive_fraction`` not in [0, 1], or labels no vector.
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
    """A uniformly random subset of the candidates: ``count`` of them, or all; ``count <= most``, static."""
    n = len(candidates)
    most = min(most, n)
    if not most:
        return jnp.zeros(n, bool)
    # top_k of random numbers rather than a permutation: N is 250,000 anchors, `most` 256. With 31 bits a tie
    # at the very cut happens once in thousands of draws, and then decides between two elements
    ticket = (jax.random.bits(key, (n,), jnp.uint32) >> 1).astype(jnp.int32)
    ticket, index = jax.lax.top_k(jnp.where(candidates, ticket, -1), most)
    chosen = (ticket >= 0) & (jnp.arange(most, dtype=jnp.int32) < count)
    return jnp.zeros(n, bool).at[index].set(chosen, unique_indices=True)
