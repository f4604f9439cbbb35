"""The order of weights in memory, where a device's convolutions read another order than jax stores by default."""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental.layout import Format, Layout
from jax.sharding import Sharding

from flaxdet.xla.devices import platform_of
from flaxdet.xla.routes import of_devices, platform

OUT_CHANNELS_SLOWEST = (3, 0, 1, 2)  # of a kernel [kh, kw, in, out]: cuDNN's order for maps [B, h, w, C]


def weight_format(shape: tuple[int, ...], sharding: Sharding) -> Format | Sharding:
    """Where a program for some devices wants a weight: on GPUs, convolution kernels in the order that cuDNN reads.

    In the default order every call of the program would transpose every kernel, one launch each. ``jax.jit`` compiles
    for the order of the arrays that it is called with.

    Args:
        shape: shape of the weight; four axes are a kernel [kh, kw, in, out].
        sharding: the devices, as ``jax.device_put`` takes them.

    Returns:
        The format of a kernel for GPUs, else ``sharding``.
    """
    with of_devices(platform_of(sharding)):
        transposed = platform() == "gpu" and len(shape) == len(OUT_CHANNELS_SLOWEST)
    return Format(Layout(OUT_CHANNELS_SLOWEST), sharding) if transposed else sharding


def put_weights(tree: Any, sharding: Sharding) -> Any:
    """``jax.device_put`` of weights in their ``weight_format``. The numbers and the shapes are the same in any format.

    Args:
        tree: pytree of arrays.
        sharding: where to put the arrays.

    Returns:
        The tree of jax arrays; an array that is there already, in the default order, is the same object.
    """

    def put(leaf: Any) -> jax.Array:
        wanted = weight_format(leaf.shape, sharding)
        there = isinstance(leaf, jax.Array) and leaf.sharding == wanted
        return leaf if there else jax.device_put(leaf, wanted)

    return jax.tree.map(put, tree)
