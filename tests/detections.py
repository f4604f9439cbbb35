"""Comparison of detections of one image, without torch."""

from __future__ import annotations

import numpy as np


def assert_same_in_any_order(found, expected, tolerance):
    """Each detection has one of the other side's: the same label, box and score within the tolerance.

    For float32: two scores that nearly tie may change places between two compiled programs. Where order is part of the
    result, in float64, tests compare row by row.
    """
    assert (np.diff(found["scores"]) <= 0).all()
    assert len(found["scores"]) == len(expected["scores"])
    free = np.ones(len(found["scores"]), bool)
    for box, score, label in zip(expected["boxes"], expected["scores"], expected["labels"], strict=True):
        gaps = np.maximum(np.abs(found["boxes"] - box).max(axis=1), np.abs(found["scores"] - score))
        near = np.flatnonzero(free & (found["labels"] == label) & (gaps <= tolerance))
        assert len(near), f"no detection like {label} at {box} with {score}: the nearest is off by {gaps[free].min()}"
        free[near[gaps[near].argmin()]] = False
