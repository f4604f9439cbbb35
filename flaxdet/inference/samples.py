"""One image on its way to the device, and the host arrays that a batch of images is sent in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from flaxdet.images.buckets import Size, assign
from flaxdet.images.transform import canvas_size, resized_size
from flaxdet.structures import TransformConfig


class Sample(NamedTuple):
    """An image and where it goes. Sizes are (rows, columns) in pixels.

    Attributes:
        number: place of the result, counted from 0.
        image: [H, W, 3] uint8 or floats in [0, 1]; once ``resized``, [h, w, 3] in the dtype of the pixels.
        size: of the image as given.
        new_size: after the resize.
        canvas: the padded size that the image counts as having.
        bucket: the static shape that holds the canvas.
        resized: whether ``image`` is normalised and resized already.
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
        number: place of the result.
        image: [H, W, 3], checked.
        name: what to call the image in an error.
        config: ``model.transform``.
        buckets: the smallest first; None makes each canvas a bucket.

    Returns:
        The sample, not resized yet.

    Raises:
        ValueError: if a side would have no pixel left after the resize, or no bucket holds the canvas.
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
    """[B, 2] int32 each: sizes as given, sizes after the resize, and canvases."""
    size, new_size, canvas = (
        np.array([getattr(row, field) for row in rows], np.int32) for field in ("size", "new_size", "canvas")
    )
    return size, new_size, canvas
