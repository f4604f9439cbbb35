"""Batches for training tests: random images and boxes as a data pipeline would deliver them."""

from __future__ import annotations

from typing import Any

import numpy as np

from flaxdet.models import FastRCNNConvFCHead
from tests.tiny import V2_NAME, tiny_model


def random_batch(
    rows: int = 8, *, seed: int = 0, size: int = 64, boxes: int = 3, canvases: bool = False, dtype: Any = np.float32
) -> dict[str, np.ndarray]:
    """A batch dict; its first image has no boxes. With canvases, some images are smaller than the bucket."""
    rng = np.random.default_rng(seed)
    corner, sides = rng.uniform(0, 30, (rows, boxes, 2)), rng.uniform(8, 30, (rows, boxes, 2))
    sizes = np.full((rows, 2), size, np.int32)
    if canvases:
        sizes[1::2] = size, size - 32
    pixels = rng.normal(size=(rows, size, size, 3))
    for image, (height, width) in zip(pixels, sizes, strict=True):
        image[height:] = image[:, width:] = 0
    batch = {
        "pixels": pixels.astype(dtype),
        "size": sizes,
        "original_size": sizes,
        "boxes": np.minimum(np.concatenate([corner, corner + sides], -1), sizes[:, None, [1, 0, 1, 0]]).astype(dtype),
        "labels": rng.integers(1, 4, (rows, boxes)).astype(np.int32),
        "valid": np.ones((rows, boxes), bool),
        "image_id": np.arange(rows, dtype=np.int64) + 2**40,
    }
    batch["boxes"][..., :2] = np.minimum(batch["boxes"][..., :2], batch["boxes"][..., 2:] - 4)
    batch["valid"][0] = False
    if canvases:
        batch["canvas"] = sizes.copy()
    return batch


def tiny_with_norm(name: str, dtype: Any = np.float32) -> Any:
    """The tiny detector; v2 with BatchNorm in its box head, too, as the real one has it."""
    model = tiny_model(name, dtype=dtype)
    if name != V2_NAME:
        return model
    return model.clone(box_head=FastRCNNConvFCHead((32, 7, 7), (16,), (64,), use_norm=True, dtype=dtype))
