"""Images and targets of any sizes to a batch on canvases, and boxes back to the original images.

Reproduces torchvision.models.detection.transform.GeneralizedRCNNTransform; the resize itself is in
``flaxdet.images.resize``. Sizes are (rows, columns) in pixels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from flaxdet.images.resize import resize_image
from flaxdet.models.detector import Detector
from flaxdet.models.labels import check_labels, label_range
from flaxdet.ops import resize_boxes
from flaxdet.structures import Detections, ImageBatch, Targets, TransformConfig

# The padded size that an image counts as having: the smallest for the image itself, the largest of those in the batch
# (as torchvision pads), or the whole bucket. Every option `canvas` takes some of these words.
Canvas = Literal["image", "batch", "bucket"]

# Floats may lie outside [0, 1] by this much, since a resize rounds: torchvision's gives 1.0000001.
RANGE_SLACK = 1e-4
RAW_STEP = 128  # raw images are padded to multiples of this before the resize on the device, to save compilations


def check_image(image: Any, name: str) -> np.ndarray:
    """Checks that a value is an image.

    Args:
        image: [H, W, 3] uint8, or floats in [0, 1]; floats up to 1e-4 outside this range are accepted unchanged.
        name: name of the image in an error.

    Returns:
        The image as a numpy array.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape, an empty image, NaN, or floats further outside [0, 1].
    """
    try:
        array = np.asarray(image)
    except ValueError as error:  # nested lists of unequal lengths
        raise ValueError(f"{name}: expected an array [H, W, 3], got a {type(image).__name__} ({error})") from None
    if array.dtype != np.uint8 and not np.issubdtype(array.dtype, np.floating):
        if not jnp.issubdtype(array.dtype, jnp.floating):  # bfloat16 and others that numpy lacks
            raise TypeError(f"{name}: expected uint8, or floats in [0, 1], got dtype {array.dtype}")
        array = array.astype(np.float32)
    if array.ndim != 3 or array.shape[-1] != 3:
        raise ValueError(f"{name}: expected shape [H, W, 3], got {list(array.shape)}")
    if 0 in array.shape:
        raise ValueError(f"{name}: expected at least one pixel, got shape {list(array.shape)}")
    if array.dtype != np.uint8:
        low, high = array.min(), array.max()  # NaN if the image has a NaN
        if not (low >= -RANGE_SLACK and high <= 1 + RANGE_SLACK):
            raise ValueError(f"{name}: expected floats in [0, 1], got values from {low!s} to {high!s}")
    return array


def check_images(images: Sequence[Any]) -> list[np.ndarray]:
    """``check_image`` on a list of images, which must have one dtype.

    Args:
        images: arrays [H, W, 3] of any sizes, all uint8 or all floats in [0, 1].

    Returns:
        The images as numpy arrays.

    Raises:
        TypeError: if dtypes are mixed, or ``images`` is a single array or anything else than a list.
        ValueError: as ``check_image``, naming the image by its number.
    """
    rank = getattr(images, "ndim", None)
    if rank in (2, 3):
        raise TypeError(f"expected a list of images, got one array of rank {rank}: put it in a list")
    if isinstance(images, (str, bytes, Mapping)) or not isinstance(images, Iterable):
        raise TypeError(f"expected a list of images, got {type(images).__name__}")
    arrays = [check_image(image, f"image {i}") for i, image in enumerate(images)]
    for i, array in enumerate(arrays):
        if array.dtype != arrays[0].dtype:
            raise TypeError(f"image {i}: expected every image in one dtype, got {array.dtype} after {arrays[0].dtype}")
    return arrays


def check_canvas(canvas: Any, allowed: Sequence[str] = ("image", "batch", "bucket")) -> None:
    """Raises ValueError unless ``canvas`` is one of the words."""
    if canvas not in allowed:
        *others, last = (f'"{word}"' for word in allowed)
        raise ValueError(f"canvas should be {', '.join(others)} or {last}, got {canvas!r}")


def resized_size(
    size: tuple[int, int], config: TransformConfig, *, min_size: int | None = None, name: str = "image"
) -> tuple[int, int]:
    """(rows, columns) of an image after the resize, computed in Python floats as in torchvision.

    Args:
        size: (rows, columns) of the original image.
        config: ``model.transform``.
        min_size: overrides the last of ``config.min_size``.
        name: name of the image in an error.

    Raises:
        ValueError: if the resize would leave no pixel of a side (as for an image of 1x1334).
    """
    if config.fixed_size is not None:
        width, height = config.fixed_size
        return int(height), int(width)
    shorter = min_size or config.min_size[-1]
    scale = min(shorter / min(size), config.max_size / max(size))
    rows, columns = (math.floor(side * scale) for side in size)
    if rows < 1 or columns < 1:
        raise ValueError(
            f"{name} of {size[0]}x{size[1]} (rows x columns) would be resized to {rows}x{columns}: it is too "
            f"elongated for min_size={shorter}, max_size={config.max_size}"
        )
    return rows, columns


def canvas_size(size: tuple[int, int], config: TransformConfig) -> tuple[int, int]:
    """(rows, columns) of the smallest canvas for a resized image: multiples of ``size_divisible``."""
    step = int(config.size_divisible)
    rows, columns = (-(-side // step) * step for side in size)
    return rows, columns


def _raw_bucket(size: tuple[int, int]) -> tuple[int, int]:
    rows, columns = (-(-side // RAW_STEP) * RAW_STEP for side in size)
    return rows, columns


def transform(
    images: Sequence[Any],
    config: TransformConfig,
    *,
    canvas: Canvas = "image",
    bucket: tuple[int, int] | None = None,
    dtype: Any = jnp.float32,
) -> ImageBatch:
    """Resizes images and pads them to a batch for a model.

    Args:
        images: arrays [H, W, 3] of any sizes, all uint8 or all floats in [0, 1].
        config: ``model.transform``.
        canvas: "image" gives each image the smallest canvas with multiples of ``size_divisible``, so that its
            detections do not depend on the other images of the batch; "batch" gives every image the largest of
            these canvases, as in torchvision; "bucket" gives every image the whole bucket.
        bucket: (rows, columns) of the array; default the smallest that holds every canvas.
        dtype: float32 or float64 (bfloat16 models take float32 pixels).

    Returns:
        The batch; ``canvas`` is ``None`` if every canvas is the whole bucket.

    Raises:
        TypeError: for images of another or of mixed dtypes.
        ValueError: for anything that is no image, an empty list, a bucket that is too small, or a canvas that is
            smaller than the bucket if a side of canvas or bucket is no multiple of 32.
    """
    check_canvas(canvas)
    arrays = check_images(images)
    if not arrays:
        raise ValueError("expected at least one image, got an empty list")
    dtype = jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32
    original = [(array.shape[0], array.shape[1]) for array in arrays]
    sizes = [resized_size(size, config, name=f"image {i}") for i, size in enumerate(original)]
    canvases = [canvas_size(size, config) for size in sizes]
    largest = (max(rows for rows, _ in canvases), max(columns for _, columns in canvases))
    if canvas == "batch":
        canvases = [largest] * len(arrays)
    bucket = largest if bucket is None else (int(bucket[0]), int(bucket[1]))
    if canvas == "bucket":
        canvases = [bucket] * len(arrays)
    if bucket[0] < largest[0] or bucket[1] < largest[1]:
        raise ValueError(f"bucket should hold {largest[0]}x{largest[1]} (rows x columns), got {bucket}")
    whole = all(shape == bucket for shape in canvases)
    if not whole and any(side % 32 for shape in (bucket, *canvases) for side in shape):
        raise ValueError(
            f"canvases smaller than their bucket need multiples of 32, got size_divisible={config.size_divisible} "
            f'and bucket {bucket}: use canvas="batch" or "bucket", or a multiple of 32'
        )

    pixels = []
    for array, size, new_size in zip(arrays, original, sizes, strict=True):
        raw = _raw_bucket(size)
        if raw != size:
            array = np.pad(array, ((0, raw[0] - size[0]), (0, raw[1] - size[1]), (0, 0)))
        if array.dtype != np.uint8:
            array = array.astype(dtype)
        pixels.append(
            resize_image(
                array,
                np.asarray(size, np.int32),
                np.asarray(new_size, np.int32),
                bucket=bucket,
                mean=config.image_mean,
                std=config.image_std,
                dtype=dtype,
            )
        )
    return ImageBatch(
        pixels=jnp.stack(pixels),
        size=jnp.asarray(sizes, jnp.int32),
        original_size=jnp.asarray(original, jnp.int32),
        canvas=None if whole else jnp.asarray(canvases, jnp.int32),
    )


def to_original(detections: Detections, batch: ImageBatch) -> Detections:
    """Scales boxes back to the original images (torchvision's GeneralizedRCNNTransform.postprocess).

    Args:
        detections: detections of a model, with boxes [B, K, 4] xyxy in the pixels of the resized images.
        batch: the batch that the model ran on; ``size`` and ``original_size`` are used.

    Returns:
        The detections, with boxes in the pixels of the original images.
    """
    boxes = jax.vmap(resize_boxes)(detections.boxes, batch.size, batch.original_size)
    return dataclasses.replace(detections, boxes=boxes)


def transform_targets(
    targets: Sequence[Mapping[str, Any]],
    batch: ImageBatch,
    *,
    model: Detector | None = None,
    num_classes: int | None = None,
    background: bool = True,
    max_boxes: int | None = None,
) -> Targets:
    """Builds the padded ground truth of a batch, in the pixels of the resized images.

    Args:
        targets: for each image {"boxes": [N, 4] xyxy in pixels of the original image, "labels": [N] integers};
            an image may have no boxes.
        batch: the images, from ``transform``.
        model: the detector that is to take the targets, whose ``target_labels`` are the allowed labels. Either
            ``model`` or ``num_classes`` is needed.
        num_classes: k, the background included: labels are 1..k-1.
        background: with ``num_classes``: False if a box may have label 0, as in FCOS; labels are then 0..k-1.
        max_boxes: G, slots of an image; default the largest N, at least 1.

    Returns:
        Targets in the dtype of the batch's pixels.

    Raises:
        ValueError: for a box without positive height and width (torchvision's error), boxes that are not [N, 4] or
            not finite, different numbers of labels and boxes, a label outside the classes, more boxes than
            ``max_boxes``, or different numbers of targets and images; messages name the image.
        TypeError: for labels that are not integers; for both or neither of ``model`` and ``num_classes``, or
            ``background`` without ``num_classes``.
    """
    if (model is None) == (num_classes is None) or (model is not None and not background):
        raise TypeError(
            "transform_targets should be told which labels there are: expected either model, or num_classes (and "
            f"background=False if a box may have label 0), got model={model and type(model).__name__}, "
            f"num_classes={num_classes} and background={background}"
        )
    allowed = label_range(num_classes, background=background) if model is None else model.target_labels
    dtype = np.dtype(batch.pixels.dtype)
    count = batch.size.shape[0]
    if len(targets) != count:
        raise ValueError(f"expected a target for each of {count} images, got {len(targets)}")
    rows = [_check_target(target, i, allowed) for i, target in enumerate(targets)]
    largest = max(len(boxes) for boxes, _ in rows)
    slots = max(largest, 1) if max_boxes is None else max_boxes
    if largest > slots:
        i = next(i for i, (boxes, _) in enumerate(rows) if len(boxes) > slots)
        raise ValueError(f"image {i} has {len(rows[i][0])} boxes, more than max_boxes={slots}: raise it")
    boxes, labels = np.zeros((count, slots, 4), dtype), np.zeros((count, slots), np.int32)
    valid = np.zeros((count, slots), bool)
    for i, (image_boxes, image_labels) in enumerate(rows):
        n = len(image_boxes)
        boxes[i, :n], labels[i, :n], valid[i, :n] = image_boxes, image_labels, True
    resized = jax.vmap(resize_boxes)(jnp.asarray(boxes), batch.original_size, batch.size)
    return Targets(boxes=resized, labels=jnp.asarray(labels), valid=jnp.asarray(valid))


def _check_target(target: Mapping[str, Any], i: int, allowed: range) -> tuple[np.ndarray, np.ndarray]:
    boxes, labels = np.asarray(target["boxes"]), np.asarray(target["labels"])
    if boxes.size == 0:
        boxes, labels = boxes.reshape(0, 4), labels.reshape(-1)
    if boxes.ndim != 2 or boxes.shape[-1] != 4:
        raise ValueError(
            f"Expected target boxes to be a tensor of shape [N, 4], got {list(boxes.shape)} for target at index {i}."
        )
    if labels.shape != boxes.shape[:1]:
        raise ValueError(f"image {i}: expected a label for each of {len(boxes)} boxes, got {list(labels.shape)}")
    bad = ~np.isfinite(boxes).all(axis=1) | (boxes[:, 2:] <= boxes[:, :2]).any(axis=1)
    if bad.any():
        raise ValueError(
            "All bounding boxes should have positive height and width. Found invalid box "
            f"{boxes[bad.argmax()].tolist()} for target at index {i}."
        )
    if labels.size:  # an empty list is an array of floats
        check_labels(labels, np.ones(labels.shape, bool), allowed, lambda box: f"image {i}, box {box}")
    return boxes, labels
