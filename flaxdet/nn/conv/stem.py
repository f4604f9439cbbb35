"""ResNet's stem, a 7x7 convolution of stride 2, as a 4x4 convolution over cells of 2x2 pixels."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def by_quarters(x: Array, kernel: Array, **kwargs: Any) -> Array:
    """A 7x7 convolution of stride 2, padded by 3, as a 4x4 convolution over cells of 2x2 pixels.

    Zeros extend the kernel to 8x8 taps, which make 4x4 cells of 2x2 taps.
    """
    batch, height, width, channels = x.shape
    rows, columns = -(-height // 2), -(-width // 2)
    x = jnp.pad(x, ((0, 0), (3, 2 * rows + 3 - height), (3, 2 * columns + 3 - width), (0, 0)))
    x = x.reshape(batch, rows + 3, 2, columns + 3, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    kernel = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0)))
    kernel = kernel.reshape(4, 2, 4, 2, channels, -1).transpose(0, 2, 1, 3, 4, 5)
    x, kernel = x.reshape(*x.shape[:3], -1), kernel.reshape(4, 4, 4 * channels, -1)
    return lax.conv_general_dilated(x, kernel, (1, 1), ((0, 0), (0, 0)), **kwargs)
