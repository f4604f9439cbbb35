"""A 3x3 convolution column by column, for which XLA:CPU computes the gradient of the kernel quickly."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def by_columns(x: Array, kernel: Array, **kwargs: Any) -> Array:
    """A 3x3 convolution of stride 1, padded by 1, as a sum of three 3x1 convolutions; for the gradient of the kernel.

    In a batch of few images, XLA:CPU reads patches of 3x1 cells more quickly than patches of 3x3 cells.
    """
    width = x.shape[2]
    conv = functools.partial(lax.conv_general_dilated, window_strides=(1, 1), padding=((1, 1), (0, 0)), **kwargs)
    columns = (jnp.pad(conv(x, kernel[:, j : j + 1]), ((0, 0), (0, 0), (2 - j, j), (0, 0))) for j in range(3))
    return functools.reduce(jnp.add, (column[:, :, 1 : 1 + width] for column in columns))
