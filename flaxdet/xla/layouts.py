"""Memory layouts of weights, for devices whose convolutions read another layout than jax's default."""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental.layout import Format, Layout
from jax.sharding import Sharding

from flaxdet.xla.devices import platform_of
from flaxdet.xla.routes import of_devices, platform

OUT_CHANNELS_SLOWEST = (3, 0, 1, 2)  # of a kernel [kh, kw, in, out]: cuDNN's order for maps [B, h, w, C]


def weight_format(shape: tuple[int, ...], sharding: Sharding) -> Format | Sharding:
    """The sharding of a weight, with the memory layout in which programs for these devices read the weight.

    For GPUs, a convolution kernel gets cuDNN's layout. In jax's default layout, every call of a program transposes
    every kernel, with one launch each. ``jax.jit`` compiles for the layouts of its arguments.

    Args:
        shape: shape of the weight; four axes are a kernel [kh, kw, in, out].
        sharding: the devices, as ``jax.device_put`` takes them.

    Returns:
        A ``Format`` of layout and sharding for a kernel on GPUs, else ``sharding`` itself.
    """
    with of_devices(platform_of(sharding)):
        transposed = platform() == "gpu" and len(shape) == len(OUT_CHANNELS_SLOWEST)
    return Format(Layout(OUT_CHANNELS_SLOWEST), sharding) if transposed else sharding


def put_weights(tree: Any, sharding: Sharding) -> Any:
    """``jax.device_put`` of weights in their ``weight_format``. A format changes neither values nor shapes.

    Args:
        tree: pytree of arrays.
        sharding: where to put the arrays.

    Returns:
        The tree of jax arrays. An array that has this sharding and the default layout already is returned itself.
    """

    def put(leaf: Any) -> jax.Array:
        wanted = weight_format(leaf.shape, sharding)
        there = isinstance(leaf, jax.Array) and leaf.sharding == wanted
        return leaf if there else jax.device_put(leaf, wanted)

    return jax.tree.map(put, tree)
