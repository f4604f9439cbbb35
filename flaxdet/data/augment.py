"""Augmentation of one image and its boxes, in numpy, as in torchvision's training references.

Images are [H, W, 3] uint8. Boxes are [N, 4] float32 xyxy in pixels: argument boxes in pixels of the argument image,
returned boxes in pixels of the returned image. Functions are deterministic; the caller draws the random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from flaxdet.images.buckets import Size

Pixels = UInt8[np.ndarray, "H W 3"]
Boxes = Float[np.ndarray, "N 4"]


def horizontal_flip(image: Pixels, boxes: Boxes) -> tuple[Pixels, Boxes]:
    """Mirrors an image, left to right. Reproduces RandomHorizontalFlip of references/detection/transforms.py for p=1.

    Args:
        image: [H, W, 3] uint8.
        boxes: [N, 4] xyxy.

    Returns:
        The mirrored image and boxes.
    """
    flipped = boxes.copy()
    flipped[:, [0, 2]] = np.float32(image.shape[1]) - boxes[:, [2, 0]]
    return image[:, ::-1], flipped


def choose_min_size(sizes: Sequence[int], chance: float) -> int:
    """Chooses one of several sizes of the shorter side, with equal probability.

    Reproduces GeneralizedRCNNTransform.torch_choice, torchvision's multi-scale training (and the choice in
    RandomShortestSize of references/detection/transforms.py).

    Args:
        sizes: of the shorter side, in pixels.
        chance: a random number in [0, 1).

    Returns:
        The chosen size.
    """
    return sizes[int(chance * len(sizes))]


def scale_jitter(image: Pixels, boxes: Boxes, *, target: tuple[int, int], scale: float) -> tuple[Pixels, Boxes]:
    """Scales an image to ``scale`` times the largest size that fits into ``target``.

    Reproduces ScaleJitter of references/detection/transforms.py on Pillow images: bilinear and antialiased (the resize
    of the models is not antialiased), since the jitter may shrink an image by 10 and more.

    Args:
        image: [H, W, 3] uint8.
        boxes: [N, 4] xyxy.
        target: (rows, columns); square in torchvision's recipes.
        scale: from .1 to 2 in torchvision's recipes.

    Returns:
        The scaled image and boxes; each side of the image has at least one pixel.
    """
    rows, columns = image.shape[:2]
    ratio = min(target[0] / rows, target[1] / columns) * scale
    new_rows, new_columns = max(int(rows * ratio), 1), max(int(columns * ratio), 1)
    resized = np.asarray(Image.fromarray(image).resize((new_columns, new_rows), Image.Resampling.BILINEAR))
    across, down = np.float32(new_columns / columns), np.float32(new_rows / rows)
    return resized, boxes * np.array([across, down, across, down], np.float32)


def fixed_size_crop(
    image: Pixels, boxes: Boxes, *, size: tuple[int, int], chance: float, fill: Sequence[int]
) -> tuple[Pixels, Boxes, Bool[np.ndarray, " N"]]:
    """Crops an image to ``size`` where it is larger, and pads it at the bottom and right where it is smaller.

    Reproduces FixedSizeCrop of references/detection/transforms.py.

    Args:
        image: [H, W, 3] uint8.
        boxes: [N, 4] xyxy.
        size: (rows, columns) of the result.
        chance: a random number in [0, 1], the position of the crop: 0 at the top left, 1 at the bottom right.
        fill: colour of the padding, 3 values from 0 to 255.

    Returns:
        The image; all N boxes, clipped to the crop; and a mask [N], True for the boxes that still have an area. The
        mask selects boxes and labels alike.
    """
    rows, columns = image.shape[:2]
    new_rows, new_columns = min(rows, size[0]), min(columns, size[1])
    top, left = int((rows - new_rows) * chance), int((columns - new_columns) * chance)
    result = np.empty((*size, 3), np.uint8)
    result[:] = fill
    result[:new_rows, :new_columns] = image[top : top + new_rows, left : left + new_columns]
    keep: Any = np.ones(len(boxes), bool)
    if (new_rows, new_columns) != (rows, columns):  # as in torchvision, boxes are clipped only if something is cut off
        corner = np.array([left, top, left, top], np.float32)
        boxes = np.clip(boxes - corner, 0, np.array([new_columns, new_rows] * 2, np.float32))
        keep = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    return result, boxes, keep


def check_jitter(
    jitter: tuple[float, float] | None, crop: int | Size | None, min_size: int | Sequence[int] | None
) -> tuple[tuple[float, float] | None, Size | None]:
    """Checks the options of large-scale jitter.

    Args:
        jitter: (low, high) limits of the scale, or None for no jitter.
        crop: side, or (rows, columns), of the jittered image in pixels; None for 1024.
        min_size: sizes of multi-scale training; can't be combined with ``jitter``.

    Returns:
        The limits of the scale, and (rows, columns) of the crop; None and None without jitter.

    Raises:
        ValueError: for a crop without jitter, for both ``jitter`` and ``min_size``, or for numbers out of range.
    """
    if jitter is None:
        if crop is not None:
            raise ValueError("crop belongs to jitter, which is not given: large-scale jitter is jitter=(.1, 2.)")
        return None, None
    if min_size is not None:
        raise ValueError("expected min_size (multi-scale) or jitter (large-scale jitter), got both")
    low, high = jitter
    if not 0 < low <= high < np.inf:
        raise ValueError(f"jitter should be (low, high), 0 < low <= high, got {jitter!r}")
    sides = (1024,) if crop is None else crop if isinstance(crop, tuple | list) else (crop,)
    if len(sides) > 2 or not all(isinstance(side, int | np.integer) and side > 0 for side in sides):
        raise ValueError(f"crop should be one or two positive integers, got {crop!r}")
    return (float(low), float(high)), (int(sides[0]), int(sides[-1]))
