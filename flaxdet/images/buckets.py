"""Buckets, the static shapes of batches: choosing a set of them, and assigning images to them.

Sizes, canvases and buckets are (rows, columns) in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from flaxdet.images.transform import canvas_size, resized_size
from flaxdet.structures import TransformConfig

Size = tuple[int, int]
Sizes = Int[np.ndarray, "N 2"]

_MAX_SHAPES = 64  # canvas shapes that are joined pair by pair; more are first rounded up to fewer
_RATIOS = (1.0, 4 / 3, 3 / 2, 16 / 9)  # long side / short side of the images of cameras and screens
_LARGE = 10_000  # pixels: short side of a hypothetical image, so large that rounding hardly changes the aspect ratio


def default_buckets(config: TransformConfig) -> list[Size]:
    """Buckets for images of every size and shape.

    They are the canvases of common aspect ratios (square, 4:3, 3:2 and 16:9, landscape and portrait), and the landscape
    and portrait canvas with the longest possible side. With torchvision's 800 and 1333 these are 800x800, 800x1088,
    800x1216, 800x1344, and the last three in portrait.

    Args:
        config: ``model.transform``, of which the last of ``min_size`` is used.

    Returns:
        The buckets, the smallest first. Every image that the resize accepts fits into one.
    """
    if config.fixed_size is not None:
        return [canvas_size(resized_size((1, 1), config), config)]
    short, long = canvas_size((min(config.min_size[-1], config.max_size), config.max_size), config)
    buckets = {(short, long), (long, short)}
    for ratio in _RATIOS:
        rows, columns = canvas_size(resized_size((_LARGE, round(_LARGE * ratio)), config), config)
        buckets |= {(rows, columns), (columns, rows)}
    return sort_buckets([bucket for bucket in buckets if not any(_replaces(other, bucket) for other in buckets)])


def _replaces(other: Size, bucket: Size) -> bool:
    """Whether ``other`` holds ``bucket`` and is less than 10% larger, so that ``bucket`` is not worth a program."""
    return bucket != other and holds(other, bucket) and other[0] * other[1] < 1.1 * bucket[0] * bucket[1]


def canvases(
    sizes: Sequence[Size], config: TransformConfig, *, min_size: int | None = None, names: Sequence[Any] | None = None
) -> Sizes:
    """[N, 2] canvas of each image after the resize.

    Args:
        sizes: sizes of the original images.
        config: ``model.transform``.
        min_size: overrides the last of ``config.min_size``.
        names: names of the images in errors; default their numbers.

    Raises:
        ValueError: if an image is so elongated that the resize would leave no pixel of a side.
    """
    names = [f"image {i}" for i in range(len(sizes))] if names is None else names
    resized = (
        resized_size(size, config, min_size=min_size, name=str(name)) for size, name in zip(sizes, names, strict=True)
    )
    return np.array([canvas_size(size, config) for size in resized], np.int64).reshape(-1, 2)


def choose_buckets(
    sizes: Sequence[Size], config: TransformConfig, count: int = 3, *, min_size: int | None = None
) -> list[Size]:
    """A few shapes that hold the canvas of every image with little padding.

    Starts with all canvases that occur. As long as there are more than ``count``, replaces two shapes by the smallest
    shape that holds the two: the pair for which this adds the fewest pixels of padding.

    Args:
        sizes: sizes of the original images.
        config: ``model.transform``.
        count: largest number of buckets.
        min_size: overrides the last of ``config.min_size``; for multi-scale training, the largest size.

    Returns:
        Buckets, the smallest first; all sides are multiples of ``config.size_divisible``.

    Raises:
        ValueError: for no sizes or a count below 1, and as ``canvases``.
    """
    if count < 1 or not len(sizes):
        raise ValueError(f"expected at least one image and one bucket, got {len(sizes)} and {count}")
    every, step = canvases(sizes, config, min_size=min_size), int(config.size_divisible)
    shapes, images = np.unique(every, axis=0, return_counts=True)
    while len(shapes) > max(count, _MAX_SHAPES):
        step *= 2
        shapes, images = np.unique(-(-every // step) * step, axis=0, return_counts=True)
    while len(shapes) > count:
        union = np.maximum(shapes[:, None], shapes[None])
        pixels = shapes.prod(-1) * images
        waste = union.prod(-1) * (images[:, None] + images[None]) - pixels[:, None] - pixels[None]
        np.fill_diagonal(waste, np.iinfo(np.int64).max)
        a, b = np.unravel_index(waste.argmin(), waste.shape)
        shapes[a], images[a] = union[a, b], images[a] + images[b]
        shapes, images = np.delete(shapes, b, 0), np.delete(images, b)
    buckets = sort_buckets(shapes.tolist())
    while True:  # an image may fit a smaller bucket than the one its canvas was joined into, which can then shrink
        members = assign(every, buckets)
        shrunk = sort_buckets([every[members == i].max(axis=0).tolist() for i in np.unique(members)])
        if shrunk == buckets:
            return buckets
        buckets = shrunk


def assign(own: Sizes, buckets: Sequence[Size], *, names: Sequence[Any] | None = None) -> Int[np.ndarray, " N"]:
    """[N] number of the smallest bucket that holds each canvas.

    Args:
        own: canvas of each image.
        buckets: the smallest first.
        names: names of the images in errors; default their numbers.

    Raises:
        ValueError: if no bucket holds the canvas of an image; names the image.
    """
    fits = (own[:, None] <= np.asarray(buckets)[None]).all(-1)
    bad = ~fits.any(-1)
    if bad.any():
        i = int(bad.argmax())
        shapes = ", ".join(f"{rows}x{columns}" for rows, columns in buckets)
        raise ValueError(
            f"{f'image {i}' if names is None else names[i]}: its canvas of {own[i, 0]}x{own[i, 1]} (rows x columns) "
            f"fits none of the buckets {shapes} ({int(bad.sum())} of {len(own)} images fit none)"
        )
    return fits.argmax(-1)


def sort_buckets(buckets: Sequence[Size]) -> list[Size]:
    """Checks buckets and sorts them, the smallest first, without duplicates.

    Raises:
        ValueError: if a bucket is not two positive integers, or there is none.
    """
    result = []
    for bucket in buckets:
        sides = tuple(bucket)
        if len(sides) != 2 or not all(isinstance(side, (int, np.integer)) and side > 0 for side in sides):
            raise ValueError(f"a bucket should be (rows, columns), two positive integers, got {bucket!r}")
        result.append((int(sides[0]), int(sides[1])))
    if not result:
        raise ValueError("expected at least one bucket, got none")
    return sorted(set(result), key=_by_area)


def model_buckets(buckets: Sequence[Size] | None, config: TransformConfig) -> tuple[list[Size], bool]:
    """The buckets of a model's programs, checked, and whether the programs need masks.

    Programs need no masks if there is one bucket and the resize makes every image as large as that bucket. With masks,
    the edge of a canvas must fall between cells of every feature map, so buckets and canvases are multiples of 32.

    Args:
        buckets: (rows, columns) in pixels after the resize; default ``default_buckets(config)``.
        config: ``model.transform``.

    Returns:
        The buckets, the smallest first, and True if a canvas may be smaller than its bucket.

    Raises:
        ValueError: as ``sort_buckets``, or if the programs need masks and a side of a bucket, or ``size_divisible``, is
            no multiple of 32.
    """
    shapes = default_buckets(config) if buckets is None else sort_buckets(buckets)
    if config.fixed_size is not None and shapes == default_buckets(config):
        return shapes, False
    if config.size_divisible % 32:
        raise ValueError(
            f"size_divisible={config.size_divisible} gives canvases that don't fit into buckets: expected a multiple "
            "of 32, or a model with fixed_size and its canvas as the one bucket; flaxdet.predict, which compiles for "
            "each canvas, takes any size_divisible"
        )
    for rows, columns in shapes:
        if rows % 32 or columns % 32:
            raise ValueError(
                f"bucket {rows}x{columns} (rows x columns) should have multiples of 32 as its sides, since canvases "
                "may be smaller"
            )
    return shapes, True


def _by_area(bucket: Size) -> tuple[int, Size]:
    return bucket[0] * bucket[1], bucket


def holds(bucket: Size, other: Size) -> bool:
    """Whether ``bucket`` has at least the rows and at least the columns of ``other``."""
    return bucket[0] >= other[0] and bucket[1] >= other[1]
