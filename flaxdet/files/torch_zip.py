"""torch's zip checkpoints, read and written without torch.

Such a file is an uncompressed zip: ``NAME/data.pkl`` is a pickle in which each storage is a persistent id,
``NAME/data/KEY`` holds the raw elements of the storage KEY, ``NAME/byteorder`` holds their byte order.
Errors are ValueError about the content; `flaxdet.files.checkpoint` adds the file's name to the message.
"""

from __future__ import annotations

import os
import struct
import sys
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

from flaxdet.files import torch_pickle

_CHUNK = 1 << 20
_LOCAL_HEADER = 30
_ALIGNMENT = 64


class TorchZip:
    """One zip checkpoint, open for reading.

    Attributes:
        root: the pickled object, with a `LazyTensor` for every tensor and a `Placeholder` for every foreign object.
    """

    def __init__(self, file: BinaryIO) -> None:
        """Reads the directory and the pickle; tensors are read by `array`.

        Args:
            file: the file, open for reading and seekable; it must stay open while tensors are read.

        Raises:
            ValueError: if the file is not a complete, uncompressed zip with a data.pkl as torch writes it.
        """
        self._file = file
        self._arrays: dict[str, np.ndarray] = {}
        size = file.seek(0, os.SEEK_END)
        try:
            infos = zipfile.ZipFile(file).infolist()
        except Exception as error:  # zipfile raises many types of errors for a damaged directory
            raise ValueError("starts as a zip and has no directory at its end: truncated?") from error
        self._records = {info.filename: info for info in infos}
        if len(self._records) != len(infos) or sum(info.compress_size for info in infos) > size:
            raise ValueError("holds overlapping or doubled zip records, which torch does not write")
        pickles = [name for name in self._records if name.split("/")[1:] == ["data.pkl"] or name == "data.pkl"]
        if len(pickles) != 1:
            raise ValueError(f"is a zip with {len(pickles)} records NAME/data.pkl; torch.save writes one")
        self._prefix = pickles[0].removesuffix("data.pkl")
        order = self._prefix + "byteorder"  # absent from older files, which are little-endian
        written = self._read(order).tobytes().decode() if order in self._records else "little"
        self._swap = written != sys.byteorder
        program = self._read(pickles[0]).tobytes()
        self.root: Any = torch_pickle.load(program)

    def _read(self, name: str) -> np.ndarray:
        """The bytes of one record, [n] uint8; checks length and checksum."""
        info = self._records[name]
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
            raise ValueError(f"has a compressed or encrypted record {name}: save it again with torch.save")
        self._file.seek(info.header_offset)
        header = self._file.read(_LOCAL_HEADER)
        if len(header) != _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
            raise ValueError(f"has no record {name} where its directory says: truncated or damaged")
        self._file.seek(sum(struct.unpack("<HH", header[26:30])), os.SEEK_CUR)
        out = np.empty(info.file_size, np.uint8)
        crc, view = 0, out.data
        for start in range(0, info.file_size, _CHUNK):
            chunk = view[start : start + _CHUNK]
            if self._file.readinto(chunk) != len(chunk):  # type: ignore[attr-defined]
                raise ValueError(f"ends inside record {name}: truncated")
            crc = zlib.crc32(chunk, crc)
        if crc != info.CRC and info.CRC != 0:  # 0: torch.serialization.set_crc32_options(False)
            raise ValueError(f"has a damaged record {name}: its checksum does not match")
        return out

    def array(self, tensor: torch_pickle.LazyTensor) -> np.ndarray:
        """Reads one tensor.

        Args:
            tensor: a tensor of `root`.

        Returns:
            An array of the tensor's shape and strides, in native byte order. Arrays of tensors that share a
            storage share memory.

        Raises:
            ValueError: if the storage is missing, has another size than the pickle states, or is too small for
                the tensor's offset, shape and strides.
        """
        storage = tensor.storage
        name = f"{self._prefix}data/{storage.key}"
        if name not in self._records:
            raise ValueError(f"lacks record {name}, which a tensor needs")
        expected, size = storage.numel * storage.dtype.itemsize, self._records[name].file_size
        if expected != size:
            raise ValueError(f"has {size} bytes in record {name}; its {storage.dtype} storage needs {expected}")
        if storage.key not in self._arrays:
            self._arrays[storage.key] = self._read(name)
            if self._swap:
                # The bytes of an untyped storage are swapped by the dtype of the tensor.
                part = tensor.dtype.itemsize // (2 if tensor.dtype.kind == "c" else 1)
                self._arrays[storage.key].view(f"u{part}").byteswap(inplace=True)
        flat = self._arrays[storage.key].view(tensor.dtype)[storage.start :]
        if tensor.dtype == np.bool_:
            flat = flat.view(np.uint8) != 0
        shape, stride = tensor.shape, tensor.stride
        if 0 in shape:
            return np.empty(shape, tensor.dtype)
        last = tensor.offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if last >= flat.size:
            raise ValueError(f"has a tensor of shape {list(shape)} that reaches beyond its storage {name}")
        # The step along an axis of one element has no meaning, and may be too large for numpy.
        steps = [step * flat.itemsize if n > 1 else 0 for n, step in zip(shape, stride, strict=True)]
        return np.lib.stride_tricks.as_strided(flat[tensor.offset :], shape, steps)


def write(file: BinaryIO, state_dict: Mapping[str, np.ndarray]) -> None:
    """Writes an OrderedDict of tensors as ``torch.save`` does; ``torch.load(weights_only=True)`` reads it.

    The same arrays give the same bytes.

    Args:
        file: open for writing, seekable.
        state_dict: arrays by key, in native byte order and C-contiguous.

    Raises:
        ValueError: if a dtype has no counterpart among torch's storages.
    """
    program = torch_pickle.dump(state_dict)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:

        def record(name: str, data: Any) -> None:
            info = zipfile.ZipInfo(f"archive/{name}", (1980, 1, 1, 0, 0, 0))
            # As in torch, an extra field "FB" pads the header, so that elements start at multiples of 64 bytes.
            start = file.tell() + _LOCAL_HEADER + len(info.filename) + 4
            padding = -start % _ALIGNMENT
            info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
            archive.writestr(info, data)

        record("data.pkl", program)
        record("byteorder", sys.byteorder)
        for i, array in enumerate(state_dict.values()):
            record(f"data/{i}", array.reshape(-1).view(np.uint8))
        record("version", "3\n")
