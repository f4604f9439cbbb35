"""Convolution and dense layers with torch's padding and initialisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import Initializer, zeros
from jaxtyping import Float

from flaxdet.nn.conv.dispatch import conv_general_dilated
from flaxdet.nn.dot import dot_general
from flaxdet.nn.initializers import symmetric_uniform, torch_default
from flaxdet.nn.typed import TypedModule as TypedModule

Array = jax.Array
Dtype = Any
Precision = Any


def at_least_float32(dtype: Dtype) -> Dtype:
    """The dtype in which statistics, boxes and scores are computed: float64 for float64, else float32."""
    return jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32


class Conv(TypedModule):
    """A convolution of maps [B, H, W, C] with a square odd kernel, padded as torch's ``padding=kernel_size // 2``.

    ``flax.linen.Conv`` adds the bias in ``dtype``, so that the gradient of the bias is a sum over all cells in
    ``dtype``. In bfloat16 such a sum stops growing at 256 times the size of a term. Here the sum is in float32 at
    least.

    Attributes:
        features: channels of the result.
        kernel_size: rows and columns of the kernel.
        strides: stride along rows and along columns.
        use_bias: adds a bias.
        kernel_init: initialiser of the kernel [rows, columns, C, features].
        bias_init: initialiser of the bias [features].
        dtype: dtype of the computation.
        param_dtype: dtype of the parameters; default float64 if ``dtype`` is float64, else float32.
        precision: ``jax.lax.Precision`` of the convolution.
    """

    features: int
    kernel_size: int
    strides: int = 1
    use_bias: bool = True
    kernel_init: Initializer = torch_default
    bias_init: Initializer = zeros
    dtype: Dtype = jnp.float32
    param_dtype: Dtype | None = None
    precision: Precision = None

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w N"]:
        """Convolves.

        Args:
            x: [B, H, W, C].

        Returns:
            [B, h, w, features] in ``dtype``, h = ceil(H / strides).
        """
        (y,) = together((self,), x)
        return y

    @nn.compact
    def kernel_and_bias(self, channels: int) -> tuple[Float[Array, "k k C N"], Float[Array, " N"] | None]:
        """The layer's parameters.

        Args:
            channels: C of the maps.

        Returns:
            The kernel, and the bias if there is one.
        """
        shape = (self.kernel_size, self.kernel_size, channels, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        return kernel, bias


def together(layers: Sequence[Conv], x: Float[Array, "B H W C"]) -> list[Float[Array, "B h w _"]]:
    """Convolves maps with several layers at once, which reads the maps once.

    Args:
        layers: layers that differ in their features, names and initialisers alone.
        x: [B, H, W, C].

    Returns:
        Of each layer [B, h, w, features] in its ``dtype``, h = ceil(H / strides).
    """
    first = layers[0]
    kernels, biases = zip(*(layer.kernel_and_bias(x.shape[-1]) for layer in layers), strict=True)
    y = conv_general_dilated(
        x.astype(first.dtype),
        _joined(kernels).astype(first.dtype),
        (first.strides, first.strides),
        [(first.kernel_size // 2, first.kernel_size // 2)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=first.precision,
    )
    if first.use_bias:
        y = add_bias(y, _joined(biases))
    return jnp.split(y, np.cumsum([layer.features for layer in layers])[:-1], axis=-1)


def _joined(arrays: Sequence[Array]) -> Array:
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis=-1)


class Dense(TypedModule):
    """A matrix product and a bias, each initialised from U(-1 / sqrt(C), 1 / sqrt(C)), as ``torch.nn.Linear``.

    The gradient of the bias is summed in float32 at least, as in ``Conv``.

    Attributes:
        features: channels of the result.
        dtype: dtype of the computation.
        param_dtype: dtype of the parameters; default float64 if ``dtype`` is float64, else float32.
        precision: ``jax.lax.Precision`` of the matrix product.
    """

    features: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype | None = None
    precision: Precision = None

    @nn.compact
    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... N"]:
        """Multiplies.

        Args:
            x: [..., C].

        Returns:
            [..., features] in ``dtype``.
        """
        kernel = self.param("kernel", torch_default, (x.shape[-1], self.features), self.param_dtype)
        bias = self.param("bias", symmetric_uniform(x.shape[-1] ** -0.5), (self.features,), self.param_dtype)
        contracted = (((x.ndim - 1,), (0,)), ((), ()))
        return add_bias(dot_general(x.astype(self.dtype), kernel.astype(self.dtype), contracted, self.precision), bias)


def add_bias(x: Float[Array, "... C"], bias: Float[Array, " C"]) -> Float[Array, "... C"]:
    """Adds a bias to each cell, in the dtype of ``x``; the gradient of the bias is summed in float32 at least.

    Args:
        x: [..., C].
        bias: [C].

    Returns:
        [..., C] in the dtype of ``x``.
    """
    wide = bias.astype(at_least_float32(x.dtype))
    # the broadcast comes before the cast, so that the backward pass casts back before the sum
    return x + jnp.broadcast_to(wide, x.shape).astype(x.dtype)
