"""Checks of flaxdet's JSON: the description of a model, the signature of an export, metrics, names of labels.

A check is a function ``(value, where)`` that raises ValueError with one line, which names the place in the JSON, what
was expected there and what was found.
"""

from __future__ import annotations

import datetime
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Check = Callable[[Any, str], None]

_MOST_LABELS = 100_000
_HIDDEN = ("Cc", "Cs")  # control characters, and halves of surrogate pairs
_ORDER = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # change the order in which a line is shown
_INT32 = 2**31 - 1  # of numbers that become arrays
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # on Windows, in every folder


def refuse(where: str, expected: str, value: Any) -> None:
    """Raises the ValueError of a check.

    Args:
        where: place in the JSON, such as "options.min_size".
        expected: a description of the expected value.
        value: the value found.
    """
    shown = value if isinstance(value, (bool, int, float, str)) or value is None else type(value).__name__
    text = repr(shown) if isinstance(shown, str) and shown is value else str(shown)
    raise ValueError(f"{where} should be {expected}, got {text[:80]}")


def text(value: Any, where: str) -> None:
    """A text of one line, of at most 1000 characters."""
    if (
        not isinstance(value, str)
        or len(value) > 1000
        or any(c in _ORDER or unicodedata.category(c) in _HIDDEN for c in value)
    ):
        refuse(where, "a text of one line", value)


def file_name(value: Any, where: str) -> None:
    """The name of a file in the same folder: no path, and no name that stands for a device."""
    text(value, where)
    if (
        not value
        or any(c in value for c in '/\\:*?"<>|')
        or value != value.rstrip(" .")
        or value.startswith(" ")
        or len(value.encode()) > 255
        or _DEVICES.fullmatch(value)
    ):
        refuse(where, "the name of a file in the same folder, without a path", value)


def sha256(value: Any, where: str) -> None:
    """A SHA-256 in hexadecimal digits."""
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{64}", value):
        refuse(where, "a SHA-256", value)


def date(value: Any, where: str) -> None:
    """A date such as "2026-01-31"."""
    try:
        if not isinstance(value, str) or len(value) != 10:
            raise ValueError
        datetime.date.fromisoformat(value)
    except ValueError:
        refuse(where, "a date such as 2026-01-31", value)


def boolean(value: Any, where: str) -> None:
    """True or False."""
    if not isinstance(value, bool):
        refuse(where, "true or false", value)


def integer(low: int, high: int = _INT32) -> Check:
    """An integer from ``low`` to ``high``."""

    def check(value: Any, where: str) -> None:
        if type(value) is not int or not low <= value <= high:
            refuse(where, f"an integer from {low} to {high}", value)

    return check


def number(value: Any, where: str) -> None:
    """A finite number, of a size that float32 holds."""
    if type(value) not in (int, float) or not abs(value) < 3e38:
        refuse(where, "a finite number", value)


def one_of(*values: str) -> Check:
    """One of some texts."""

    def check(value: Any, where: str) -> None:
        if value not in values or not isinstance(value, str):
            refuse(where, f"one of {', '.join(values)}", value)

    return check


def optional(check: Check) -> Check:
    """``check``, or null."""

    def nullable(value: Any, where: str) -> None:
        if value is not None:
            check(value, where)

    return nullable


def list_of(check: Check, least: int = 0, most: int = 1000) -> Check:
    """A list of ``least`` to ``most`` items."""

    def check_list(value: Any, where: str) -> None:
        if not isinstance(value, list) or not least <= len(value) <= most:
            count = f", {len(value)} items" if isinstance(value, list) else ""
            refuse(where, f"a list of {least} to {most} items", value if not count else f"a list{count}")
        for i, item in enumerate(value):
            check(item, f"{where}[{i}]")

    return check_list


def record(fields: Mapping[str, Check], maybe: Mapping[str, Check] | None = None) -> Check:
    """A dict with these keys; further keys may be there, since later versions of flaxdet may add some.

    Args:
        fields: checks of the values by key.
        maybe: the same, of keys that may be missing.
    """

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            refuse(where or "it", "a JSON object", value)
        inside = f"{where}." if where else ""
        for name, check_value in fields.items():
            if name not in value:
                raise ValueError(f"{inside}{name} is missing")
            check_value(value[name], f"{inside}{name}")
        for name, check_value in (maybe or {}).items():
            if name in value:
                check_value(value[name], f"{inside}{name}")

    return check


def mapping(check: Check, most: int = 1000) -> Check:
    """A dict with any names as keys."""

    def check_mapping(value: Any, where: str) -> None:
        if not isinstance(value, dict) or len(value) > most:
            refuse(where or "it", f"a JSON object of at most {most} keys", value)
        for name, item in value.items():
            text(name, f"a key of {where or 'it'}")
            check(item, f"{where}.{name}" if where else name)

    return check_mapping


def _option(value: Any, where: str, depth: int = 3) -> None:
    """An option of a builder: a number, true, false, null, a name, lists of these, or a part with such fields."""
    if isinstance(value, list) and depth:
        if len(value) > 1000:
            refuse(where, "a list of at most 1000 items", f"{len(value)} items")
        for i, item in enumerate(value):
            _option(item, f"{where}[{i}]", depth - 1)
    elif isinstance(value, dict) and depth == 3:
        text(value.get("type"), f"{where}.type")
        for name, field in value.items():
            _option(field, f"{where}.{name}", depth - 1)
    elif isinstance(value, str):
        text(value, where)
    elif type(value) is int:
        integer(-_INT32)(value, where)
    elif type(value) is float and math.isfinite(value):
        number(value, where)
    elif value is not None and not isinstance(value, bool):
        refuse(where, "a number, true, false, null, a name, a list of these, or a part of a model", value)


CATEGORIES = optional(list_of(text, 0, _MOST_LABELS))
_SIDE = integer(1, 100_000)

# In the metadata of .safetensors, and config.json.
DESCRIPTION = record({"builder": optional(text), "options": mapping(_option), "categories": CATEGORIES})

# signature.json of an export.
SIGNATURE = record(
    {
        "platforms": list_of(one_of("cpu", "cuda", "rocm", "tpu"), 1, 4),
        "raw_size": _SIDE,
        "resize": record(
            {
                "min_size": number,
                "max_size": number,
                "fixed_size": optional(list_of(_SIDE, 2, 2)),
                "size_divisible": _SIDE,
            }
        ),
        "compiler_options": mapping(
            mapping(lambda value, where: (boolean if isinstance(value, bool) else text)(value, where))
        ),
        "categories": CATEGORIES,
        "weights": record({"file": file_name, "sha256": sha256}),
        "programs": list_of(
            record(
                {
                    "file": file_name,
                    "sha256": sha256,
                    "bucket": list_of(_SIDE, 2, 2),
                    "batch": optional(integer(1, 100_000)),
                }
            ),
            1,
        ),
    },
    {"jax": text, "date": date, "calling_convention_version": integer(1), "model": text},
)

# Figures by name, null where a figure is undefined.
METRICS = optional(mapping(optional(number)))


def check_names(names: Sequence[Any], where: str) -> None:
    """Raises ValueError unless these are names of labels as files hold them.

    Args:
        names: the names, label 0 first.
        where: the place in the JSON that holds them, for the message.
    """
    CATEGORIES(list(names), where)
