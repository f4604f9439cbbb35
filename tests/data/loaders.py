"""Options of the loaders under test, and batches compared to the bit."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from flaxdet.structures import TransformConfig

needs_grain = pytest.mark.skipif(importlib.util.find_spec("grain") is None, reason="workers are grain's")

CONFIG = TransformConfig(min_size=64, max_size=96)


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and np.array_equal(a[key], b[key], equal_nan=False) for key in a
    )


def check_same(a, b) -> None:
    a, b = list(a), list(b)
    assert len(a) == len(b)
    for i, (one, other) in enumerate(zip(a, b, strict=True)):
        assert same(one, other), f"batch {i}"
