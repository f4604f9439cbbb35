"""The static shapes that images are computed in: which there are, and which an image goes to.

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

_MOST_SHAPES = 64  # of canvases, before they are rounded up to fewer
# What cameras and screens produce, long side to short.
_RATIOS = (1.0, 4 / 3, 3 / 2, 16 / 9)
_LARGE = 10_000  # pixels: the short side of an imagined image whose size is rounded nowhere that matters


def default_buckets(config: TransformConfig) -> list[Size]:
    """Buckets for images of every size and shape.

    They are the canvases of images as cameras and screens produce them, square, 4:3, 3:2 and 16:9, lying and standing,
    and the two that hold the longest image that there can be. With torchvision's 800 and 1333 that makes 800x800,
    800x1088, 800x1216, 800x1344 and the last three upright.

    Args:
        config: ``model.transform``; the last of ``min_size`` counts.

    Returns:
        The smallest first. Every image that the resize accepts fits one.
    """
    if config.fixed_size is not None:
        return [canvas_size(resized_size((1, 1), config), config)]
    sizes: Any = config.min_size
    short, long = canvas_size((min(sizes[-1], config.max_size), config.max_size), config)
    buckets = {(short, long), (long, short)}
    for ratio in _RATIOS:
        rows, columns = canvas_size(resized_size((_LARGE, round(_LARGE * ratio)), config), config)
        buckets |= {(rows, columns), (columns, rows)}
    kept = [one for one in buckets if not any(_as_good(one, other) for other in buckets)]
    return sort_buckets(kept)


def _as_good(bucket: Size, other: Size) -> bool:
    """Whether ``other`` holds the bucket and is less than a tenth larger: not worth a program of its own."""
    return bucket != other and holds(other, bucket) and other[0] * other[1] < 1.1 * bucket[0] * bucket[1]


def canvases(
    sizes: Sequence[Size], config: TransformConfig, *, min_size: int | None = None, names: Sequence[Any] | None = None
) -> Sizes:
    """[N, 2] canvas of each image after its resize.

    Args:
        sizes: of the original images.
        config: ``model.transform``.
        min_size: overrides the last of ``config.min_size``.
        names: what to call the images in errors; default their numbers.

    Raises:
        ValueError: if an image is so elongated that a side would have no pixel left.
    """
    names = [f"image {i}" for i in range(len(sizes))] if names is None else names
    resized = (
        resized_size(size, config, min_size=min_size, name=str(name)) for size, name in zip(sizes, names, strict=True)
    )
    return np.array([canvas_size(size, config) for size in resized], np.int64).reshape(-1, 2)


def choose_buckets(
    sizes: Sequence[Size], config: TransformConfig, count: int = 3, *, min_size: int | None = None
) -> list[Size]:
    """A few shapes that hold the canvas of every image and waste little.

    Starts from all canvases that occur, and joins two of them into the smallest shape that holds both, those first
    that waste the fewest pixels by it, until ``count`` are left.

    Args:
        sizes: of the original images.
        config: ``model.transform``.
        count: at most so many buckets.
        min_size: overrides the last of ``config.min_size``; for multi-scale training the largest.

    Returns:
        Buckets, the smallest first; their sides are multiples of ``config.size_divisible``.

    Raises:
        ValueError: for no sizes or a count below 1, and as ``canvases``.
    """
    if count < 1 or not len(sizes):
        raise ValueError(f"expected at least one image and one bucket, got {len(sizes)} and {count}")
    every, step = canvases(sizes, config, min_size=min_size), int(config.size_divisible)
    shapes, images = np.unique(every, axis=0, return_counts=True)
    while len(shapes) > max(count, _MOST_SHAPES):
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
    while True:  # an image may fit a smaller bucket than the one that grew around it, which can then shrink
        members = assign(every, buckets)
        shrunk = sort_buckets([every[members == i].max(axis=0).tolist() for i in np.unique(members)])
        if shrunk == buckets:
            return buckets
        buckets = shrunk


def assign(own: Sizes, buckets: Sequence[Size], *, names: Sequence[Any] | None = None) -> Int[np.ndarray, " N"]:
    """[N] number of the smallest bucket that holds each canvas.

    Args:
        own: the images' canvases.
        buckets: the smallest first.
        names: what to call the images in errors; default their numbers.

    Raises:
        ValueError: naming an image that no bucket holds.
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
    """Buckets, checked: the smallest first, each once.

    Raises:
        ValueError: unless each is two positive integers, and there is one.
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

    A program needs no masks where the resize makes every image exactly as large as the one bucket. With masks, the
    edge of a canvas must fall between cells of every feature map, so buckets and canvases are multiples of 32.

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
            "each canvas, takes any"
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
    """Whether a bucket is at least as large as another both ways."""
    return bucket[0] >= other[0] and bucket[1] >= other[1]
