"""``lax.conv_general_dilated`` in the form that XLA:CPU computes quickly; its numbers but for the order of sums."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flaxdet.nn.dot import bilinear, product

Array = jax.Array

# Below these the transforms of maps and kernels cost more than the products they save.
_WINOGRAD_CELLS = 800
_WINOGRAD_CHANNELS = 64
# XLA:CPU reads the patches of a kernel's gradient in runs of as many numbers as there are images.
_FEW_IMAGES = 4
# An image's. With more, XLA:CPU reads patches of single pixels as quickly.
_FEW_CHANNELS = 4


def conv_general_dilated(lhs: Array, rhs: Array, window_strides: Any, padding: Any, **kwargs: Any) -> Array:
    """What ``flax.linen.Conv`` calls: ``lax.conv_general_dilated`` for NHWC maps and HWIO kernels.

    A plain 1x1 convolution is written as a product over the channels, which XLA:CPU computes more quickly (ResNet-50's
    body takes a seventh less). Where the program runs on a CPU, plain 3x3 convolutions in float32 or float64 take other
    forms: of large maps Winograd's, with a third fewer multiplications (FCOS takes a tenth less; its rounding is 1.3
    times that of the plain sum, whose own order of sums no library fixes); to few channels a product with all nine taps
    (half the time, and a quarter with the gradients). ResNet's stem becomes a convolution over cells of 2x2 pixels
    (two thirds of the time). Gradients of 1x1 convolutions are those of ``flaxdet.nn.dot``, those of the kernels of the
    other 3x3 convolutions of few images are taken column by column (a quarter less time), both where the default
    backend is a CPU.

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
    return lax.platform_dependent(lhs, rhs, cpu=quick, default=plain)


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
    """A 3x3 convolution of stride 1, padded by 1: F(2, 3) along the columns, each of its four products a 3x1 one.

    Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv 1509.09308). In both directions XLA:CPU
    gains no more, since more maps pass through memory; F(4, 3) triples the rounding.
    """
    # each kernel transformed when its map is there: else XLA holds those of all layers at once
    x, kernel = lax.optimization_barrier((x, kernel))
    width = x.shape[2]
    pairs = -(-width // 2)
    zero = jnp.zeros((), x.dtype)
    x = lax.pad(x, zero, ((0, 0, 0), (0, 0, 0), (1, 2 * pairs + 1 - width, 0), (0, 0, 0)))
    d0, d1, d2, d3 = (lax.slice_in_dim(x, i, i + 2 * pairs - 1, 2, axis=2) for i in range(4))
    g0, g1, g2 = (kernel[:, i : i + 1] for i in range(3))
    half = jnp.asarray(0.5, kernel.dtype)
    conv = functools.partial(lax.conv_general_dilated, window_strides=(1, 1), padding=((1, 1), (0, 0)), **kwargs)
    m0 = conv(d0 - d2, g0)
    m1 = conv(d1 + d2, (g0 + g1 + g2) * half)
    m2 = conv(d2 - d1, (g0 - g1 + g2) * half)
    m3 = conv(d1 - d3, g2)
    even, odd = m0 + m1 + m2, m1 - m2 - m3
    columns = [lax.pad(y, zero, ((0, 0, 0), (0, 0, 0), (i, 1 - i, 1), (0, 0, 0))) for i, y in enumerate((even, odd))]
    # else XLA adds the two up again in every pass over the result, and keeps both for the gradient
    return lax.optimization_barrier((columns[0] + columns[1])[:, :, :width])
