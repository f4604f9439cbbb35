"""Images of any size in, detections out."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxdet.images.transform import Canvas, check_canvas, check_images, resized_size, to_original, transform
from flaxdet.models.detector import Detector
from flaxdet.structures import Detections, ImageBatch
from flaxdet.xla.compiling import compiler_options


def detect(model: Detector, variables: Any, batch: ImageBatch) -> Detections:
    """``model.apply``, its boxes [B, K, 4] in the pixels of the original images."""
    return to_original(model.apply(variables, batch), batch)  # pyright: ignore[reportArgumentType]


def jitted_detect(model: Detector, variables: Any, batch: ImageBatch) -> Detections:
    """``detect`` under jit, which keeps what it has compiled for the life of the process."""
    return detect_program(model.box_dtype)(model, variables, batch)


def detect_program(dtype: Any) -> Any:
    """The function behind ``jitted_detect`` for models of a dtype; always the same one."""
    return _detect_program(jax.default_backend(), jnp.dtype(dtype))


@functools.cache
def _detect_program(backend: str, dtype: Any) -> Any:
    del backend  # which the options depend on
    return jax.jit(detect, static_argnums=0, compiler_options=compiler_options(dtype))


def predict(
    model: Detector, variables: Any, images: Sequence[Any], *, canvas: Canvas = "image"
) -> list[dict[str, np.ndarray]]:
    """Detects objects in images of any sizes.

    Compiles once for each canvas size met (and keeps it for the life of the process).

    Args:
        model: from a builder or ``flaxdet.load``.
        variables: its ``{"params": ..., "batch_stats": ...}``.
        images: arrays [H, W, 3], RGB, all uint8 or all floats in [0, 1].
        canvas: "image": the answer for an image is the one that it gets alone. "batch": all images share the
            largest canvas, which reproduces torchvision's answer for this very list.

    Returns:
        For each image {"boxes": [N, 4] xyxy in pixels of the original image, "scores": [N] in [0, 1],
        "labels": [N] int32}, best first.

    Raises:
        TypeError: for images of another or of mixed dtypes.
        ValueError: for something that is no image, naming it by its number, or an unknown ``canvas``.
    """
    check_canvas(canvas, ("image", "batch"))
    arrays = check_images(images)
    config = model.transform
    for i, array in enumerate(arrays):  # every fault shows, by its number, before the first image is computed
        resized_size((array.shape[0], array.shape[1]), config, name=f"image {i}")
    # alone, an image's canvas is its bucket: no masks are traced, and no work is done beyond it
    groups = [arrays] if canvas == "batch" and arrays else [[array] for array in arrays]
    results: list[dict[str, np.ndarray]] = []
    for group in groups:
        batch = transform(group, config, canvas=canvas, dtype=model.box_dtype)
        results.extend(unpad(jitted_detect(model, variables, batch)))
    return results


def unpad(detections: Detections) -> list[dict[str, np.ndarray]]:
    """``Detections`` as one dict an image, without the padding.

    Args:
        detections: of B images.

    Returns:
        For each image {"boxes": [N, 4], "scores": [N], "labels": [N]}, numpy, best first.
    """
    host = jax.device_get(detections)
    return [
        {"boxes": boxes[valid], "scores": scores[valid], "labels": labels[valid]}
        for boxes, scores, labels, valid in zip(host.boxes, host.scores, host.labels, host.valid, strict=True)
    ]
