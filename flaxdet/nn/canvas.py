"""Masks of the canvas, an image's own padded size, which lies in the top left corner of a bucket, the static array.

What lies beyond the canvas must not be seen, so every spatial convolution reads zeros there: ``mask_beyond``.
"""

from __future__ import annotations

from typing import overload

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

Array = jax.Array


@overload
def level_extent(canvas: Int[Array, "B 2"], bucket: tuple[int, ...], shape: tuple[int, ...]) -> Int[Array, "B 2"]: ...


@overload
def level_extent(canvas: None, bucket: tuple[int, ...], shape: tuple[int, ...]) -> None: ...


@overload
def level_extent(
    canvas: Int[Array, "B 2"] | None, bucket: tuple[int, ...], shape: tuple[int, ...]
) -> Int[Array, "B 2"] | None: ...


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
