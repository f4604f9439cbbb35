"""The pickle inside torch's checkpoints, read and written without torch.

A pickle is a program, so the reader gives it almost nothing to call. Tensors, OrderedDict, numbers, strings and
plain containers are built. Every other global becomes a `Placeholder` type: its origin is never imported, and
calling, building or filling it does nothing. Every object that the program can reach has a ``__setstate__`` that
does nothing, because otherwise the BUILD instruction would set attributes on the object.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

_STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
    "ComplexFloatStorage": np.dtype(np.complex64),
    "ComplexDoubleStorage": np.dtype(np.complex128),
    "UntypedStorage": np.dtype(np.uint8),
}
# Dtypes without a typed storage: torch pickles an UntypedStorage and the name of the dtype.
_DTYPES = {
    "uint16": np.dtype(np.uint16),
    "uint32": np.dtype(np.uint32),
    "uint64": np.dtype(np.uint64),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8_e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
}
_STORAGE_OF = {dtype: name for name, dtype in _STORAGES.items() if name != "UntypedStorage"}


def _nothing(*_: Any) -> None:
    """Does nothing, with any arguments."""


class _Closed:
    """Base class of every object that the pickle program can reach: the program can't set attributes on it."""

    __slots__ = ()
    __setstate__ = staticmethod(_nothing)


class _Dict(_Closed, dict[Any, Any]):
    """Stands in for OrderedDict, on which BUILD could set attributes."""


class Placeholder(_Closed):
    """Stands in for an object that the file names and that is not built; `origin` is its class or function."""

    __slots__ = ()
    origin = "unknown"
    append = extend = add = __setitem__ = staticmethod(_nothing)

    def __new__(cls, *args: Any, **kwargs: Any) -> Placeholder:
        """Ignores all arguments."""
        del args, kwargs
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs

    def __call__(self, *args: Any, **kwargs: Any) -> Placeholder:
        """Stands in for calling a function: returns a placeholder again."""
        del args, kwargs
        return self

    def __repr__(self) -> str:
        return f"<{self.origin}, not loaded>"


class _Name(_Closed):
    """The name of a storage type or dtype of torch."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class _Storage(_Closed):
    __slots__ = ("dtype", "key", "numel", "start")

    def __init__(self, dtype: np.dtype, key: str, numel: int, start: int = 0) -> None:
        self.dtype, self.key, self.numel, self.start = dtype, key, numel, start


class LazyTensor(_Closed):
    """A tensor of the file without the elements, which `TorchZip.array` reads."""

    __slots__ = ("dtype", "offset", "shape", "storage", "stride")

    def __init__(self, storage: _Storage, offset: int, shape: Any, stride: Any, dtype: np.dtype) -> None:
        if not (
            isinstance(storage, _Storage)
            and all(isinstance(seq, (tuple, list)) for seq in (shape, stride))
            and len(shape) == len(stride)
            and all(type(n) is int and n >= 0 for n in (offset, *shape, *stride))
        ):
            raise ValueError("it describes a tensor in a way that torch does not write")
        self.storage, self.offset, self.dtype = storage, offset, dtype
        self.shape, self.stride = tuple(shape), tuple(stride)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> LazyTensor:
    return LazyTensor(storage, offset, shape, stride, getattr(storage, "dtype", np.dtype(np.uint8)))


def _rebuild_tensor_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> Any:
    del grad, hooks
    if isinstance(dtype, _Name) and dtype.name in _DTYPES:
        return LazyTensor(storage, offset, shape, stride, _DTYPES[dtype.name])
    return Placeholder()


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data if isinstance(data, LazyTensor) else Placeholder()


def _rebuild_from_type(function: Any, kind: Any, args: Any, *_: Any) -> Any:
    """A tensor subclass or a tensor with attributes: only the tensor is built."""
    del kind
    return function(*args) if isinstance(function, _Function) else Placeholder()


class _Function(_Closed):
    """A function of torch that the program may call."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any) -> Any:
        return _FUNCTIONS[self.name](*args)


_FUNCTIONS = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.Size": lambda sizes=(): tuple(sizes),
}


# The unpickler in pure Python, because the one in C allocates a memo as large as any index in the file.
class _Unpickler(pickle._Unpickler):  # type: ignore[misc]
    def find_class(self, module: Any, name: Any) -> Any:
        """Looks a global up in the tables above; nothing is ever imported."""
        full = f"{module}.{name}"
        if full == "collections.OrderedDict":
            return _Dict
        if full in _FUNCTIONS:
            return _Function(full)
        if module in ("torch", "torch.cuda", "torch.storage") and (name in _STORAGES or name in _DTYPES):
            return _Name(name)
        return type("Placeholder", (Placeholder,), {"__slots__": (), "origin": full[:80]})

    def persistent_load(self, pid: Any) -> _Storage:
        """The reference to a storage; a sixth item of ``pid`` is a view (key, first element, count) of the storage."""
        match pid:
            case ("storage", _Name(name=kind), str(key), _, int(numel)) if kind in _STORAGES:
                return _Storage(_STORAGES[kind], key, numel)
            case ("storage", _Name(name=kind), str(key), _, int(numel), view) if kind in _STORAGES:
                match view:
                    case None:
                        return _Storage(_STORAGES[kind], key, numel)
                    case (_, int(start), int(count)) if start >= 0 and 0 <= count <= numel - start:
                        return _Storage(_STORAGES[kind], key, numel, start)
        raise ValueError("it refers to a storage in a way that torch does not write")


def load(program: bytes) -> Any:
    """Runs the pickle program of a checkpoint.

    Args:
        program: the content of data.pkl.

    Returns:
        The object that the program builds, with a `LazyTensor` for every tensor and a `Placeholder` for every
        foreign object.

    Raises:
        ValueError: if the program is broken, or describes a tensor in a way that torch does not write.
    """
    try:
        return _Unpickler(io.BytesIO(program), encoding="utf-8").load()
    except Exception as error:  # a broken or hostile program may cause any error
        reason = error if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"has a data.pkl that is not a pickle of tensors: {reason}") from error


def dump(state_dict: Mapping[str, np.ndarray]) -> bytes:
    """Writes the program that builds an OrderedDict of tensors, as torch's pickler would.

    Args:
        state_dict: contiguous arrays by key; the storage of the i-th array is named "i".

    Returns:
        The content of data.pkl, protocol 2.

    Raises:
        ValueError: if a dtype has no counterpart among torch's storages.
    """
    program = [b"\x80\x02ccollections\nOrderedDict\n)R("]
    for i, (key, array) in enumerate(state_dict.items()):
        if array.dtype not in _STORAGE_OF:
            raise ValueError(f"{key} has dtype {array.dtype}, which torch's zip format has no storage for")
        program += [_text(key), _tensor_program(str(i), array)]
    return b"".join([*program, b"u."])


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _int(value: int) -> bytes:
    if 0 <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def _ints(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_int, values)) + b"t"


def _tensor_program(key: str, array: np.ndarray) -> bytes:
    """The instructions that make torch call _rebuild_tensor_v2 for one contiguous tensor."""
    strides = tuple(step // array.itemsize for step in array.strides)
    storage = b"(" + _text("storage") + b"ctorch\n" + _STORAGE_OF[array.dtype].encode() + b"\n"
    storage += _text(key) + _text("cpu") + _int(array.size) + b"tQ"
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    call = b"(" + storage + _int(0) + _ints(array.shape) + _ints(strides) + hooks + b"tR"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + call
