"""torchvision's transform with our options, and noise to put through both."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from flaxdet.structures import TransformConfig

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None or importlib.util.find_spec("torchvision") is None,
    reason="torchvision is the reference",
)


RNG = np.random.default_rng(0)
SMALL = TransformConfig(min_size=48, max_size=80)


def reference(config: TransformConfig):
    """torchvision's transform with the same options, in evaluation mode."""
    from flaxdet.convert import reference

    reference.torchvision()
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    return GeneralizedRCNNTransform(
        config.min_size,
        config.max_size,
        config.image_mean,
        config.image_std,
        config.size_divisible,
        config.fixed_size,
    ).eval()


def noise(rows: int, columns: int, dtype=np.uint8) -> np.ndarray:
    if dtype == np.uint8:
        return RNG.integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    return RNG.random((rows, columns, 3)).astype(dtype)
