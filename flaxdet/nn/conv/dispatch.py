"""``lax.conv_general_dilated`` by the quickest route. The results are the same up to the order of sums."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flaxdet.nn.conv.columns import by_columns
from flaxdet.nn.conv.stem import by_pairs, by_quarters
from flaxdet.nn.conv.taps import by_taps
from flaxdet.nn.conv.winograd import winograd
from flaxdet.nn.dot import bilinear, product
from flaxdet.xla.routes import by_platform

Array = jax.Array

# Winograd pays only with at least this many cells and channels; with fewer, the transforms cost more than they save.
_WINOGRAD_CELLS = 1200
_WINOGRAD_CHANNELS = 64
# by_columns pays only for batches of at most this many images: for the gradient of a kernel, XLA:CPU reads patches in
# runs of as many numbers as there are images.
_FEW_IMAGES = 4
# Convolutions 1x1 to at most so many channels are heads, which several maps share.
_FEW_OUTPUTS = 16
# cuDNN's kernels for tensor cores take channels of 16 bytes; XLA pads to that for float16, and not for bfloat16.
_ALIGNMENT = 8
# The stem rewrite pays only for inputs of at most this many channels; wider inputs are as quick in XLA's own form.
_FEW_CHANNELS = 4


def conv_general_dilated(lhs: Array, rhs: Array, window_strides: Any, padding: Any, **kwargs: Any) -> Array:
    """``lax.conv_general_dilated`` for NHWC maps and HWIO kernels, as ``flaxdet.nn.layers.Conv`` calls it.

    A 1x1 convolution without padding is computed as a matrix product over the channels, which is quicker on XLA:CPU
    (the body of a ResNet-50 takes a seventh less time); ``flaxdet.nn.dot`` has the gradients. On GPUs, a strided one
    and one to few channels remain convolutions. There, convolutions in bfloat16 or float16 compute a multiple of 8
    channels and return those asked for. On TPUs, the stem of a ResNet is a convolution over cells of 2x4 pixels,
    ``stem.py``, where no gradient is taken. On CPUs, these convolutions in float32 or float64 take other forms:

    - 3x3 of stride 1 on large maps: Winograd's algorithm, with half the multiplications, ``winograd.py``. FCOS takes a
      quarter less time. The rounding error is twice the error of XLA's own sum, and about the error of torch.
    - 3x3 of stride 1 to few channels: a matrix product with all nine taps, ``taps.py``. It takes half the time, and a
      quarter of the time with the gradients.
    - The stem of a ResNet, 7x7 of stride 2: a convolution over cells of 2x2 pixels, ``stem.py``. It takes two thirds
      of the time.
    - Other 3x3 of stride 1 on few images: the gradient of the kernel is computed column by column, ``columns.py``. It
      takes a quarter less time. This form is chosen when the program is traced.

    Dilated and grouped convolutions are left to XLA.

    Args:
        lhs: [B, H, W, Cin].
        rhs: [kh, kw, Cin, Cout].
        window_strides: (rows, columns).
        padding: ((top, bottom), (left, right)).
        **kwargs: options of ``lax.conv_general_dilated``.

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
        one_by_one = functools.partial(_one_by_one, strides=strides, precision=precision)
        if strides == (1, 1):
            if rhs.shape[3] > _FEW_OUTPUTS:
                return one_by_one(lhs, rhs)
            # Of products by one kernel, of all levels of a pyramid, XLA:GPU makes a single one, for which it writes the
            # maps to memory again.
            return by_platform(lhs, rhs, gpu=functools.partial(_aligned, plain), default=one_by_one)
        # cuDNN reads every second cell itself; a slice would be written to memory
        return by_platform(lhs, rhs, cpu=one_by_one, default=plain)
    wide = lhs.dtype in (jnp.float32, jnp.float64)
    aligned = plain if wide or rhs.shape[3] % _ALIGNMENT == 0 else functools.partial(_aligned, plain)
    if (rhs.shape[:2], strides, pads) == ((7, 7), (2, 2), ((3, 3), (3, 3))) and rhs.shape[2] <= _FEW_CHANNELS:
        cells, pairs = (functools.partial(form, **kwargs) for form in (by_quarters, by_pairs))
        quick = {"cpu": cells if wide else plain, "gpu": aligned, "tpu": _without_gradient(pairs, plain)}
        return by_platform(lhs, rhs, default=plain, **quick)
    if not wide:
        return plain(lhs, rhs) if aligned is plain else by_platform(lhs, rhs, gpu=aligned, default=plain)
    quick = None
    if (rhs.shape[:2], strides, pads) == ((3, 3), (1, 1), ((1, 1), (1, 1))):
        if 9 * rhs.shape[3] < rhs.shape[2]:
            quick = functools.partial(by_taps, precision=precision)
        elif lhs.shape[1] * lhs.shape[2] >= _WINOGRAD_CELLS and min(rhs.shape[2:]) >= _WINOGRAD_CHANNELS:
            quick = functools.partial(winograd, **kwargs)
        elif isinstance(lhs.shape[0], int) and lhs.shape[0] <= _FEW_IMAGES:  # B may be symbolic in an export
            return bilinear(plain, plain, functools.partial(by_columns, **kwargs))(lhs, rhs)
    if quick is None:
        return plain(lhs, rhs)
    return by_platform(lhs, rhs, cpu=quick, default=plain)


def _without_gradient(quick: Any, plain: Any) -> Any:
    """A function that is ``quick`` where no gradient is taken, and ``plain`` with its gradients where one is."""
    chosen = jax.custom_jvp(quick)
    chosen.defjvp(lambda primals, tangents: jax.jvp(plain, primals, tangents))
    return chosen


def _aligned(convolve: Any, lhs: Array, rhs: Array) -> Array:
    """A convolution to a multiple of 8 channels, of which the first are returned."""
    features = rhs.shape[3]
    rhs = jnp.pad(rhs, [(0, 0)] * 3 + [(0, -features % _ALIGNMENT)])
    return convolve(lhs, rhs)[..., :features]


def _one_by_one(lhs: Array, rhs: Array, *, strides: tuple[int, int], precision: Any) -> Array:
    lhs = lhs[:, :: strides[0], :: strides[1]]
    return product(lhs.reshape(-1, lhs.shape[-1]), rhs[0, 0], precision).reshape(*lhs.shape[:-1], -1)
