"""Reads ``.safetensors``: a header in JSON, which says where each tensor lies, then the elements.

safetensors' own reader for numpy fails on float8. Errors are ValueError about the content;
`flaxdet.files.checkpoint` adds the file's name to the message.
"""

from __future__ import annotations

import io
import math
import os
import sys
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from flaxdet.files import checksums, json_text, schema
from flaxdet.files.opening import open_regular

_METADATA = "__metadata__"
_OFFSET = schema.integer(0, 2**63 - 1)
_ENTRY = schema.record(
    {
        "dtype": schema.text,
        "shape": schema.list_of(_OFFSET, 0, 64),
        "data_offsets": schema.list_of(_OFFSET, 2, 2),
    }
)
_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "C64": np.complex64,
}


def read(file: BinaryIO) -> dict[str, np.ndarray]:
    """Reads all tensors.

    Args:
        file: a ``.safetensors`` file, open for reading and seekable.

    Returns:
        Arrays by name, in the file's order.

    Raises:
        ValueError: if the file is damaged, which its checksums may tell, or a tensor's dtype is one that numpy and
            ml_dtypes don't have.
    """
    header, texts, at, size = _header(file)
    arrays: dict[str, np.ndarray] = {}
    begins = at
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if kind not in _DTYPES:
            raise ValueError(f"has a tensor {name} of dtype {kind}, which flaxdet doesn't read")
        dtype = np.dtype(_DTYPES[kind])
        if begins + begin != at or end - begin != math.prod(shape) * dtype.itemsize or begins + end > size:
            raise ValueError(
                f"is damaged: {name} of {kind} {shape} is said to be at the bytes {begin} to {end} of {size - begins}, "
                f"the tensor before it ends at {at - begins}"
            )
        at = begins + end
        array = np.empty(shape, dtype)
        if file.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:  # type: ignore[attr-defined]
            raise ValueError(f"is damaged: it ends inside {name}")
        if sys.byteorder == "big":
            array.byteswap(inplace=True)
        if dtype == np.bool_:  # any byte but 0 is True, and numpy expects 1
            np.minimum(array.view(np.uint8), 1, out=array.view(np.uint8))
        arrays[name] = array
    if at != size:
        raise ValueError(f"is damaged: its tensors end at byte {at}, the file at {size}")
    checksums.check(arrays, texts)
    return arrays


def read_bytes(content: bytes) -> dict[str, np.ndarray]:
    """As ``read``, of the content of a file."""
    return read(io.BytesIO(content))


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The texts in the header of a ``.safetensors`` file, by name; {} for a file of any other kind."""
    try:
        with open_regular(path) as file:
            return _metadata(_json(file)[0])
    except (OSError, ValueError):
        return {}


def _json(file: BinaryIO) -> tuple[dict[str, Any], int, int]:
    """The header as JSON, where the elements begin, and the file's size; leaves the file where the elements begin."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        raise ValueError("ends inside its header: a truncated .safetensors?")
    if length > json_text.MAX_TEXT:
        raise ValueError(f"has a header of {length:,} bytes, expected at most {json_text.MAX_TEXT:,}")
    try:
        header = json_text.loads(file.read(length))
        schema.record({})(header, "")
    except ValueError as error:
        raise ValueError(f"is damaged: it does not begin with the header of a .safetensors file: {error}") from None
    return header, 8 + length, size


def _header(file: BinaryIO) -> tuple[dict[str, Any], dict[str, str], int, int]:
    header, begins, size = _json(file)
    try:
        texts = _metadata(header)
        header.pop(_METADATA, None)
        for name, entry in header.items():
            _ENTRY(entry, name[:80])
    except ValueError as error:
        raise ValueError(f"is damaged: it does not begin with the header of a .safetensors file: {error}") from None
    return header, texts, begins, size


def _metadata(header: dict[str, Any]) -> dict[str, str]:
    texts = header.get(_METADATA) or {}
    if not isinstance(texts, dict) or not all(isinstance(value, str) for value in texts.values()):
        raise ValueError(f"{_METADATA} should be a JSON object of texts")
    return texts
