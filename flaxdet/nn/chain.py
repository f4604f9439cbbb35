"""A chain of layers as papers write it: convolution, norm, ReLU, each named once and in that order.

The chain adds the details that papers leave out. A convolution with a kernel larger than 1x1 reads zeros beyond the
canvas, and the statistics of norms exclude the cells there. A norm and the ReLU after it are applied where the next
layer reads the map, so that the backward pass can rematerialise the result instead of saving it. Norms compute in
float32 at least.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from flaxdet.nn.canvas import inside, mask_beyond
from flaxdet.nn.layers import Array, Conv, Dtype, at_least_float32
from flaxdet.nn.norm import FrozenBatchNorm, Norm, ScaleShift, scaled_and_shifted
from flaxdet.nn.relu import relu
from flaxdet.xla.barriers import save_for_backward
from flaxdet.xla.rematerialisation import rematerialise

# None stands for a norm that is left out, such as a norm that is folded into the convolution.
Layer = Conv | Norm | Callable[[Array], Array] | None


@dataclasses.dataclass(frozen=True)
class Link:
    """A map between two layers of a chain, with the norm and the ReLU that are not applied yet.

    Attributes:
        x: [B, h, w, C]; if there is a norm, in float32 at least. The cotangents of the map from the norm and from the
            statistics of the norm are then added in float32 and rounded once.
        extent: [B, 2] int32 (rows, columns) of the map inside the canvas; None for the whole map.
        norm: the norm as a scale and a shift; None for no norm.
        dtype: dtype of the result of the norm.
        relu: whether a ReLU follows.
        frozen: whether the norm has no parameters.
        biased: whether the last layer is a convolution with a bias.
    """

    x: Array
    extent: Array | None = None
    norm: ScaleShift | None = None
    dtype: Dtype = None
    relu: bool = False
    frozen: bool = False
    biased: bool = False

    @property
    def value(self) -> Array:
        """The map [B, h, w, C] after norm and ReLU."""
        return self.read(self.x, self.norm)

    def read(self, x: Array, norm: ScaleShift | None) -> Array:
        """``value`` as a function of the arrays, so that it can be rematerialised.

        Args:
            x: [B, h, w, C], the field ``x``.
            norm: the field ``norm``.
        """
        if norm is not None:
            x = scaled_and_shifted(x, norm, self.dtype)
        if not self.relu:
            return x
        # the gradient of a norm with parameters reads x in any case
        return nn.relu(x) if self.norm is not None and not self.frozen else relu(x)


def chain(
    layers: Iterable[Layer],
    x: Array | Link,
    extent: Array | None = None,
    *,
    train: bool = False,
    rows: Array | None = None,
    remat: bool = True,
) -> Link:
    """Applies layers one after the other.

    Args:
        layers: ``Conv``, norms, ``nn.relu``, and other functions of one map such as a pooling.
        x: [B, h, w, C], or the last link of another chain, which this chain continues.
        extent: [B, 2] int32 (rows, columns) of ``x`` inside the canvas; None for the whole map. A strided convolution
            divides the extent by the stride and rounds up. Other functions should not change the size, except in the
            last layer.
        train: whether BatchNorm is in training mode.
        rows: [B], True for the rows of the batch that count for the statistics of norms; default all rows.
        remat: rematerialises norm, ReLU and mask in the backward pass, if the program takes the routes of CPUs.

    Returns:
        The last link; ``.value`` is the map.

    Raises:
        TypeError: for a module that is neither a ``Conv`` nor a norm.
    """
    link = x if isinstance(x, Link) else Link(x, extent)
    for layer in layers:
        if layer is nn.relu:
            link = dataclasses.replace(link, relu=True)
        elif isinstance(layer, Conv):
            link = _convolved(layer, link, remat)
        elif isinstance(layer, Norm):
            link = _normalised(layer, link, train, rows)
        elif isinstance(layer, nn.Module):
            raise TypeError(f"a chain takes Conv, norms and functions, got {type(layer).__name__}")
        elif layer is not None:
            read = _composed(layer, link)
            link = Link((rematerialise(read) if remat else read)(link.x, link.norm), link.extent)
    return link


def _convolved(layer: Conv, link: Link, remat: bool) -> Link:
    def read(layer: Conv, x: Array, norm: ScaleShift | None, extent: Array | None) -> Array:
        return layer(mask_beyond(link.read(x, norm), extent))

    extent = None if layer.kernel_size == 1 else link.extent
    if remat and (link.norm is not None or link.relu or extent is not None):
        read = rematerialise(read, nn.remat)
    y = read(layer, link.x, link.norm, extent)
    inner = link.extent if link.extent is None or layer.strides == 1 else -(-link.extent // layer.strides)
    return Link(y, inner, biased=layer.use_bias)


def _normalised(norm: Norm, link: Link, train: bool, rows: Array | None) -> Link:
    x = link.value
    if link.biased:
        x = save_for_backward(x)  # without the barrier, XLA:CPU also saves the map without the bias
    x = x.astype(at_least_float32(norm.dtype))
    mask = None if link.extent is None else inside(link.extent, x.shape[1:3])
    if rows is not None:
        cells = jnp.broadcast_to(rows[:, None, None], x.shape[:3])
        mask = cells if mask is None else mask & cells
    scale_and_shift = norm.scale_and_shift(x, train=train, mask=mask)
    return Link(x, link.extent, scale_and_shift, norm.dtype, frozen=isinstance(norm, FrozenBatchNorm))


def _composed(function: Callable[[Array], Array], link: Link) -> Callable[..., Any]:
    return lambda x, norm: function(link.read(x, norm))
