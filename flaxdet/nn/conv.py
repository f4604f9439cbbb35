"""``lax.conv_general_dilated`` in the form that XLA:CPU computes quickly; its numbers but for the order of sums."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flaxdet.nn.dot import bilinear, product
from flaxdet.xla.routes import by_platform

Array = jax.Array

# Below these the transforms of maps and kernels cost more than the products they save.
_WINOGRAD_CELLS = 1200
_WINOGRAD_CHANNELS = 64
# XLA:CPU reads the patches of a kernel's gradient in runs of as many numbers as there are images.
_FEW_IMAGES = 4
# An image's. With more, XLA:CPU reads patches of single pixels as quickly.
_FEW_CHANNELS = 4


def conv_general_dilated(lhs: Array, rhs: Array, window_strides: Any, padding: Any, **kwargs: Any) -> Array:
    """``lax.conv_general_dilated`` for NHWC maps and HWIO kernels, as ``flaxdet.nn.layers.Conv`` calls it.

    A plain 1x1 convolution is written as a product over the channels, which XLA:CPU computes more quickly (ResNet-50's
    body takes a seventh less). Where the program runs on a CPU, plain 3x3 convolutions in float32 or float64 take other
    forms: of large maps Winograd's, with half the multiplications (FCOS takes a quarter less; it rounds twice as much
    as XLA's own sum, about as much as torch's); to few channels a product with all nine taps (half the time, and a
    quarter with the gradients). ResNet's stem becomes a convolution over cells of 2x2 pixels (two thirds of the time).
    Gradients of 1x1 convolutions are those of ``flaxdet.nn.dot``, those of the kernels of the other 3x3 convolutions of
    few images are taken column by column (a quarter less time), both where CPUs' routes are taken.

    Args:
        lhs: [B, H, W, Cin].
        rhs: [kh, kw, Cin, Cout].
        window_strides: (rows, columns).
        padding: ((top, bottom), (left, right)).
        **kwargs: as ``lax.conv_general_dilated``.

    Returns:
        [B, h, w, Cout].
    """
    strides, pads = tuple(window_strides), tuple(tuple(pair) for pair in padding)
    plain = functools.partial(lax.conv_general_dilated, window_strides=strides, padding=pads, **kwargs)
    dilated = any(tuple(kwargs.get(name) or (1, 1)) != (1, 1) for name in ("lhs_dilation", "rhs_dilation"))
    if dilated or kwargs.get("feature_group_count", 1) != 1:
        return plain(lhs, rhs)
    precision = kwargs.get("precision")
    if rhs.shape[:2] == (1, 1) and not any(sum(pads, ())):
        if strides != (1, 1):
            lhs = lhs[:, :: strides[0], :: strides[1]]
        return product(lhs.reshape(-1, lhs.shape[-1]), rhs[0, 0], precision).reshape(*lhs.shape[:-1], -1)
    if lhs.dtype not in (jnp.float32, jnp.float64):
        return plain(lhs, rhs)
    quick = None
    if (rhs.shape[:2], strides, pads) == ((7, 7), (2, 2), ((3, 3), (3, 3))) and rhs.shape[2] <= _FEW_CHANNELS:
        quick = functools.partial(_by_quarters, **kwargs)
    if (rhs.shape[:2], strides, pads) == ((3, 3), (1, 1), ((1, 1), (1, 1))):
        if 9 * rhs.shape[3] < rhs.shape[2]:
            quick = functools.partial(_by_taps, precision=precision)
        elif lhs.shape[1] * lhs.shape[2] >= _WINOGRAD_CELLS and min(rhs.shape[2:]) >= _WINOGRAD_CHANNELS:
            quick = functools.partial(_winograd, **kwargs)
        elif isinstance(lhs.shape[0], int) and lhs.shape[0] <= _FEW_IMAGES:  # an exported program's batch is open
            return bilinear(plain, plain, functools.partial(_by_columns, **kwargs))(lhs, rhs)
    if quick is None:
        return plain(lhs, rhs)
    return by_platform(lhs, rhs, cpu=quick, default=plain)


def _by_quarters(x: Array, kernel: Array, **kwargs: Any) -> Array:
    """A 7x7 convolution of stride 2, padded by 3: with an eighth tap of zero, a 4x4 one over cells of 2x2 pixels."""
    batch, height, width, channels = x.shape
    rows, columns = -(-height // 2), -(-width // 2)
    x = jnp.pad(x, ((0, 0), (3, 2 * rows + 3 - height), (3, 2 * columns + 3 - width), (0, 0)))
    x = x.reshape(batch, rows + 3, 2, columns + 3, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    kernel = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0)))
    kernel = kernel.reshape(4, 2, 4, 2, channels, -1).transpose(0, 2, 1, 3, 4, 5)
    x, kernel = x.reshape(*x.shape[:3], -1), kernel.reshape(4, 4, 4 * channels, -1)
    return lax.conv_general_dilated(x, kernel, (1, 1), ((0, 0), (0, 0)), **kwargs)


def _by_columns(x: Array, kernel: Array, **kwargs: Any) -> Array:
    """A 3x3 convolution of stride 1, padded by 1: the sum of three 3x1 ones, for the gradient of its kernel.

    XLA:CPU reads patches of three rows more quickly than those of three rows and columns, as long as images are few.
    """
    width = x.shape[2]
    conv = functools.partial(lax.conv_general_dilated, window_strides=(1, 1), padding=((1, 1), (0, 0)), **kwargs)
    columns = (jnp.pad(conv(x, kernel[:, j : j + 1]), ((0, 0), (0, 0), (2 - j, j), (0, 0))) for j in range(3))
    return sum(column[:, :, 1 : 1 + width] for column in columns)  # pyright: ignore[reportReturnType]


def _by_taps(x: Array, kernel: Array, precision: Any) -> Array:
    """A 3x3 convolution of stride 1, padded by 1, to few channels: each tap's share of each cell, then nine sums.

    The shares together are smaller than ``x``; patches of ``x``, which XLA:CPU writes out, are nine times larger.
    """
    height, width, channels = x.shape[1:]
    taps = kernel.transpose(2, 0, 1, 3).reshape(channels, -1)
    shares = lax.dot_general(x.reshape(-1, channels), taps, (((1,), (0,)), ((), ())), precision)
    shares = shares.reshape(*x.shape[:3], 3, 3, -1)
    shares = jnp.pad(shares, ((0, 0), (1, 1), (1, 1), (0, 0), (0, 0), (0, 0)))
    return sum(shares[:, i : i + height, j : j + width, i, j] for i in range(3) for j in range(3))  # pyright: ignore[reportReturnType]


def _winograd(x: Array, kernel: Array, **kwargs: Any) -> Array:
    """A 3x3 convolution of stride 1, padded by 1: F(4, 3) along the columns, each of its six products a 3x1 one.

    Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv 1509.09308), at the points 0, +-5/8,
    +-3/2 and infinity: of the multiples of 1/8 in their place these round least, two thirds of what 0, +-1 and +-2 do.
    In both directions XLA:CPU gains no more, since more maps pass through memory.
    """
    # each kernel transformed when its map is there: else XLA holds those of all layers at once
    x, kernel = lax.optimization_barrier((x, kernel))
    width = x.shape[2]
    quads = -(-width // 4)
    x = jnp.pad(x, ((0, 0), (0, 0), (1, 4 * quads + 1 - width), (0, 0)))
    d0, d1, d2, d3, d4, d5 = (lax.slice_in_dim(x, i, i + 4 * quads - 3, 4, axis=2) for i in range(6))
    g0, g1, g2 = (kernel[:, i : i + 1] for i in range(3))
    a, b = 5 / 8, 3 / 2
    aa, bb = a * a, b * b
    conv = functools.partial(lax.conv_general_dilated, window_strides=(1, 1), padding=((1, 1), (0, 0)), **kwargs)

    def at(point: float, even: Array, odd: Array, square: float, other: float) -> tuple[Array, Array]:
        """The products at a point and at its negative."""
        scale = 0.5 / (square * (square - other))
        own, next_to = (g0 + square * g2) * scale, g1 * (point * scale)
        return conv(even + point * odd, own + next_to), conv(even - point * odd, own - next_to)

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
    # else XLA computes these sums again in every pass over the result, and keeps the products for the gradient
    return lax.optimization_barrier(y[:, :, :width])
