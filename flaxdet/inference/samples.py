"""Samples (an image and its place in a bucket), and the host arrays of a batch of samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from flaxdet.images.buckets import Size, assign
from flaxdet.images.transform import canvas_size, resized_size
from flaxdet.structures import TransformConfig


class Sample(NamedTuple):
    """An image and its sizes. Sizes are (rows, columns) in pixels.

    Attributes:
        number: position of the result, from 0.
        image: [H, W, 3] uint8 or floats in [0, 1]; if ``resized``, [h, w, 3] in the dtype of the model's pixels.
        size: size of the original image.
        new_size: size after the resize.
        canvas: size after the padding; everything beyond the canvas is masked.
        bucket: the static shape that holds the canvas.
        resized: True if ``image`` is normalised and resized already.
    """

    number: int
    image: np.ndarray
    size: Size
    new_size: Size
    canvas: Size
    bucket: Size
    resized: bool = False


def place(number: int, image: np.ndarray, name: str, config: TransformConfig, buckets: Sequence[Size] | None) -> Sample:
    """Finds the size, canvas and bucket of an image.

    Args:
        number: position of the result.
        image: [H, W, 3], checked.
        name: name of the image in errors.
        config: ``model.transform``.
        buckets: the smallest first; None: the bucket of an image is the canvas.

    Returns:
        The sample, not resized yet.

    Raises:
        ValueError: if the resize would leave no pixel of a side, or no bucket holds the canvas.
    """
    size = (image.shape[0], image.shape[1])
    new_size = resized_size(size, config, name=name)
    canvas = canvas_size(new_size, config)
    bucket = canvas if buckets is None else buckets[assign(np.array([canvas]), buckets, names=[name])[0]]
    return Sample(number, image, size, new_size, canvas, bucket)


def raw_squares(rows: Sequence[Sample], side: int) -> np.ndarray:
    """[B, side, side, 3] uint8: each image in the top left corner of a square, zeros elsewhere."""
    return _corners([row.image for row in rows], (side, side), np.uint8)


def resized_pixels(rows: Sequence[Sample], bucket: Size, dtype: Any) -> np.ndarray:
    """[B, rows, columns, 3]: resized images in the top left corner of the bucket, zeros elsewhere."""
    return _corners([row.image for row in rows], bucket, dtype)


def _corners(images: Sequence[np.ndarray], shape: Size, dtype: Any) -> np.ndarray:
    array = np.zeros((len(images), *shape, 3), dtype)
    for corner, image in zip(array, images, strict=True):
        corner[: image.shape[0], : image.shape[1]] = image
    return array


def size_arrays(rows: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Original sizes, sizes after the resize, and canvases, each [B, 2] int32."""
    size, new_size, canvas = (
        np.array([getattr(row, field) for row in rows], np.int32) for field in ("size", "new_size", "canvas")
    )
    return size, new_size, canvas
