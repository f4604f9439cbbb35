"""Values of a COCO file: numbers and ids, as tools write them. A number may be written as a string."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np

Id = int | str

_NUMBER = re.compile(r"\s*[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)
_INTEGER_ID = re.compile(r"0|-?[1-9]\d{0,18}", re.ASCII)  # not "007", which is another id than "7"
_MOST_DIGITS = 30  # of a number in a string


def number(value: Any) -> float | None:
    """The value as a finite number, an int where the value is one; None if it is no number. True is none."""
    if isinstance(value, str) and len(value) <= _MOST_DIGITS and _NUMBER.fullmatch(value):
        value = float(value)
        value = int(value) if value.is_integer() and abs(value) < 2**53 else value
    if isinstance(value, np.generic):
        value = value.item()
    if type(value) is int:
        return value if abs(value) < 2**1000 else None  # beyond float's range
    return value if isinstance(value, float) and math.isfinite(value) else None


def integer(value: Any) -> int | None:
    """The value as an integer, or None if it is none; 3.0 counts, since tables such as pandas' write floats."""
    value = number(value)
    if value is None or value != math.floor(value) or abs(value) >= 2**63:
        return None
    return int(value)


def identifier(value: Any) -> Id | None:
    """The value as an id: an integer, also one in a string; another string that is not empty; else None."""
    if isinstance(value, str):
        return int(value) if _INTEGER_ID.fullmatch(value) and abs(int(value)) < 2**63 else value or None
    return integer(value)


def short(value: Any) -> str:
    """A value of the file for an error message."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
