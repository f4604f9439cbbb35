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

Found = dict[str, np.ndarray]


def detect(model: Detector, variables: Any, batch: ImageBatch) -> Detections:
    """``model.apply``, its boxes [B, K, 4] in the pixels of the original images; nothing is folded."""
    return to_original(model.apply(variables, batch), batch)  # pyright: ignore[reportArgumentType]


def jitted_detect(model: Detector, variables: Any, batch: ImageBatch) -> Detections:
    """``detect`` under jit, which keeps what it has compiled for the life of the process.

    ``predict`` and ``detect_dataset`` call it with the folded model, the comparison with torchvision with the model as
    it is.
    """
    return detect_program(model.box_dtype)(model, variables, batch)


def detect_program(dtype: Any) -> Any:
    """The function behind ``jitted_detect`` for models of a dtype; always the same one."""
    return _detect_program(jnp.dtype(dtype))


@functools.cache
def _detect_program(dtype: Any) -> Any:
    return JitByDevice(detect, dtype, static_argnums=0)


def unpad(detections: Detections) -> list[Found]:
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
