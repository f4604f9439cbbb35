"""Layouts of a tensor in torch and in Flax: invertible permutations of the elements, bit for bit.

Letters: O, I output and input channels; H, W rows and columns (of a kernel or of pooled features); C
channels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
    """A pair of inverse functions between torch's and Flax's arrays, and the function between their shapes.

    Attributes:
        name: torch's axes and Flax's axes.
        to_flax: torch's array -> Flax's array; a view if numpy can make one.
        to_torch: Flax's array -> torch's array.
        torch_shape: Flax's shape -> torch's shape.
    """

    name: str
    to_flax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]
    torch_shape: Callable[[tuple[int, ...]], tuple[int, ...]]


IDENTITY = Layout("same", lambda x: x, lambda x: x, lambda shape: shape)

CONV = Layout(
    "OIHW <-> HWIO",
    lambda x: x.transpose(2, 3, 1, 0),
    lambda x: x.transpose(3, 2, 0, 1),
    lambda shape: (shape[3], shape[2], shape[0], shape[1]),
)

DENSE = Layout("OI <-> IO", lambda x: x.T, lambda x: x.T, lambda shape: shape[::-1])


@functools.cache
def flattened(height: int, width: int) -> Layout:
    """The layout of the first linear layer after [H, W, C] features, which torch flattens as CHW and Flax as HWC.

    Args:
        height: H of the features.
        width: W of the features.

    Returns:
        The layout O(CHW) <-> (HWC)O of the kernel.
    """
    grid = (height, width)
    return Layout(
        f"O(CHW) <-> (HWC)O, HW = {height}x{width}",
        lambda x: x.reshape(x.shape[0], -1, *grid).transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
        lambda x: x.reshape(*grid, -1, x.shape[1]).transpose(3, 2, 0, 1).reshape(x.shape[1], -1),
        lambda shape: shape[::-1],
    )


def fits(shape: tuple[int, ...], height: int, width: int) -> bool:
    """Whether a Flax kernel [rows, O] can follow flattened [height, width, C] features."""
    return len(shape) == 2 and shape[0] % math.prod((height, width)) == 0
