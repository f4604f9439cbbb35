"""Checksums of arrays and texts in the files that flaxdet writes, so that a changed bit is an error.

CRC-32: finds every change within 32 neighbouring bits, and misses one other change in four thousand million.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from flaxdet.files import json_text

METADATA_KEY = "flaxdet_checksums"  # in the metadata of .safetensors files: JSON {"arrays": {name: ...}, "texts": ...}
_ALIGNMENT = 8  # of the header of a .safetensors file


def of_array(array: np.ndarray) -> str:
    """The checksum of an array: of dtype, shape and elements, as 8 hexadecimal digits.

    Args:
        array: of any shape and dtype.
    """
    elements = np.asarray(array, order="C").reshape(-1).view(np.uint8)
    return f"{zlib.crc32(elements.data, zlib.crc32(f'{array.dtype.name} {list(array.shape)}'.encode())):08x}"


def of_json(value: Any) -> str:
    """The checksum of a value that JSON can hold, whatever the order of keys in dicts."""
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


def add(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None) -> dict[str, str]:
    """The metadata of a ``.safetensors`` file, with the checksums of the arrays and of the other texts.

    Args:
        arrays: the arrays of the file, by name.
        metadata: texts by name.
    """
    texts = {name: text for name, text in (metadata or {}).items() if name != METADATA_KEY}
    sums = {"arrays": {name: of_array(array) for name, array in arrays.items()}, "texts": of_json(texts)}
    return {**texts, METADATA_KEY: json.dumps(sums)}


def check_texts(metadata: Mapping[str, str]) -> dict[str, str]:
    """The texts in the metadata of a ``.safetensors`` file, compared with their checksum if there is one.

    Args:
        metadata: the whole metadata of the file.

    Returns:
        The metadata without the checksums.

    Raises:
        ValueError: if a text has changed since the file was written.
    """
    texts = {name: text for name, text in metadata.items() if name != METADATA_KEY}
    if METADATA_KEY in metadata and _stored(metadata)["texts"] != of_json(texts):
        raise ValueError(f"is damaged: its metadata ({', '.join(sorted(texts))}) changed since it was written")
    return texts


def check(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Compares the content of a ``.safetensors`` file with its checksums. Other programs' files have none, and pass.

    Args:
        arrays: all arrays of the file, by name.
        metadata: the whole metadata of the file.

    Raises:
        ValueError: if an array or a text has changed since the file was written; names some of the arrays.
    """
    check_texts(metadata)
    if METADATA_KEY not in metadata:
        return
    if changed := differing(arrays, _stored(metadata)["arrays"]):
        raise ValueError(
            f"is damaged: {named(changed)} changed since it was written (if another program changed the tensors on "
            f'purpose, it should not keep "{METADATA_KEY}" in the metadata)'
        )


def differing(arrays: Mapping[str, np.ndarray], stored: Mapping[str, str]) -> list[str]:
    """The names of missing arrays, and of arrays that have changed since the checksums were stored.

    Args:
        arrays: by name.
        stored: checksums by name.
    """
    found = {name: of_array(array) for name, array in arrays.items()}
    return sorted(name for name in {*found, *stored} if found.get(name) != stored.get(name))


def named(names: list[str]) -> str:
    """The first of some names, and how many there are: "a", or "a and 3 other arrays"."""
    more = len(names) - 1
    return names[0] + (f" and {more} other array{'s' if more > 1 else ''}" if more else "")


def ordered(content: bytes) -> Iterator[bytes | memoryview]:
    """The parts of a ``.safetensors`` file with its metadata in the order of names.

    The library writes the metadata in an order that changes from process to process, so that equal models would give
    unequal files.

    Args:
        content: the file as the library writes it.
    """
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    texts = dict(sorted(header.pop("__metadata__", {}).items()))
    text = json.dumps({"__metadata__": texts, **header}, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    yield len(text).to_bytes(8, "little") + text
    yield memoryview(content)[8 + size :]


def _stored(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        stored = json_text.loads(metadata[METADATA_KEY])
        if isinstance(stored["arrays"], dict) and isinstance(stored["texts"], str):
            return stored
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError("is damaged: the checksums in its metadata can't be read")
