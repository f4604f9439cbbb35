"""Box algebra: areas, conversions, clipping, resizing. Overlaps are in ``iou``.

Boxes are xyxy in absolute pixels (x to the right, y downwards) unless a format is named; sizes are (rows,
columns). Functions take the boxes of one image, as an array or as lists, and have static shapes; ``vmap`` them over a
batch. All work under ``jit`` and ``grad``.

Half-precision boxes are computed in float32, as in torchvision, since areas overflow float16. torchvision's
rotated formats (``xywhr``, ``cxcywhr``, ``xyxyxyxy``) are left out: none of its detectors uses them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num
from numpy.typing import ArrayLike

FORMATS = ("xyxy", "xywh", "cxcywh")


def upcast_float(x: jax.Array) -> jax.Array:
    """The array in the precision that boxes and losses need: float64 stays, everything else becomes float32."""
    return x if x.dtype in (jnp.float32, jnp.float64) else x.astype(jnp.float32)


def box_area(boxes: Num[ArrayLike, "*N 4"], fmt: str = "xyxy") -> Num[Array, "*N"]:
    """Areas of boxes. Reproduces ``torchvision.ops.box_area``.

    Args:
        boxes: [N, 4] in ``fmt``, in any unit.
        fmt: "xyxy", "xywh" or "cxcywh".

    Returns:
        [N] in the unit squared, signed: negative where exactly one side of an xyxy box is reversed. Float types
        narrower than float32 become float32; integers become int64 where jax has 64-bit types on, else float32.

    Raises:
        ValueError: if ``fmt`` is unknown or ``boxes`` don't have 4 coordinates.
    """
    boxes = as_boxes("boxes", boxes)
    _check_format(fmt=fmt)
    boxes = upcast(boxes)
    if fmt == "xyxy":
        return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    return boxes[..., 2] * boxes[..., 3]


def box_convert(boxes: Num[ArrayLike, "*N 4"], in_fmt: str, out_fmt: str) -> Num[Array, "*N 4"]:
    """Boxes in another format. Reproduces ``torchvision.ops.box_convert``, without the rotated formats.

    Args:
        boxes: [N, 4] in ``in_fmt``, in any unit.
        in_fmt: "xyxy" (two corners), "xywh" (left upper corner, size) or "cxcywh" (centre, size).
        out_fmt: one of the same formats.

    Returns:
        [N, 4] in ``out_fmt``, in the same unit. To or from "cxcywh", integers become float32.

    Raises:
        ValueError: if a format is unknown or ``boxes`` don't have 4 coordinates.
    """
    boxes = as_boxes("boxes", boxes)
    _check_format(in_fmt=in_fmt, out_fmt=out_fmt)
    if in_fmt == out_fmt:
        return boxes
    if "cxcywh" in (in_fmt, out_fmt) and not jnp.issubdtype(boxes.dtype, jnp.floating):
        boxes = boxes.astype(jnp.float32)
    a, b = boxes[..., :2], boxes[..., 2:]
    if in_fmt == "xywh":
        b = a + b
    elif in_fmt == "cxcywh":
        a, b = a - 0.5 * b, a + 0.5 * b
    if out_fmt == "xywh":
        b = b - a
    elif out_fmt == "cxcywh":
        a, b = (a + b) / 2, b - a
    return jnp.concatenate((a, b), axis=-1)


def clip_boxes_to_image(boxes: Float[ArrayLike, "*N 4"], size: ArrayLike) -> Float[Array, "*N 4"]:
    """Moves coordinates outside the image onto the border. Reproduces ``torchvision.ops.clip_boxes_to_image``.

    Args:
        boxes: [N, 4] xyxy in pixels of the image.
        size: [2], the image's (rows, columns); may be a traced int32 array.

    Returns:
        [N, 4] with x in [0, columns] and y in [0, rows]; NaN stays.

    Raises:
        ValueError: if ``boxes`` don't have 4 coordinates.
    """
    boxes = as_boxes("boxes", boxes)
    rows, columns = _pair(size, boxes.dtype)
    limits = jnp.stack((columns, rows, columns, rows)).reshape((1,) * (boxes.ndim - 1) + (4,))
    # `where` rather than `clip`: as in torch, the gradient is 1, not 0.5, for a corner exactly on the border
    boxes = jnp.where(boxes < 0, 0, boxes)
    return jnp.where(boxes > limits, limits, boxes)


def remove_small_boxes(boxes: Num[ArrayLike, "*N 4"], min_size: float) -> Bool[Array, "*N"]:
    """Which boxes have both sides of at least ``min_size``.

    ``torchvision.ops.remove_small_boxes`` as a mask, since a list of indices has no static shape.

    Args:
        boxes: [N, 4] xyxy in pixels.
        min_size: in pixels; compared in the boxes' dtype.

    Returns:
        [N], True for the boxes to keep.

    Raises:
        ValueError: if ``boxes`` don't have 4 coordinates.
    """
    boxes = as_boxes("boxes", boxes)
    boxes = boxes if jnp.issubdtype(boxes.dtype, jnp.floating) else upcast(boxes)  # unsigned integers would wrap around
    w, h = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    return (w >= min_size) & (h >= min_size)


def resize_boxes(
    boxes: Float[ArrayLike, "*N 4"], original_size: ArrayLike, new_size: ArrayLike
) -> Float[Array, "*N 4"]:
    """Boxes of an image that was resized.

    Reproduces ``torchvision.models.detection.transform.resize_boxes``, where the ratio of the sizes is a float32
    even if the boxes are float64.

    Args:
        boxes: [N, 4] xyxy in pixels of the original image.
        original_size: [2], (rows, columns) before the resize; may be a traced int32 array.
        new_size: [2], (rows, columns) after the resize; may be a traced int32 array.

    Returns:
        [N, 4] xyxy in pixels of the resized image; integers become float32.

    Raises:
        ValueError: if ``boxes`` don't have 4 coordinates.
    """
    boxes = as_boxes("boxes", boxes)
    if not jnp.issubdtype(boxes.dtype, jnp.floating):
        boxes = boxes.astype(jnp.float32)  # the ratios would be whole numbers
    new, original = _pair(new_size, jnp.float32), _pair(original_size, jnp.float32)
    ratio_y, ratio_x = (n / o for n, o in zip(new, original, strict=True))
    ratios = jnp.stack((ratio_x, ratio_y, ratio_x, ratio_y)).astype(boxes.dtype)
    return boxes * ratios.reshape((1,) * (boxes.ndim - 1) + (4,))


def upcast(x: jax.Array) -> jax.Array:
    """The array in a dtype in which products of coordinates don't overflow.

    Floats narrower than float32 become float32. Integers become int64 where jax has 64-bit types on, as in torchvision,
    and float32 elsewhere: the area of a box of 46341x46341 pixels overflows int32.
    """
    if jnp.issubdtype(x.dtype, jnp.floating):
        return upcast_float(x)
    return x.astype(jnp.int64 if jax.dtypes.canonicalize_dtype(jnp.int64) == jnp.int64 else jnp.float32)


def _pair(size: ArrayLike, dtype: jnp.dtype | type) -> tuple[jax.Array, jax.Array]:
    pair = jnp.asarray(size)
    if pair.shape != (2,):
        raise ValueError(f"a size must be two numbers, (rows, columns), found shape {list(pair.shape)}")
    return pair[0].astype(dtype), pair[1].astype(dtype)


def as_boxes(name: str, boxes: ArrayLike) -> jax.Array:
    """Boxes as an array; raises ValueError, naming the argument, unless the last axis has 4 coordinates."""
    array = jnp.asarray(boxes)
    if array.ndim == 0 or array.shape[-1] != 4:
        raise ValueError(f"{name} must have 4 coordinates in the last axis, found shape {list(array.shape)}")
    return array


def as_mask(name: str, mask: ArrayLike | None, count: int) -> jax.Array:
    """A mask [count] as an array, of ones where it is None; raises TypeError or ValueError that names the argument."""
    if mask is None:
        return jnp.ones(count, bool)
    array = jnp.asarray(mask)
    if array.dtype != jnp.bool_:
        raise TypeError(f"{name} must be boolean, found {array.dtype}")
    if array.shape != (count,):
        raise ValueError(f"{name} must have shape [{count}], found {list(array.shape)}")
    return array


def _check_format(**named: str) -> None:
    for name, fmt in named.items():
        if fmt not in FORMATS:
            raise ValueError(f"{name} must be one of {', '.join(FORMATS)}, found {fmt!r}")
