"""The model on one batch: detections in the pixels of the original images."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxdet.images.transform import to_original
from flaxdet.models.detector import Detector
from flaxdet.structures import Detections, ImageBatch
from flaxdet.xla.jit import JitByDevice

ImageDetections = dict[str, np.ndarray]  # {"boxes": [N, 4], "scores": [N], "labels": [N]} of one image


def detect(model: Detector, variables: Any, batch: ImageBatch) -> Detections:
    """``model.apply``, with boxes [B, K, 4] in the pixels of the original images. BatchNorm is not folded."""
    detections: Any = model.apply(variables, batch)  # Flax's type also covers the pair that `mutable` returns
    return to_original(detections, batch)


def jitted_detect(model: Detector, variables: Any, batch: ImageBatch) -> Detections:
    """``detect`` under jit. Compiled programs are cached for the life of the process.

    ``predict`` and ``detect_dataset`` pass the folded model; the comparison with torchvision passes the original model.
    """
    return detect_program(model.box_dtype)(model, variables, batch)


def detect_program(dtype: Any) -> Any:
    """The function that ``jitted_detect`` calls for models of a dtype; the same object for every call."""
    return _detect_program(jnp.dtype(dtype))


@functools.cache
def _detect_program(dtype: Any) -> Any:
    return JitByDevice(detect, dtype, static_argnums=0)


def unpad(detections: Detections) -> list[ImageDetections]:
    """Converts ``Detections`` into one dict per image, without padding.

    Args:
        detections: detections of B images.

    Returns:
        For each image {"boxes": [N, 4], "scores": [N], "labels": [N]}, numpy, best first.
    """
    host = jax.device_get(detections)
    return [
        {"boxes": boxes[valid], "scores": scores[valid], "labels": labels[valid]}
        for boxes, scores, labels, valid in zip(host.boxes, host.scores, host.labels, host.valid, strict=True)
    ]
