"""torch's zip checkpoints, read and written without torch.

Such a file is an uncompressed zip: ``NAME/data.pkl`` is a pickle in which each storage is a persistent id,
``NAME/data/KEY`` holds the raw elements of the storage KEY, ``NAME/byteorder`` holds their byte order.
Errors are ValueError about the content; `flaxdet.files.checkpoint` adds the file's name to the message.
"""

from __future__ import annotations

import math
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
_MAX_DIRECTORY = 4 << 20  # bytes; a storage takes 70
_ZIP: Any = zipfile
MOST_VIEWS = 4  # different views of all storages together: more sizes of the file are not torch's ordinary work


class TorchZip:
    """One zip checkpoint, open for reading.

    Attributes:
        root: the pickled object, with a `LazyTensor` for every tensor and a `Placeholder` for every foreign object.
    """

    def __init__(self, file: BinaryIO) -> None:
        """Reads the directory and the pickle; tensors are read by `arrays`.

        Args:
            file: the file, open for reading and seekable; it must stay open while tensors are read.

        Raises:
            ValueError: if the file is not a complete, uncompressed zip with a data.pkl as torch writes it.
        """
        self._file = file
        self._storages: dict[str, np.ndarray] = {}
        self._size = size = file.seek(0, os.SEEK_END)
        try:
            end = _ZIP._EndRecData(file)  # the library reads the whole directory, whatever its size
            directory = 0 if end is None else end[_ZIP._ECD_SIZE]
            infos = zipfile.ZipFile(file).infolist() if directory <= _MAX_DIRECTORY else []
        except Exception as error:  # zipfile raises many types of errors for a damaged directory
            raise ValueError("starts as a zip and has no directory at its end: truncated?") from error
        if directory > _MAX_DIRECTORY:
            raise ValueError(f"has a zip directory of {directory:,} bytes, expected at most {_MAX_DIRECTORY:,}")
        self._records = {info.filename: info for info in infos}
        if len(self._records) != len(infos) or sum(info.compress_size for info in infos) > size:
            raise ValueError("holds overlapping or doubled zip records, which torch does not write")
        pickles = [name for name in self._records if name.split("/")[1:] == ["data.pkl"] or name == "data.pkl"]
        if len(pickles) != 1:
            raise ValueError(f"is a zip with {len(pickles)} records NAME/data.pkl; torch.save writes one")
        self._prefix = pickles[0].removesuffix("data.pkl")
        if self._prefix + "constants.pkl" in self._records:
            raise ValueError(
                "is a TorchScript program, not a state_dict: save torch.jit.load(FILE).state_dict() instead"
            )
        self._swap = self._byteorder() != sys.byteorder
        program = self._read(pickles[0], torch_pickle.MAX_PROGRAM).tobytes()
        self.root: Any = torch_pickle.load(program)

    def _byteorder(self) -> str:
        name = self._prefix + "byteorder"
        if name not in self._records:  # older files, which are little-endian
            return "little"
        written = self._read(name, 100).tobytes().decode(errors="replace")
        if written not in ("little", "big"):
            raise ValueError(f"has byteorder {written!r}, expected 'little' or 'big'")
        return written

    def _read(self, name: str, most: int | None = None) -> np.ndarray:
        """The bytes of one record, [n] uint8; checks length and checksum."""
        info = self._records[name]
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
            raise ValueError(f"has a compressed or encrypted record {name}: save it again with torch.save")
        if most is not None and info.file_size > most:
            raise ValueError(f"has a record {name} of {info.file_size:,} bytes, expected at most {most:,}")
        self._file.seek(max(info.header_offset, 0))  # a damaged directory may give a negative offset
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

    def arrays(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Reads the tensors of a state_dict.

        Args:
            state: values of `root` by key.

        Returns:
            For each `LazyTensor` an array of the tensor's shape, in native byte order; other values unchanged. Arrays
            of tensors that share a storage share memory, unless torch's bits conj or neg say that values differ from
            the stored elements.

        Raises:
            ValueError: if a storage is missing, has another size than the pickle states, or is too small for
                a tensor's offset, shape and strides; or if tensors repeat elements (stride 0) so that they need more
                memory than the file's size explains.
        """
        total = 0
        distinct: set[tuple[Any, ...]] = set()
        for key, tensor in state.items():
            if not isinstance(tensor, torch_pickle.LazyTensor):
                continue
            size = self._check(tensor)
            view = (tensor.storage.key, tensor.storage.start, tensor.offset, tensor.shape, tensor.stride)
            total += 0 if view in distinct else size
            distinct.add(view)
            if size > self._size or total > MOST_VIEWS * self._size:
                raise ValueError(
                    f"has tensors that need more memory than the file's {self._size:,} bytes explain, at {key}, of "
                    f"shape {list(tensor.shape)} and strides {list(tensor.stride)}: save tensor.contiguous() instead"
                )
        return {
            key: self._array(value) if isinstance(value, torch_pickle.LazyTensor) else value
            for key, value in state.items()
        }

    def _check(self, tensor: torch_pickle.LazyTensor) -> int:
        """The bytes that the tensor's elements take; checks that the tensor lies in its storage."""
        storage = tensor.storage
        name = f"{self._prefix}data/{storage.key}"
        if name not in self._records:
            raise ValueError(f"lacks record {name}, which a tensor needs")
        expected, size = storage.numel * storage.dtype.itemsize, self._records[name].file_size
        if expected != size:
            raise ValueError(f"has {size} bytes in record {name}; its {storage.dtype} storage needs {expected}")
        if 0 in tensor.shape:
            return 0
        if size % tensor.dtype.itemsize:
            raise ValueError(f"has {size} bytes in record {name}, which are no whole number of {tensor.dtype}")
        last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride, strict=True))
        if last >= size // tensor.dtype.itemsize - storage.start:
            raise ValueError(f"has a tensor of shape {list(tensor.shape)} that reaches beyond its storage {name}")
        return math.prod(tensor.shape) * tensor.dtype.itemsize

    def _storage(self, key: str, dtype: np.dtype) -> np.ndarray:
        """The bytes of a storage, all of whose tensors have this dtype, in native byte order."""
        if key not in self._storages:
            content = self._read(f"{self._prefix}data/{key}")
            if self._swap:
                part = dtype.itemsize // (2 if dtype.kind == "c" else 1)
                content.view(f"u{part}").byteswap(inplace=True)
            if dtype == np.bool_:  # any byte but 0 is True, and numpy expects 1
                np.minimum(content, 1, out=content)
            self._storages[key] = content
        return self._storages[key]

    def _array(self, tensor: torch_pickle.LazyTensor) -> np.ndarray:
        shape, dtype = tensor.shape, tensor.dtype
        if 0 in shape:
            return np.empty(shape, dtype)
        # The step along an axis of one element has no meaning, and may be too large for numpy.
        steps = [step * dtype.itemsize if n > 1 else 0 for n, step in zip(shape, tensor.stride, strict=True)]
        first = (tensor.storage.start + tensor.offset) * dtype.itemsize
        array = np.ndarray(shape, dtype, self._storage(tensor.storage.key, dtype), first, steps)
        if tensor.conj:
            array = np.conj(array)
        return np.negative(array) if tensor.neg else array


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
