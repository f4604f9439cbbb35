"""A 3x3 convolution to few channels, as one product with all nine taps."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def by_taps(x: Array, kernel: Array, precision: Any) -> Array:
    """A 3x3 convolution of stride 1, padded by 1, to few channels: each tap's share of each cell, then nine sums.

    The shares together are smaller than ``x``; patches of ``x``, which XLA:CPU writes out, are nine times larger.
    """
    height, width, channels = x.shape[1:]
    taps = kernel.transpose(2, 0, 1, 3).reshape(channels, -1)
    shares = lax.dot_general(x.reshape(-1, channels), taps, (((1,), (0,)), ((), ())), precision)
    shares = shares.reshape(*x.shape[:3], 3, 3, -1)
    shares = jnp.pad(shares, ((0, 0), (1, 1), (1, 1), (0, 0), (0, 0), (0, 0)))
    sums = (shares[:, i : i + height, j : j + width, i, j] for i in range(3) for j in range(3))
    return functools.reduce(jnp.add, sums)
