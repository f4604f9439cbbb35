"""A 3x3 convolution of a large map by Winograd's F(4, 3), with half the multiplications."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flaxdet.xla.barriers import materialise, wait_for_all

Array = jax.Array


def winograd(x: Array, kernel: Array, **kwargs: Any) -> Array:
    """A 3x3 convolution of stride 1, padded by 1, by F(4, 3) along the width; the six products are 3x1 convolutions.

    Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv 1509.09308). The points are 0,
    +-5/8, +-3/2 and infinity. Of all multiples of 1/8, these points have the smallest rounding error, two thirds of the
    error of 0, +-1 and +-2. F(4, 3) along the height as well is no quicker on XLA:CPU, since more maps pass through
    memory.
    """
    # The barrier delays the transform of the kernel until the map is computed. Without it, XLA holds the transformed
    # kernels of all layers in memory at once.
    x, kernel = wait_for_all((x, kernel))
    width = x.shape[2]
    quads = -(-width // 4)
    x = jnp.pad(x, ((0, 0), (0, 0), (1, 4 * quads + 1 - width), (0, 0)))
    d0, d1, d2, d3, d4, d5 = (lax.slice_in_dim(x, i, i + 4 * quads - 3, 4, axis=2) for i in range(6))
    g0, g1, g2 = (kernel[:, i : i + 1] for i in range(3))
    a, b = 5 / 8, 3 / 2
    aa, bb = a * a, b * b
    conv = functools.partial(lax.conv_general_dilated, window_strides=(1, 1), padding=((1, 1), (0, 0)), **kwargs)

    def at(point: float, even: Array, odd: Array, square: float, other: float) -> tuple[Array, Array]:
        """The products at a point and at the negative of the point."""
        scale = 0.5 / (square * (square - other))
        even_kernel, odd_kernel = (g0 + square * g2) * scale, g1 * (point * scale)
        return conv(even + point * odd, even_kernel + odd_kernel), conv(even - point * odd, even_kernel - odd_kernel)

    at_zero = conv(d4 - (aa + bb) * d2 + aa * bb * d0, g0 * (1 / (aa * bb)))
    at_a, at_minus_a = at(a, d4 - bb * d2, d3 - bb * d1, aa, bb)
    at_b, at_minus_b = at(b, d4 - aa * d2, d3 - aa * d1, bb, aa)
    at_infinity = conv(d5 - (aa + bb) * d3 + aa * bb * d1, g2)
    sum_a, difference_a = at_a + at_minus_a, at_a - at_minus_a
    sum_b, difference_b = at_b + at_minus_b, at_b - at_minus_b
    columns = (
        at_zero + sum_a + sum_b,
        a * difference_a + b * difference_b,
        aa * sum_a + bb * sum_b,
        a * aa * difference_a + b * bb * difference_b + at_infinity,
    )
    y = jnp.stack(columns, axis=3).reshape(*x.shape[:2], 4 * quads, -1)
    # Without the barrier, XLA computes these sums again in every pass over the result, and saves the six products for
    # the backward pass.
    return materialise(y[:, :, :width])
