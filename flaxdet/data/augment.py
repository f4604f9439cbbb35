"""Augmentation of one image and its boxes, in numpy, as torchvision's training references do it.

Images are [H, W, 3] uint8. Boxes are [N, 4] float32 xyxy in pixels of the image that goes in, and afterwards of the one
that comes out. Chance is decided outside, and comes in as a number: the same arguments give the same result.
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
    """Left becomes right. Reproduces RandomHorizontalFlip of references/detection/transforms.py where it flips.

    Args:
        image: [H, W, 3] uint8.
        boxes: [N, 4] xyxy.

    Returns:
        Both, mirrored.
    """
    flipped = boxes.copy()
    flipped[:, [0, 2]] = np.float32(image.shape[1]) - boxes[:, [2, 0]]
    return image[:, ::-1], flipped


def choose_min_size(sizes: Sequence[int], chance: float) -> int:
    """One of several sizes of the shorter side, all as likely.

    Reproduces GeneralizedRCNNTransform.torch_choice, torchvision's multi-scale training (and the choice in
    RandomShortestSize of references/detection/transforms.py).

    Args:
        sizes: in pixels.
        chance: in [0, 1), decides which.

    Returns:
        The size chosen.
    """
    return sizes[int(chance * len(sizes))]


def scale_jitter(image: Pixels, boxes: Boxes, *, target: tuple[int, int], scale: float) -> tuple[Pixels, Boxes]:
    """Scales an image to ``scale`` times the size at which it would just fit into ``target``.

    Reproduces ScaleJitter of references/detection/transforms.py on Pillow images: bilinear and antialiased, unlike
    the models' own resize, since it may shrink an image by 10 and more.

    Args:
        image: [H, W, 3] uint8.
        boxes: [N, 4] xyxy.
        target: (rows, columns); the recipes' is square.
        scale: from .1 to 2 in the recipes.

    Returns:
        Both, scaled; no side is below a pixel.
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
    """Cuts an image to a size where it is larger, and pads it at the bottom and at the right where it is smaller.

    Reproduces FixedSizeCrop of references/detection/transforms.py.

    Args:
        image: [H, W, 3] uint8.
        boxes: [N, 4] xyxy.
        size: (rows, columns) of the result.
        chance: in [0, 1): where between top left (0) and bottom right the cut lies, the same in both directions.
        fill: 3 values from 0 to 255, of the padding.

    Returns:
        The image; the boxes, clipped to the part that was cut out; which of them are to be kept, those of which
        something is left. All N are returned, so that labels can be chosen alike.
    """
    rows, columns = image.shape[:2]
    new_rows, new_columns = min(rows, size[0]), min(columns, size[1])
    top, left = int((rows - new_rows) * chance), int((columns - new_columns) * chance)
    result = np.empty((*size, 3), np.uint8)
    result[:] = fill
    result[:new_rows, :new_columns] = image[top : top + new_rows, left : left + new_columns]
    keep: Any = np.ones(len(boxes), bool)
    if (new_rows, new_columns) != (rows, columns):  # else boxes stay as they are, as there
        corner = np.array([left, top, left, top], np.float32)
        boxes = np.clip(boxes - corner, 0, np.array([new_columns, new_rows] * 2, np.float32))
        keep = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    return result, boxes, keep


def check_jitter(
    jitter: tuple[float, float] | None, crop: int | Size | None, min_size: int | Sequence[int] | None
) -> tuple[tuple[float, float] | None, Size | None]:
    """Makes sure of the options of large-scale jitter.

    Args:
        jitter: (low, high) of the scale, or None for no jitter.
        crop: side, or (rows, columns), in pixels of the jittered image; None for 1024.
        min_size: sizes of multi-scale training, which excludes jitter.

    Returns:
        Scale and (rows, columns); None and None without jitter.

    Raises:
        ValueError: for a crop without jitter, jitter beside ``min_size``, or numbers that can't be met.
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
