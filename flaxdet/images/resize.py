"""Normalisation and bilinear resize of one image, on the device and in numpy.

Reproduces torchvision.models.detection.transform.GeneralizedRCNNTransform: bilinear with half-pixel centres and
no antialias, normalised before the resize, zeros beyond the image. Sizes are (rows, columns) in pixels.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped

Array = jax.Array


@functools.partial(jax.jit, static_argnames=("bucket", "mean", "std", "dtype"))
def resize_image(
    image: Shaped[Array, "H W 3"],
    size: Int[Array, " 2"],
    new_size: Int[Array, " 2"],
    *,
    bucket: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: Any,
) -> Float[Array, "h w 3"]:
    """Normalises one image, resizes it and pads it with zeros; compiled once for each pair of (H, W) and bucket.

    Args:
        image: [H, W, 3] uint8 or floats in [0, 1]; padding beyond ``size`` may have any values.
        size: [2] int32 (rows, columns) of the image inside the array.
        new_size: [2] int32 (rows, columns) of the resized image.
        bucket: static (h, w) of the result.
        mean: mean of each channel.
        std: standard deviation of each channel.
        dtype: of the arithmetic and the result, float32 or float64.

    Returns:
        [h, w, 3], zero beyond ``new_size``.
    """
    resized = _bilinear(jnp, image, size, new_size, bucket=bucket, mean=mean, std=std, dtype=dtype)
    rows_inside, columns_inside = (jnp.arange(bucket[i], dtype=jnp.int32) < new_size[i] for i in (0, 1))
    inside = rows_inside[:, None] & columns_inside[None]
    return jnp.where(inside[..., None], resized, 0)


def resize_array(
    image: np.ndarray,
    new_size: tuple[int, int],
    *,
    bucket: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: Any = np.float32,
) -> np.ndarray:
    """``resize_image`` in numpy alone, for processes that read data; the results agree up to float32 rounding.

    Args:
        image: [H, W, 3] uint8, or floats in [0, 1].
        new_size: (rows, columns) of the resized image.
        bucket: (h, w) of the result.
        mean: mean of each channel.
        std: standard deviation of each channel.
        dtype: of the arithmetic and the result, float32 or float64.

    Returns:
        [h, w, 3], zero beyond ``new_size``.
    """
    size, new = np.asarray(image.shape[:2], np.int32), np.asarray(new_size, np.int32)
    result = np.zeros((*bucket, 3), dtype)
    inside = result[: new_size[0], : new_size[1]]
    if image.shape[:2] == tuple(new_size):
        inside[:] = _normalise(np, image, mean, std, dtype)
    else:
        inside[:] = _bilinear(np, image, size, new, bucket=new_size, mean=mean, std=std, dtype=dtype)
    return result


def _normalise(xp: Any, pixels: Any, mean: Any, std: Any, dtype: Any) -> Any:
    """(pixels - mean) / std, where ``pixels`` are uint8 or in [0, 1]; ``xp`` is jax.numpy or numpy."""
    values = pixels.astype(dtype)
    if pixels.dtype == xp.uint8:
        values = values / 255
    return (values - xp.asarray(mean, dtype)[None, None]) / xp.asarray(std, dtype)[None, None]


def _bilinear(
    xp: Any, image: Any, size: Any, new_size: Any, *, bucket: tuple[int, int], mean: Any, std: Any, dtype: Any
) -> Any:
    """Normalises and resizes; ``xp`` is jax.numpy or numpy. Values beyond ``new_size`` are undefined."""

    def lookup(axis: int) -> tuple[Any, Any, Any]:
        # torch's area_pixel_compute_source_index and guard_index_and_lambda
        ratio = size[axis].astype(dtype) / new_size[axis].astype(dtype)
        position = (xp.arange(bucket[axis], dtype=dtype) + 0.5) * ratio - 0.5
        position = xp.maximum(position, 0)
        low = xp.minimum(xp.floor(position).astype(xp.int32), size[axis] - 1)
        fraction = xp.clip(position - low.astype(dtype), 0, 1)
        return low, xp.minimum(low + 1, size[axis] - 1), fraction

    top, bottom, down = lookup(0)
    left, right, across = lookup(1)
    down, across = down[:, None, None], across[None, :, None]
    normalise = functools.partial(_normalise, xp, mean=mean, std=std, dtype=dtype)
    if xp is np and image.shape[0] * image.shape[1] > 4 * bucket[0] * bucket[1]:
        # a large photo: normalising only the sampled pixels gives the same numbers in a quarter of the time
        ends = tuple(
            normalise(image[top[:, None], side[None]]) * (1 - down)
            + normalise(image[bottom[:, None], side[None]]) * down
            for side in (left, right)
        )
    else:
        pixels = normalise(image)
        rows = pixels[top] * (1 - down) + pixels[bottom] * down
        ends = rows[:, left], rows[:, right]
    return ends[0] * (1 - across) + ends[1] * across
