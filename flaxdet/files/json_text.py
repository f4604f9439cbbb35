"""JSON from files that anybody may have written: strict, bounded, and with one type of error."""

from __future__ import annotations

import json
import math
import os
from typing import Any, NoReturn

from flaxdet.files.opening import HEAD, foreign_kind, open_regular

MAX_TEXT = 4 << 20  # bytes; parsed, they can take 30 times as many


def loads(text: str | bytes) -> Any:
    """Parses JSON.

    Args:
        text: the JSON, as UTF-8 if bytes; at most 4 MiB.

    Returns:
        The value. Its numbers are finite, its dicts had every key once, and its texts can be encoded.

    Raises:
        ValueError: if the text is anything else.
    """
    if len(text) > MAX_TEXT:
        raise ValueError(f"{len(text):,} bytes, expected at most {MAX_TEXT:,}")
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        value = json.loads(text, parse_constant=_no_number, parse_float=_finite, object_pairs_hook=_once)
        if "\\u" in text:  # an escape may give half a surrogate pair
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deep") from None
    except UnicodeError:
        raise ValueError("it is no text in UTF-8") from None
    return value


def read(path: str | os.PathLike[str]) -> Any:
    """Parses a JSON file.

    Args:
        path: a regular file.

    Raises:
        OSError: if it can't be read.
        ValueError: as ``loads``; also says what stands in place of the file, such as a Git LFS pointer.
    """
    return loads(read_bytes(path))


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The content of a file that should hold JSON, for ``loads``.

    Raises:
        OSError: if it can't be read.
        ValueError: if another kind of file stands in its place.
    """
    with open_regular(path) as file:
        content = file.read(MAX_TEXT + 1)
    if (kind := foreign_kind(content[:HEAD])) is not None:
        raise ValueError(f"it {kind}")
    return content


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def _finite(text: str) -> float:
    if math.isfinite(number := float(text)):
        return number
    raise ValueError(f"the number {text[:40]} is not finite")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in made if names.count(name) > 1)
        raise ValueError(f"the key {twice[:80]!r} occurs twice")
    return made
