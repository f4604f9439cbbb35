"""Masks of canvases in a bucket.

The canvas is the padded size of one image. It lies in the top left corner of the bucket, the static array. Values
beyond the canvas must not change a result, so every spatial convolution reads zeros there: ``mask_beyond``.
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

    Every layer of stride 2 halves the size and rounds up, so a level of stride s has ceil(canvas / s) rows and columns.

    Args:
        canvas: [B, 2] int32 (rows, columns), or ``None`` if every canvas is the whole bucket.
        bucket: (H, W) of the pixels.
        shape: (h, w) of the feature map.

    Returns:
        [B, 2] int32 (rows, columns), or ``None`` if ``canvas`` is ``None``.

    Raises:
        ValueError: if no stride that is a power of two gives the size of the map.
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
    stride = max(strides)  # a side of one cell fits several strides
    return -(-canvas // stride)


def inside(extent: Int[Array, "B 2"], shape: tuple[int, ...]) -> Bool[Array, "B h w"]:
    """True for the cells inside the extent of each image, in maps of the given (h, w)."""
    rows = jnp.arange(shape[0], dtype=jnp.int32)[None, :, None] < extent[:, 0, None, None]
    columns = jnp.arange(shape[1], dtype=jnp.int32)[None, None, :] < extent[:, 1, None, None]
    return rows & columns


def mask_beyond(x: Float[Array, "B h w C"], extent: Int[Array, "B 2"] | None) -> Float[Array, "B h w C"]:
    """Sets cells beyond the extent to zero, the padding that a convolution reads at the border of a canvas."""
    if extent is None:
        return x
    return jnp.where(inside(extent, x.shape[1:3])[..., None], x, jnp.zeros((), x.dtype))
