"""Checkpoint files: reads and writes torch's ``.pth`` and ``.safetensors``, without torch.

The kind of a file is recognised by its content, not by its name. Only torch's format from before 1.6 (not a zip)
needs torch, whose ``weights_only`` loader then reads the file.
"""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from flaxdet.files import checksums, tensor_file, torch_pickle, torch_zip
from flaxdet.files.messages import one_line
from flaxdet.files.opening import HEAD, foreign_kind, open_regular
from flaxdet.files.torch_objects import FLOAT8, Placeholder
from flaxdet.files.unwrap import unwrap

_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first bytes of a legacy file, a pickled number
_WANTED = "expected a state_dict saved by torch.save (.pth) or by safetensors"


class CheckpointError(ValueError):
    """A checkpoint can't be read, written or recognised.

    Args:
        *args: the message, which names the file; it becomes one line.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(one_line(str(each)) for each in args))


class CheckpointFileError(CheckpointError, OSError):
    """The operating system refuses to read or write the file."""


class CheckpointNotFoundError(CheckpointFileError, FileNotFoundError):
    """There is no such file."""


def _file_error(path: str | os.PathLike[str], message: str, error: OSError) -> CheckpointFileError:
    kind = CheckpointNotFoundError if isinstance(error, FileNotFoundError) else CheckpointFileError
    return kind(str(error_of(path, message.format(error.strerror or error))))


def error_of(path: str | os.PathLike[str], message: object) -> CheckpointError:
    """The error about a file, on one line.

    Args:
        path: the file.
        message: the fault; it follows the path and a colon.
    """
    return CheckpointError(f"{os.fspath(path)}: {message}")


def read(path: str | os.PathLike[str], *, ema: bool = False, key: str | None = None) -> dict[str, Any]:
    """Reads the state_dict of a checkpoint file.

    Args:
        path: a ``.pth`` (torch's zip format, or the legacy format if torch is installed) or ``.safetensors`` file.
            Of a file of torchvision's training reference, {"model": ..., "optimizer": ...}, "model" is read; of a file
            of Lightning, "state_dict".
        ema: as ``key="model_ema"``.
        key: which state_dict, if the file holds several: its name in the file ("model_ema"), with dots where dicts
            are nested; or a prefix of keys ("teacher").

    Returns:
        Arrays by torch key, in the file's order and dtypes (bfloat16 and float8 are ml_dtypes'), without the prefixes
        of wrappers: "module.", "model.", "detector." and "net." if all keys have them, torch.compile's and FSDP's
        anywhere. Numbers, strings and plain containers are returned unchanged, and other objects become an inert
        `torch_objects.Placeholder`: nothing that a file names is ever imported or called.

    Raises:
        CheckpointError: if the file is truncated, damaged, of another kind or holds no state_dict; if it exceeds a
            limit (16 MiB of pickle, 300 nested containers, tensors larger than the file); or if it holds several
            state_dicts, or none under ``key``.
        CheckpointFileError: (also an OSError) if the file can't be read; `CheckpointNotFoundError` (also a
            FileNotFoundError) if there is no such file.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(HEAD)
            if head[:4] == b"PK\x03\x04":
                archive = torch_zip.TorchZip(file)
                return _kept(archive.arrays(unwrap(archive.root, ema=ema, key=key)))
            if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
                file.seek(0)
                return unwrap(tensor_file.read(file), ema=ema, key=key)
            if head.startswith(_LEGACY_MAGIC):
                return _kept(_read_legacy(path, file, size, ema=ema, key=key))
    except OSError as error:
        raise _file_error(path, f"cannot be read: {{}}; {_WANTED}", error) from error
    except (ValueError, OverflowError, MemoryError, RecursionError) as error:
        raise error_of(path, error if isinstance(error, ValueError) else f"is damaged: {error!r}") from error
    if (kind := foreign_kind(head)) is not None:
        raise error_of(path, f"is not a checkpoint: it {kind}; {_WANTED}")
    kind = "is empty" if not head else "is not a checkpoint"
    if head[:1] == b"\x80":
        kind = "is a Python pickle that torch.save did not write"
    elif head[8:9] == b"{":
        kind = "ends inside its header: a truncated .safetensors?"
    raise error_of(path, f"{kind}; {_WANTED}")


def _kept(state: dict[str, Any]) -> dict[str, Any]:
    """The state_dict; raises ValueError for a tensor of a kind that numpy doesn't have."""
    for key, value in state.items():
        origin = getattr(value, "origin", "")
        if origin.startswith(("tensor of ", "torch._utils._rebuild_")):
            kind = origin.removeprefix("torch._utils._rebuild_").replace("_", " ")
            raise ValueError(f"holds {key}, a {kind}, which numpy has no counterpart for")
    return state


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Reads the metadata of a ``.safetensors`` file.

    Args:
        path: the file.

    Returns:
        Texts by name, without the checksums that ``write_safetensors`` adds; {} for a file of any other kind.

    Raises:
        CheckpointError: if a text changed since ``write_safetensors`` wrote the file.
    """
    try:
        return checksums.check_texts(tensor_file.read_metadata(path))
    except ValueError as error:
        raise error_of(path, error) from error


def _read_legacy(path: str | os.PathLike[str], file: BinaryIO, size: int, **which: Any) -> dict[str, Any]:
    """The state_dict in torch's format of before 1.6: four pickles, the last of the state_dict, and storages.

    Our own unpickler runs them first, since torch's has no limits.
    """
    file.seek(0)
    pickles = io.BytesIO(file.read(torch_pickle.MAX_PROGRAM))
    for _ in range(3):
        torch_pickle.load_from(pickles)
    root = torch_pickle.load_from(pickles)
    if isinstance(root, Placeholder):
        unwrap(root)  # raises the error that names the object's type
    state = {key: as_array(value) for key, value in unwrap(_load_legacy(path), **which).items()}
    arrays = [value for value in state.values() if isinstance(value, np.ndarray)]
    if sum(array.nbytes for array in arrays) > torch_zip.MOST_VIEWS * size:
        raise ValueError(f"has tensors that need more memory than the file's {size:,} bytes explain")
    return state


def _load_legacy(path: str | os.PathLike[str]) -> Any:
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            "is in torch's format from before 1.6, which only torch reads: pip install 'flaxdet[torch]', "
            "or save it again with a newer torch"
        ) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types of errors; the first sentence says enough
        raise ValueError(f"torch.load(weights_only=True) refuses it: {str(error).split('. ')[0]}") from error


def as_array(value: Any) -> Any:
    """A torch tensor as a numpy array of the same bits, without importing torch; anything else unchanged."""
    if not callable(getattr(value, "detach", None)):
        return value
    try:
        tensor = value.detach().cpu().resolve_conj().resolve_neg()
        name = str(tensor.dtype).removeprefix("torch.")
        if name == "bfloat16":
            return tensor.view(sys.modules["torch"].int16).numpy().view(ml_dtypes.bfloat16)
        if name in FLOAT8:
            return tensor.view(sys.modules["torch"].uint8).numpy().view(FLOAT8[name])
        return tensor.numpy()
    except (TypeError, RuntimeError, NotImplementedError):  # sparse, quantised, on the meta device
        return value


def write_pth(path: str | os.PathLike[str], state_dict: Mapping[str, Any]) -> None:
    """Writes a state_dict for ``torch.load(path, weights_only=True)``; torch is not needed.

    The write is atomic: the whole file, or nothing.

    Args:
        path: the file to create or replace.
        state_dict: numpy or jax arrays or torch tensors by torch key.

    Raises:
        CheckpointError: if a value is no array or its dtype doesn't exist in torch.
        CheckpointFileError: (also an OSError) if the file can't be written.
    """
    arrays = _contiguous(path, state_dict)
    with replacing(path) as file:
        torch_zip.write(file, arrays)


def write_safetensors(
    path: str | os.PathLike[str], state_dict: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a ``.safetensors`` file atomically: the whole file, or nothing.

    The metadata also gets a checksum of each array, which ``read`` checks. The same content gives the same bytes.

    Args:
        path: the file to create or replace.
        state_dict: numpy or jax arrays or torch tensors by torch key.
        metadata: texts to store with the arrays, by name.

    Raises:
        CheckpointError: if a value is no array or its dtype doesn't exist in safetensors.
        CheckpointFileError: (also an OSError) if the file can't be written.
    """
    arrays = _contiguous(path, state_dict)
    with replacing(path) as file:
        for part in checksums.ordered(safetensors.numpy.save(arrays, checksums.add(arrays, metadata))):
            file.write(part)


def _contiguous(path: str | os.PathLike[str], state_dict: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Arrays in C order: safetensors 0.8.0 silently writes the elements of other arrays in the wrong order."""
    arrays = {}
    for key, value in state_dict.items():
        value = as_array(value)
        if not hasattr(value, "dtype") or not hasattr(value, "shape"):
            raise error_of(path, f"not written: {key} is a {type(value).__name__}, expected an array")
        array = np.asarray(value, order="C")  # ascontiguousarray would give scalars an axis
        arrays[key] = array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    return arrays


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a temporary file beside ``path``, and renames it to ``path`` when the block ends without an error.

    Args:
        path: the file to create or replace; a link is followed.

    Yields:
        The temporary file, open for writing.

    Raises:
        CheckpointFileError: if the file can't be written (no such folder, no permission, disk full). After any
            error the temporary file is removed and ``path`` is unchanged.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, CheckpointError):
            raise
        if isinstance(error, OSError):
            raise _file_error(path, "cannot be written: {}; nothing was changed", error) from error
        if isinstance(error, (ValueError, TypeError, safetensors.SafetensorError)):
            raise error_of(path, f"not written: {error}") from error
        raise
