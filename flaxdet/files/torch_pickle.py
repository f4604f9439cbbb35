"""The pickle inside torch's checkpoints, read and written without torch.

A pickle is a program, so the reader gives it almost nothing to call. Tensors, OrderedDict, numbers, strings and
plain containers are built. Every other global becomes a `Placeholder` type: its origin is never imported, and
calling, building or filling it does nothing.

A program is also bounded. Only instructions that torch writes are run (``pickle_protocol`` 2 to 5), so many of them at
most, with so many globals and so deep a nesting; keys of dicts are no containers, whose hashes can take exponential
time; and no instruction costs more than the bytes that it takes in the file.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from flaxdet.files.torch_objects import (
    DTYPES,
    STORAGES,
    Function,
    LazyTensor,
    Name,
    Placeholder,
    Storage,
    call,
    placeholder_type,
)
from flaxdet.files.torch_objects import FUNCTIONS as _FUNCTIONS
from flaxdet.files.torch_objects import Dict as _Dict

MAX_PROGRAM = 16 << 20  # bytes; a tensor takes 150
_MAX_STEPS = 1_000_000  # instructions; a tensor takes 40
_MAX_DEPTH = 300  # of containers; Python's pickler gives up at some 500
_MAX_GLOBALS = 1_000  # different classes and functions
_MAX_NAME = 500  # characters of a global
_MAX_KEY = 10_000  # characters of a key of a dict
_STORAGE_OF = {dtype: name for name, dtype in STORAGES.items() if name != "UntypedStorage"}

# All that Python's pickler writes at protocols 2 to 5, without out-of-band buffers and the registry of extensions.
_WRITTEN = """
    PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT
    BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
    EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT SETITEM SETITEMS EMPTY_SET ADDITEMS
    FROZENSET GLOBAL STACK_GLOBAL REDUCE NEWOBJ NEWOBJ_EX BUILD BINPERSID BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE
"""
_CODES = {name: getattr(pickle, name)[0] for name in _WRITTEN.split()}


class _Instructions(dict[int, Callable[[Any], None]]):
    """Methods of the unpickler by the code of the instruction."""

    def __missing__(self, code: int) -> Callable[[Any], None]:
        name = next((each.name for each in pickletools.opcodes if each.code == chr(code)), f"{code:#04x}")
        raise ValueError(f"it has the instruction {name}, so it is written in a way that torch does not write")


# The unpickler in pure Python, because the one in C allocates a memo as large as any index in the file.
_PICKLE: Any = pickle


class _Unpickler(_PICKLE._Unpickler):
    """Runs the program, with other instructions for all that calls, fills or hashes an object."""

    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="utf-8")
        self._file = file
        self._globals: dict[str, Any] = {}
        self._storages: dict[str, tuple[str, int]] = {}
        self._dtypes: dict[str, np.dtype] = {}

    def load(self) -> Any:
        """Runs the program up to STOP."""
        self._unframer = _PICKLE._Unframer(self._file.read, self._file.readline)
        self.read, self.readinto, self.readline = (
            self._unframer.read,
            self._unframer.readinto,
            self._unframer.readline,
        )
        self.metastack, self.stack, self.proto = [], [], 0
        self.append = self.stack.append
        read, instructions = self.read, _INSTRUCTIONS
        try:
            for _ in range(_MAX_STEPS):
                code = read(1)
                if not code:
                    raise EOFError
                instructions[code[0]](self)
        except _PICKLE._Stop as stop:
            _check_depth(stop.value)
            return stop.value
        raise ValueError(f"it has more than {_MAX_STEPS:,} instructions")

    def find_class(self, module: Any, name: Any) -> Any:
        """Looks a global up in the tables of ``torch_objects``; nothing is ever imported."""
        if not isinstance(module, str) or not isinstance(name, str) or len(module) + len(name) > _MAX_NAME:
            raise ValueError("it names a class in a way that torch does not write")
        full = f"{module}.{name}"
        if full not in self._globals:
            if len(self._globals) == _MAX_GLOBALS:
                raise ValueError(f"it names more than {_MAX_GLOBALS:,} classes and functions")
            if full == "collections.OrderedDict":
                found: Any = _Dict
            elif full in _FUNCTIONS:
                found = Function(full)
            elif module in ("torch", "torch.cuda", "torch.storage") and (name in STORAGES or name in DTYPES):
                found = Name(name)
            else:
                found = placeholder_type(full)
            self._globals[full] = found
        return self._globals[full]

    def persistent_load(self, pid: Any) -> Any:
        """The reference to a storage; a sixth item of ``pid`` is a view (key, first element, count) of the storage."""
        if not isinstance(pid, tuple) or len(pid) > 6:  # a long one would be copied each time
            raise ValueError("it refers to a storage in a way that torch does not write")
        match pid:
            case ("storage", Name(name=kind), str(key), _, int(numel), *view) if kind in STORAGES and len(view) < 2:
                start = _first_element(view, numel)
                if self._storages.setdefault(key, (kind, numel)) != (kind, numel):
                    raise ValueError(f"it refers to the storage {key[:20]} under two dtypes or sizes")
                return Storage(kind, key, numel, start)
            case ("storage", type() as kind, *_) if issubclass(kind, Placeholder):  # of a quantised tensor
                return kind()
            case ("module", type() as kind, *_) if issubclass(kind, Placeholder):  # in torch's legacy format
                return kind
        raise ValueError("it refers to a storage in a way that torch does not write")

    def load_proto(self) -> None:
        self.proto = self.read(1)[0]
        if not 2 <= self.proto <= 5:
            raise ValueError(f"it has pickle's protocol {self.proto}, expected 2 to 5")

    def load_mark(self) -> None:
        if len(self.metastack) > _MAX_DEPTH:
            raise ValueError(_TOO_DEEP)
        super().load_mark()

    def load_bytearray8(self) -> None:
        (size,) = struct.unpack("<Q", self.read(8))
        content = self.read(min(size, MAX_PROGRAM))  # not `bytearray(size)`, whatever the size
        if len(content) != size:
            raise EOFError
        self.append(bytearray(content))

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = made = call(self.stack[-1], args)
        if isinstance(made, LazyTensor):
            key, dtype = made.storage.key, made.dtype
            if self._dtypes.setdefault(key, dtype) != dtype:
                raise ValueError(f"it has tensors of {dtype} and {self._dtypes[key]} in one storage, {key}")

    def load_newobj(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = call(self.stack[-1], args)

    def load_newobj_ex(self) -> None:
        del self.stack[-1]
        self.load_newobj()

    def load_build(self) -> None:
        """Sets no attribute (a state_dict brings _metadata), but marks a placeholder that has the state of a module."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Placeholder) and isinstance(state, dict) and {"_parameters", "_modules"} <= state.keys():
            target.is_module = True

    def load_append(self) -> None:
        item = self.stack.pop()
        self._fill([item])

    def load_appends(self) -> None:
        items = self.pop_mark()
        self._fill(items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill_dict([key, value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._fill_dict(items)

    def load_empty_set(self) -> None:
        self.append(placeholder_type("builtins.set")())

    def load_additems(self) -> None:
        self.pop_mark()

    def load_frozenset(self) -> None:
        self.pop_mark()
        self.append(placeholder_type("builtins.frozenset")())

    def _fill(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif not isinstance(target, Placeholder):
            raise ValueError(f"it appends to a {type(target).__name__}, which torch does not write")

    def _fill_dict(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Placeholder):
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError(f"it sets items of a {type(target).__name__}, which torch does not write")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, (tuple, list, dict)):
                raise ValueError(f"it has a {type(key).__name__} as the key of a dict, so it is not a state_dict")
            # A hash or a comparison takes as long as the key, each time that one key is used; and many large numbers
            # have one hash, so that each would be compared with all others.
            if (isinstance(key, (str, bytes)) and len(key) > _MAX_KEY) or (isinstance(key, int) and abs(key) >> 64):
                raise ValueError(
                    f"it has a {type(key).__name__} as the key of a dict that torch does not write: too long"
                )
            target[key] = value


_TOO_DEEP = f"it nests containers more than {_MAX_DEPTH} deep, so it is not a state_dict"
_OWN = """
    PROTO MARK BYTEARRAY8 REDUCE NEWOBJ NEWOBJ_EX BUILD APPEND APPENDS SETITEM SETITEMS EMPTY_SET ADDITEMS FROZENSET
"""
_INSTRUCTIONS = _Instructions(
    {code: _PICKLE._Unpickler.dispatch[code] for code in _CODES.values()}
    | {_CODES[name]: getattr(_Unpickler, f"load_{name.lower()}") for name in _OWN.split()}
)


def _check_depth(root: Any) -> None:
    """Raises ValueError if containers are nested too deep: whoever follows them by recursion would end the process."""
    heights: dict[int, int] = {}
    opened: set[int] = set()
    waiting = [root] if isinstance(root, (tuple, list, dict)) else []
    while waiting:
        top = waiting[-1]
        if id(top) in heights:
            waiting.pop()
            continue
        items = top.values() if isinstance(top, dict) else top
        inner = [item for item in items if isinstance(item, (tuple, list, dict))]
        if id(top) in opened:
            heights[id(top)] = 1 + max((heights.get(id(item), 0) for item in inner), default=0)  # 0: a cycle
            if heights[id(top)] > _MAX_DEPTH:
                raise ValueError(_TOO_DEEP)
            waiting.pop()
        else:
            opened.add(id(top))
            if len(opened) - len(heights) > _MAX_DEPTH:  # the containers around this one
                raise ValueError(_TOO_DEEP)
            waiting += [item for item in inner if id(item) not in opened]


def _first_element(view: list[Any], numel: int) -> int:
    match view:
        case [] | [None]:
            return 0
        case [(_, int(start), int(count))] if start >= 0 and 0 <= count <= numel - start:
            return start
    raise ValueError("it refers to a storage in a way that torch does not write")


def load(program: bytes) -> Any:
    """Runs the pickle program of a checkpoint.

    Args:
        program: the content of data.pkl.

    Returns:
        The object that the program builds, with a `LazyTensor` for every tensor and a `Placeholder` for every
        foreign object.

    Raises:
        ValueError: if the program is broken, exceeds a limit, or describes a tensor in a way that torch does not write.
    """
    return load_from(io.BytesIO(program))


def load_from(file: io.BytesIO) -> Any:
    """As ``load``, for a file with further bytes after the program; stays at these."""
    try:
        return _Unpickler(file).load()
    except Exception as error:  # a broken or hostile program may cause any error
        reason = error if isinstance(error, ValueError) else f"it is broken ({error!r})"
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
