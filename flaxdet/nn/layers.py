"""Convolution and linear layers with torch's padding and initialisation, and the masks of the canvas.

A canvas (an image's own padded size) lies in the top left corner of a bucket (the static array). What
lies beyond it must not be seen, so every spatial convolution reads zeros there: ``mask_beyond``.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.nn.initializers import Initializer, normal, uniform, variance_scaling, zeros
from jaxtyping import Bool, Float, Int

from flaxdet.nn.conv.dispatch import conv_general_dilated
from flaxdet.nn.dot import dot_general
from flaxdet.nn.typed import TypedModule as TypedModule
from flaxdet.nn.typed import default_param_dtype

Array = jax.Array
Dtype = Any
Precision = Any

# torch's names for the same distributions.
kaiming_normal_fan_out = variance_scaling(2.0, "fan_out", "normal")  # nonlinearity="relu"
kaiming_uniform_a1 = variance_scaling(1.0, "fan_in", "uniform")  # a=1: bound sqrt(3 / fan_in)
torch_default = variance_scaling(1 / 3, "fan_in", "uniform")  # a=sqrt(5): bound 1 / sqrt(fan_in)
normal_001 = normal(0.01)


def symmetric_uniform(bound: float) -> Initializer:
    """Initialiser of U(-bound, bound), torch's for the biases of its default layers."""

    def init(key: Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> Array:
        del out_sharding
        return uniform(2 * bound)(key, shape, dtype) - jnp.asarray(bound, dtype)

    return init


def at_least_float32(dtype: Dtype) -> Dtype:
    """The dtype in which statistics, boxes and scores are computed: float64 for float64, else float32."""
    return jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32


class Conv(nn.Module):
    """A convolution of maps [B, H, W, C] with odd kernels, zero-padded by half the kernel.

    Flax's own adds its bias in ``dtype``, so that the gradient of the bias is a sum over all cells in ``dtype``: in
    bfloat16 it stops growing at 256 times its terms. Here that sum is float32 at least.

    Attributes:
        features: channels of the result.
        kernel_size: (rows, columns).
        strides: of both directions.
        use_bias: adds a bias.
        kernel_init: of the kernel [rows, columns, C, features].
        bias_init: of the bias [features].
        dtype: computes.
        param_dtype: stores.
        precision: of the products.
    """

    features: int
    kernel_size: tuple[int, int]
    strides: int = 1
    use_bias: bool = True
    kernel_init: Initializer = torch_default
    bias_init: Initializer = zeros
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    precision: Precision = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w N"]:
        """Convolves.

        Args:
            x: [B, H, W, C].

        Returns:
            [B, h, w, features] in ``dtype``, h = ceil(H / strides).
        """
        kernel = self.param(
            "kernel", self.kernel_init, (*self.kernel_size, x.shape[-1], self.features), self.param_dtype
        )
        y = conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (self.strides, self.strides),
            [(side // 2, side // 2) for side in self.kernel_size],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=self.precision,
        )
        return (
            add_bias(y, self.param("bias", self.bias_init, (self.features,), self.param_dtype)) if self.use_bias else y
        )


class Dense(nn.Module):
    """A matrix product and a bias, whose gradient is summed in float32 at least, as ``Conv``'s.

    Attributes:
        features: of the result.
        kernel_init: of the kernel [C, features].
        bias_init: of the bias [features].
        dtype: computes.
        param_dtype: stores.
        precision: of the product.
    """

    features: int
    kernel_init: Initializer = torch_default
    bias_init: Initializer = zeros
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    precision: Precision = None

    @nn.compact
    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... N"]:
        """Multiplies.

        Args:
            x: [..., C].

        Returns:
            [..., features] in ``dtype``.
        """
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), self.param_dtype)
        contracted = (((x.ndim - 1,), (0,)), ((), ()))
        y = dot_general(x.astype(self.dtype), kernel.astype(self.dtype), contracted, self.precision)
        return add_bias(y, self.param("bias", self.bias_init, (self.features,), self.param_dtype))


def add_bias(x: Float[Array, "... C"], bias: Float[Array, " C"]) -> Float[Array, "... C"]:
    """Adds a bias to each cell, in the cells' dtype; the gradient of the bias is summed in float32 at least.

    Args:
        x: [..., C].
        bias: [C].

    Returns:
        [..., C] in the dtype of ``x``.
    """
    wide = bias.astype(at_least_float32(x.dtype))
    # broadcast before the cast: jax then sums after casting back
    return x + jnp.broadcast_to(wide, x.shape).astype(x.dtype)


def conv(
    features: int,
    kernel_size: int,
    *,
    strides: int = 1,
    use_bias: bool = True,
    kernel_init: Initializer = torch_default,
    bias_init: Initializer = zeros,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype | None = None,
    precision: Precision = None,
    name: str | None = None,
) -> Conv:
    """A square NHWC convolution, padded as torch's ``padding=kernel_size // 2`` (never "SAME")."""
    return Conv(
        features,
        (kernel_size, kernel_size),
        strides=strides,
        use_bias=use_bias,
        kernel_init=kernel_init,
        bias_init=bias_init,
        dtype=dtype,
        param_dtype=default_param_dtype(dtype, param_dtype),
        precision=precision,
        name=name,
    )


def linear(
    features: int,
    in_features: int,
    *,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype | None = None,
    precision: Precision = None,
    name: str | None = None,
) -> Dense:
    """A dense layer initialised as ``torch.nn.Linear``: weight and bias U(±1/sqrt(in_features))."""
    return Dense(
        features,
        kernel_init=torch_default,
        bias_init=symmetric_uniform(in_features**-0.5),
        dtype=dtype,
        param_dtype=default_param_dtype(dtype, param_dtype),
        precision=precision,
        name=name,
    )


def max_pool_3x3(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """``torch.nn.MaxPool2d(kernel_size=3, stride=2, padding=1)``.

    Like torch's, the first of equal values takes the gradient, and NaN wins. Comparing the three columns of a window,
    and then its three rows, takes less than half of ``lax.reduce_window``'s time on CPUs, its gradient a quarter.
    """

    def larger(a: Array, b: Array) -> Array:
        return jnp.where((b > a) | jnp.isnan(b), b, a)

    for axis in (2, 1):
        middle = lax.slice_in_dim(x, 0, None, 2, axis)
        if x.shape[axis] > 1:
            odd = lax.slice_in_dim(x, 1, None, 2, axis)
            short = middle.shape[axis] - odd.shape[axis]  # 1 where the last window ends beyond the border
            x = larger(larger(_padded(odd, axis, 1, short - 1), middle), _padded(odd, axis, 0, short))
        else:
            x = middle
    return x


def _padded(x: Array, axis: int, low: int, high: int) -> Array:
    """With as many cells of -inf (negative: fewer) before and after the axis."""
    config = [(0, 0, 0)] * x.ndim
    config[axis] = (low, high, 0)
    return lax.pad(x, jnp.asarray(-jnp.inf, x.dtype), config)


def level_extent(
    canvas: Int[Array, "B 2"] | None, bucket: tuple[int, ...], shape: tuple[int, ...]
) -> Int[Array, "B 2"] | None:
    """Rows and columns of a feature map that belong to each image's canvas.

    Every stride-2 layer halves upwards, so a level of stride s has ceil(canvas / s) of them.

    Args:
        canvas: [B, 2] int32 (rows, columns), or ``None`` where every canvas is the whole bucket.
        bucket: (H, W) of the pixels.
        shape: (h, w) of the feature map.

    Returns:
        [B, 2] int32, or ``None`` with ``canvas``.

    Raises:
        ValueError: if the map's stride is no power of two that halving upwards gives.
    """
    if canvas is None:
        return None
    strides = []
    for full, part in zip(bucket, shape, strict=True):
        stride = 1
        while -(-full // stride) > max(part, 1):
            stride *= 2
        if -(-full // stride) != part:
            raise ValueError(
                f"a feature map of {part} cells for {full} pixels has no power-of-two stride, so its share "
                "of a canvas is unknown; use canvas=None (canvas equal to the bucket) with this backbone"
            )
        strides.append(stride)
    stride = max(strides)  # a side that has shrunk to one cell doesn't tell its stride
    return -(-canvas // stride)


def inside(extent: Int[Array, "B 2"], shape: tuple[int, ...]) -> Bool[Array, "B h w"]:
    """True where a cell of a map of the given shape lies inside its image's extent."""
    rows = jnp.arange(shape[0], dtype=jnp.int32)[None, :, None] < extent[:, 0, None, None]
    columns = jnp.arange(shape[1], dtype=jnp.int32)[None, None, :] < extent[:, 1, None, None]
    return rows & columns


def mask_beyond(x: Float[Array, "B h w C"], extent: Int[Array, "B 2"] | None) -> Float[Array, "B h w C"]:
    """Zero beyond the extent, as the padding that a convolution at the canvas's border would read."""
    if extent is None:
        return x
    return jnp.where(inside(extent, x.shape[1:3])[..., None], x, jnp.zeros((), x.dtype))
