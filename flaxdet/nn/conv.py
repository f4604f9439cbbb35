"""``lax.conv_general_dilated`` in the forms that XLA:CPU computes quickly; its numbers but for the order of sums."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
Pairs = tuple[tuple[int, int], ...]

_NHWC = ("NHWC", "HWIO", "NHWC")
_WIDE = 128  # channels from which the gradient by products is the quicker one


def conv_general_dilated(lhs: Array, rhs: Array, window_strides: Any, padding: Any, **kwargs: Any) -> Array:
    """What ``flax.linen.Conv`` calls: ``lax.conv_general_dilated`` for NHWC maps and HWIO kernels.

    Two things that XLA:CPU is slow at are written otherwise. A plain 1x1 convolution is a product over the channels
    (ResNet-50's body takes a seventh less). The gradient of a wide kernel is a product for each of its cells instead
    of a convolution whose window is the whole map, on CPUs alone (a training step takes a third to a half less).

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
    dilated = any(tuple(kwargs.get(name) or (1, 1)) != (1, 1) for name in ("lhs_dilation", "rhs_dilation"))
    if dilated or kwargs.get("feature_group_count", 1) != 1:
        return lax.conv_general_dilated(lhs, rhs, strides, pads, **kwargs)
    precision = kwargs.get("precision")
    if rhs.shape[:2] == (1, 1) and not any(sum(pads, ())):
        if strides != (1, 1):
            lhs = lhs[:, :: strides[0], :: strides[1]]
        # in two dimensions, for the sake of its gradient
        product = lax.dot_general(lhs.reshape(-1, lhs.shape[-1]), rhs[0, 0], (((1,), (0,)), ((), ())), precision)
        return product.reshape(*lhs.shape[:-1], -1)
    if min(rhs.shape[2:]) >= _WIDE:
        return _wide(lhs, rhs, strides, pads, precision)
    return _plain(lhs, rhs, strides, pads, precision)


def _plain(x: Array, kernel: Array, strides: tuple[int, ...], padding: Pairs, precision: Any) -> Array:
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=_NHWC, precision=precision)


_wide = jax.custom_vjp(_plain, nondiff_argnums=(2, 3, 4))


def _wide_forward(x: Array, kernel: Array, *options: Any) -> tuple[Array, tuple[Array, Array]]:
    return _plain(x, kernel, *options), (x, kernel)


def _wide_backward(
    strides: tuple[int, ...], padding: Pairs, precision: Any, residuals: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    x, kernel = residuals
    options = (strides, padding, precision)
    (by_x,) = jax.vjp(lambda x: _plain(x, kernel, *options), x)[1](cotangent)

    def by_convolution(x: Array, cotangent: Array) -> Array:
        zeros = jnp.zeros(kernel.shape, kernel.dtype)  # linear in the kernel: any will do
        return jax.vjp(lambda kernel: _plain(x, kernel, *options), zeros)[1](cotangent)[0]

    by_products = functools.partial(_kernel_gradient, size=kernel.shape[:2], options=options)
    return by_x, lax.platform_dependent(x, cotangent, cpu=by_products, default=by_convolution)


def _kernel_gradient(x: Array, cotangent: Array, *, size: tuple[int, ...], options: Any) -> Array:
    """For each cell of the kernel, what it saw of the map times what came of it."""
    strides, padding, precision = options
    seen = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    height, width = ((n - 1) * stride + 1 for n, stride in zip(cotangent.shape[1:3], strides, strict=True))
    came = cotangent.reshape(-1, cotangent.shape[-1])

    def cell(row: int, column: int) -> Array:
        part = seen[:, row : row + height : strides[0], column : column + width : strides[1]]
        return lax.dot_general(part.reshape(-1, part.shape[-1]), came, (((0,), (0,)), ((), ())), precision)

    return jnp.stack([jnp.stack([cell(row, column) for column in range(size[1])]) for row in range(size[0])])


_wide.defvjp(_wide_forward, _wide_backward)
