"""The objects that the pickle of a torch checkpoint may build: tensors without elements, and inert placeholders.

Every object that the pickle's program can reach has a ``__setstate__`` that does nothing, because otherwise the BUILD
instruction would set attributes on the object.
"""

from __future__ import annotations

import functools
from typing import Any

import ml_dtypes
import numpy as np

STORAGES = {
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
FLOAT8 = {
    name: np.dtype(getattr(ml_dtypes, name))
    for name in ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
}
# Dtypes without a typed storage: torch pickles an UntypedStorage and the name of the dtype.
DTYPES = {name: np.dtype(name) for name in ("uint16", "uint32", "uint64")} | FLOAT8

MAX_DIMS = 64  # numpy's limit, and torch's
_MAX_KEY = 64  # characters; torch numbers its storages
_MAX_ARGUMENTS = 8  # of every function below


def nothing(*_: Any) -> None:
    """Does nothing, with any arguments."""


class Closed:
    """Base class of every object that the pickle program can reach: the program can't set attributes on it."""

    __slots__ = ()
    __setstate__ = staticmethod(nothing)


class Dict(Closed, dict[Any, Any]):
    """Stands in for OrderedDict, on which BUILD could set attributes."""


class Placeholder(Closed):
    """Stands in for an object that the file names and that is not built.

    Attributes:
        origin: name of the class or function.
        is_module: whether the file gives the object the attributes of a ``torch.nn.Module``.
    """

    __slots__ = ("is_module",)
    origin = "unknown"
    append = extend = add = __setitem__ = staticmethod(nothing)
    is_module: bool

    def __new__(cls, *args: Any, **kwargs: Any) -> Placeholder:
        """Ignores all arguments."""
        del args, kwargs
        made = object.__new__(cls)
        made.is_module = False
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs

    def __call__(self, *args: Any, **kwargs: Any) -> Placeholder:
        """Stands in for calling a function: returns a placeholder again."""
        del args, kwargs
        return self

    def __repr__(self) -> str:
        return f"<{self.origin}, not loaded>"


@functools.lru_cache(maxsize=2000)  # a type takes a kilobyte, and a program can ask for a million of one name
def placeholder_type(origin: str) -> type[Placeholder]:
    """The type of placeholders for a class or function of this name."""
    return type("Placeholder", (Placeholder,), {"__slots__": (), "origin": origin[:80]})


class Name(Closed):
    """The name of a storage type or dtype of torch."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Storage(Closed):
    """A reference to a storage of the file.

    Attributes:
        kind: name of the type in torch.
        dtype: dtype of the elements.
        key: name of the storage's record.
        numel: number of elements.
        start: first element of a view, in files of torch's legacy format.
    """

    __slots__ = ("dtype", "key", "kind", "numel", "start")

    def __init__(self, kind: str, key: str, numel: int, start: int = 0) -> None:
        if len(key) > _MAX_KEY or abs(numel) >> 63:
            raise ValueError("it refers to a storage in a way that torch does not write")
        self.kind, self.dtype = kind, STORAGES[kind]
        self.key, self.numel, self.start = key, numel, start


class LazyTensor(Closed):
    """A tensor of the file without the elements, which `TorchZip.array` reads.

    Attributes:
        storage: where the elements are.
        offset: number of the tensor's first element.
        shape: the shape.
        stride: the steps between elements, in elements.
        dtype: dtype of the tensor.
        conj, neg: whether the tensor's values are the conjugates, the negatives, of the stored elements.
    """

    __slots__ = ("conj", "dtype", "neg", "offset", "shape", "storage", "stride")

    def __init__(self, storage: Any, offset: Any, shape: Any, stride: Any, dtype: Any, lazy: Any = None) -> None:
        if not (
            isinstance(storage, Storage)
            and all(isinstance(seq, (tuple, list)) for seq in (shape, stride))
            and len(shape) == len(stride)
        ):
            raise ValueError("it describes a tensor in a way that torch does not write")
        if len(shape) > MAX_DIMS:
            raise ValueError(f"it describes a tensor of {len(shape)} dimensions, expected at most {MAX_DIMS}")
        if not all(type(n) is int and n >= 0 and not n >> 63 for n in (offset, *shape, *stride)):
            raise ValueError("it describes a tensor in a way that torch does not write")
        bits = {} if lazy is None else lazy
        if not isinstance(bits, dict) or not all(name in ("conj", "neg") for name in bits):
            raise ValueError("it describes a tensor with metadata other than torch's bits conj and neg")
        self.conj, self.neg = (bits.get(name, False) for name in ("conj", "neg"))
        if not all(type(bit) is bool for bit in (self.conj, self.neg)):
            raise ValueError("it describes a tensor in a way that torch does not write")
        if (self.conj and dtype.kind != "c") or (self.neg and dtype == np.bool_):
            raise ValueError(
                f"it describes a tensor of {dtype} whose bit conj or neg is set, which torch does not write"
            )
        self.storage, self.offset, self.dtype = storage, offset, dtype
        self.shape, self.stride = tuple(shape), tuple(stride)


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, grad: Any = None, hooks: Any = None, lazy: Any = None
) -> LazyTensor:
    del grad, hooks
    return LazyTensor(storage, offset, shape, stride, getattr(storage, "dtype", np.dtype(np.uint8)), lazy)


def _rebuild_tensor_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, lazy: Any = None
) -> Any:
    del grad, hooks
    if isinstance(dtype, Name) and dtype.name in DTYPES:
        return LazyTensor(storage, offset, shape, stride, DTYPES[dtype.name], lazy)
    named = dtype.origin if isinstance(dtype, type) and issubclass(dtype, Placeholder) else "an unknown dtype"
    return placeholder_type(f"tensor of {named}")()


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data if isinstance(data, (LazyTensor, Placeholder)) else Placeholder()


def _rebuild_from_type(function: Any, kind: Any, args: Any, *_: Any) -> Any:
    """A tensor subclass or a tensor with attributes: only the tensor is built."""
    del kind
    if isinstance(function, Function) and function.name != _FROM_TYPE:  # torch nests no tensor subclasses
        return call(function, args)
    return Placeholder()


def _size(sizes: Any = ()) -> tuple[Any, ...]:
    if not isinstance(sizes, (tuple, list)) or len(sizes) > MAX_DIMS:
        raise ValueError("it describes a shape in a way that torch does not write")
    return tuple(sizes)


class Function(Closed):
    """A function of torch that the program may call."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


_FROM_TYPE = "torch._tensor._rebuild_from_type_v2"
FUNCTIONS = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    _FROM_TYPE: _rebuild_from_type,
    "torch.Size": _size,
}


def call(function: Any, args: Any) -> Any:
    """Calls a function of the pickle, as the instruction REDUCE does.

    The arguments of a placeholder are not even unpacked: one long tuple, given many times, would be copied each time.

    Args:
        function: an object of the program.
        args: the arguments, another object of the program.

    Raises:
        ValueError: for an object that can't be called, or other arguments than torch writes.
    """
    if isinstance(function, Placeholder):
        return function
    if isinstance(function, type) and issubclass(function, Placeholder):
        return function()
    if function is Dict and args == ():
        return Dict()
    if isinstance(function, Function) and isinstance(args, tuple) and len(args) <= _MAX_ARGUMENTS:
        return FUNCTIONS[function.name](*args)
    raise ValueError("it calls an object in a way that torch does not write")
