"""``lax.conv_general_dilated`` by the route that is quick: the same numbers up to the order of sums."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flaxdet.nn.conv.columns import by_columns
from flaxdet.nn.conv.stem import by_quarters
from flaxdet.nn.conv.taps import by_taps
from flaxdet.nn.conv.winograd import winograd
from flaxdet.nn.dot import bilinear, product
from flaxdet.xla.routes import by_platform

Array = jax.Array

# Winograd pays from so many cells and channels on; below, the transforms cost more than the products they save.
_WINOGRAD_CELLS = 1200
_WINOGRAD_CHANNELS = 64
# XLA:CPU reads the patches of a kernel's gradient in runs of as many numbers as there are images.
_FEW_IMAGES = 4
# The stem rewrite pays only for inputs of at most this many channels; wider inputs are as quick in XLA's own form.
_FEW_CHANNELS = 4


def conv_general_dilated(lhs: Array, rhs: Array, window_strides: Any, padding: Any, **kwargs: Any) -> Array:
    """``lax.conv_general_dilated`` for NHWC maps and HWIO kernels, as ``flaxdet.nn.layers.Conv`` calls it.

    A plain 1x1 convolution is written as a product over the channels, which XLA:CPU computes more quickly (ResNet-50's
    body takes a seventh less); ``flaxdet.nn.dot`` has the gradients. Where the program runs on a CPU, convolutions in
    float32 or float64 take other forms:

    - plain 3x3 ones of large maps: Winograd's, with half the multiplications (FCOS takes a quarter less; it rounds
      twice as much as XLA's own sum, about as much as torch's), ``winograd.py``;
    - plain 3x3 ones to few channels: a product with all nine taps (half the time, a quarter with the gradients),
      ``taps.py``;
    - ResNet's stem: a convolution over cells of 2x2 pixels (two thirds of the time), ``stem.py``;
    - the other plain 3x3 ones of few images: gradients of kernels column by column, where CPUs' routes are taken (a
      quarter less time), ``columns.py``.

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
        quick = functools.partial(by_quarters, **kwargs)
    if (rhs.shape[:2], strides, pads) == ((3, 3), (1, 1), ((1, 1), (1, 1))):
        if 9 * rhs.shape[3] < rhs.shape[2]:
            quick = functools.partial(by_taps, precision=precision)
        elif lhs.shape[1] * lhs.shape[2] >= _WINOGRAD_CELLS and min(rhs.shape[2:]) >= _WINOGRAD_CHANNELS:
            quick = functools.partial(winograd, **kwargs)
        elif isinstance(lhs.shape[0], int) and lhs.shape[0] <= _FEW_IMAGES:  # an exported program's batch is open
            return bilinear(plain, plain, functools.partial(by_columns, **kwargs))(lhs, rhs)
    if quick is None:
        return plain(lhs, rhs)
    return by_platform(lhs, rhs, cpu=quick, default=plain)
