"""Checkpoints made by hand, instruction by instruction: also such as torch would never write."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import numpy as np

FLOATS = np.array([0.0, -0.0, 1.5, np.inf, -np.inf, np.nan, 1e-40], np.float32)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def zip_file(path: Path, root: object, records: dict[str, bytes] | None = None, protocol: int = 2) -> Path:
    """A torch-like zip around any pickle (bytes are taken as the pickle itself)."""
    program = root if isinstance(root, bytes) else pickle.dumps(root, protocol)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", program)
        for name, data in {"byteorder": b"little", "version": b"3\n", **(records or {})}.items():
            archive.writestr(f"x/{name}", data)
    return path


def tensor(kind: str = "FloatStorage", numel: int = 4, offset: int = 0, shape: bytes = b"(K\x04t") -> bytes:
    """The instructions for one tensor of storage "0"; shape in pickle's own words, strides all 1."""
    dims = shape.count(b"K") + shape.count(b"J") + shape.count(b"\x8a")
    numbers = [number.to_bytes(4, "little", signed=True) for number in (numel, offset)]
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\n%b\n"
        b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuJ%btQJ%b%b(%bt\x89}tR"
    ) % (kind.encode(), *numbers, shape, b"K\x01" * dims)


def tensor_program(**options) -> bytes:
    """{"w": tensor}"""
    return b"\x80\x02}X\x01\x00\x00\x00w" + tensor(**options) + b"s."


class Evil:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call
