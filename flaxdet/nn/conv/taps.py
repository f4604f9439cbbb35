"""A 3x3 convolution to few channels, as one matrix product with all nine taps."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def by_taps(x: Array, kernel: Array, precision: Any) -> Array:
    """A 3x3 convolution of stride 1, padded by 1, to few channels.

    One matrix product computes a term for each cell and tap; the result is the sum of the terms of the nine taps, each
    shifted by the tap. All terms together are smaller than ``x``. XLA:CPU would write patches of ``x`` to memory, which
    are nine times larger than ``x``.
    """
    height, width, channels = x.shape[1:]
    taps = kernel.transpose(2, 0, 1, 3).reshape(channels, -1)
    terms = lax.dot_general(x.reshape(-1, channels), taps, (((1,), (0,)), ((), ())), precision)
    terms = terms.reshape(*x.shape[:3], 3, 3, -1)
    terms = jnp.pad(terms, ((0, 0), (1, 1), (1, 1), (0, 0), (0, 0), (0, 0)))
    sums = (terms[:, i : i + height, j : j + width, i, j] for i in range(3) for j in range(3))
    return functools.reduce(jnp.add, sums)
