"""Checks of the options of modules, with clear errors instead of errors from deep inside jax."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def check_counts(owner: Any, least: int, *names: str) -> None:
    """Checks options that count something.

    Args:
        owner: the object that has the options.
        least: the smallest allowed value.
        *names: names of the options.

    Raises:
        TypeError: for a value that is no whole number.
        ValueError: for a value below ``least``.
    """
    for name in names:
        _check_count(owner, least, name, getattr(owner, name))


def check_sizes(owner: Any, name: str, count: int | None = None) -> None:
    """Checks an option that holds several counts of at least 1.

    Args:
        owner: the object that has the option.
        name: name of the option.
        count: number of values that the option should hold; default any number, including 0.

    Raises:
        TypeError: for a value that is no sequence of whole numbers.
        ValueError: for another number of values, or a value below 1.
    """
    values = getattr(owner, name)
    if not isinstance(values, (tuple, list)):
        raise TypeError(f"{type(owner).__name__}: {name} should be a sequence of whole numbers, got {values!r}")
    if count is not None and len(values) != count:
        raise ValueError(f"{type(owner).__name__}: {name} should be {count} whole numbers, got {values!r}")
    for i, value in enumerate(values):
        _check_count(owner, 1, f"{name}[{i}]", value)


def _check_count(owner: Any, least: int, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{type(owner).__name__}: {name} should be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{type(owner).__name__}: {name} should be at least {least}, got {value}")


def check_numbers(owner: Any, *names: str, low: float = -math.inf, high: float = math.inf) -> None:
    """Checks options that are one number each. The range of a jax array, which may be traced, is not checked.

    Args:
        owner: the object that has the options.
        *names: names of the options.
        low: the smallest value.
        high: the largest value.

    Raises:
        TypeError: for a value that is no number.
        ValueError: for NaN, or a number out of range.
    """
    for name in names:
        value = getattr(owner, name)
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
            if getattr(value, "shape", None) == ():
                continue
            raise TypeError(f"{type(owner).__name__}: {name} should be a number, got {value!r}")
        if not low <= value <= high:
            limits = "" if math.isinf(low) else f" of at least {low}" if math.isinf(high) else f" from {low} to {high}"
            raise ValueError(f"{type(owner).__name__}: {name} should be a number{limits}, got {value}")
