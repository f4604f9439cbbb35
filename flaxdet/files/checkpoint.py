"""Checkpoint files: reads and writes torch's ``.pth`` and ``.safetensors``, without torch.

The kind of a file is recognised by its content, not by its name. Only torch's format from before 1.6 (not a zip)
needs torch, whose ``weights_only`` loader then reads the file.
"""

from __future__ import annotations

import contextlib
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

from flaxdet.files import torch_pickle, torch_zip

_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first bytes of a legacy file, a pickled number
_WRAPPERS = ("model", "state_dict", "model_state_dict")
_EMA = "model_ema"
PREFIXES = ("module.", "_orig_mod.")  # of the keys of models wrapped in DataParallel and torch.compile
_WANTED = "expected a state_dict saved by torch.save (.pth) or by safetensors"


class CheckpointError(ValueError):
    """A checkpoint can't be read, written or recognised; the message is one line that names the file."""


class CheckpointFileError(CheckpointError, OSError):
    """The operating system refuses to read or write the file."""


class CheckpointNotFoundError(CheckpointFileError, FileNotFoundError):
    """There is no such file."""


def _file_error(path: str | os.PathLike[str], message: str, error: OSError) -> CheckpointFileError:
    kind = CheckpointNotFoundError if isinstance(error, FileNotFoundError) else CheckpointFileError
    return kind(str(_error(path, message.format(error.strerror or error))))


def _error(path: str | os.PathLike[str], message: object) -> CheckpointError:
    return CheckpointError(one_line(f"{os.fspath(path)}: {message}"))


def one_line(text: str) -> str:
    """The text without line breaks and control characters, since parts of it may come from an untrusted file."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def read(path: str | os.PathLike[str], *, ema: bool = False) -> dict[str, Any]:
    """Reads the state_dict of a checkpoint file.

    Args:
        path: a ``.pth`` (torch's zip format, or the legacy format if torch is installed) or ``.safetensors`` file.
            Of a file of torchvision's training reference, {"model": ..., "optimizer": ...}, "model" is read.
        ema: read "model_ema" of such a file instead of "model".

    Returns:
        Arrays by torch key, in the file's order and dtypes (bfloat16 is ml_dtypes'), without DataParallel's
        prefix "module.". Numbers, strings and plain containers are returned unchanged, and other objects become
        an inert `torch_pickle.Placeholder`: nothing that a file names is ever imported or called.

    Raises:
        CheckpointError: if the file is truncated, damaged, of another kind or holds no state_dict.
        CheckpointFileError: (also an OSError) if the file can't be read; `CheckpointNotFoundError` (also a
            FileNotFoundError) if there is no such file.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(len(_LEGACY_MAGIC))
            if head[:4] == b"PK\x03\x04":
                archive = torch_zip.TorchZip(file)
                state = unwrap(archive.root, ema=ema)
                return {
                    key: archive.array(value) if isinstance(value, torch_pickle.LazyTensor) else value
                    for key, value in state.items()
                }
            if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
                return unwrap(safetensors.numpy.load_file(path), ema=ema)
        if head == _LEGACY_MAGIC:
            return {key: as_array(value) for key, value in unwrap(_load_legacy(path), ema=ema).items()}
    except OSError as error:
        raise _file_error(path, f"cannot be read: {{}}; {_WANTED}", error) from error
    except (ValueError, OverflowError, MemoryError, safetensors.SafetensorError) as error:
        raise _error(path, error if isinstance(error, ValueError) else f"is damaged: {error}") from error
    kind = "is empty" if not head else "is not a checkpoint"
    if head[:1] == b"\x80":
        kind = "is a Python pickle that torch.save did not write"
    elif head[8:9] == b"{":
        kind = "ends inside its header: a truncated .safetensors?"
    raise _error(path, f"{kind}; {_WANTED}")


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Reads the metadata of a ``.safetensors`` file.

    Args:
        path: the file.

    Returns:
        Texts by name; {} for a file of any other kind.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {})
    except (OSError, safetensors.SafetensorError):
        return {}


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


def unwrap(root: Any, *, ema: bool = False) -> dict[str, Any]:
    """The state_dict in the content of a checkpoint file.

    Args:
        root: a state_dict, or a dict with a state_dict under "model", "state_dict" or "model_state_dict".
        ema: return the state_dict under "model_ema" instead.

    Returns:
        The state_dict; the prefixes "module." and "_orig_mod." are removed if every key begins with them.

    Raises:
        ValueError: if there is no state_dict.
    """
    if not isinstance(root, Mapping):
        origin = getattr(root, "origin", type(root).__name__)
        raise ValueError(f"holds an object of type {origin}, not a state_dict: save model.state_dict() instead")
    if ema and not isinstance(root.get(_EMA), Mapping):
        raise ValueError(f'holds no state_dict under "{_EMA}"')
    for name in [_EMA] if ema else _WRAPPERS:
        if isinstance(root.get(name), Mapping):
            root = root[name]
            break
    wrong = [key for key in root if not isinstance(key, str)]
    if wrong:
        raise ValueError(f"holds a dict with keys of type {type(wrong[0]).__name__}, not a state_dict")
    state = dict(root)
    if ema:
        state.pop("n_averaged", None)  # a counter that torch.optim.swa_utils.AveragedModel adds
    if not any(hasattr(value, "shape") for value in state.values()):
        shown = ", ".join(sorted(state)[:5]) or "none"
        raise ValueError(f"holds a dict without tensors (keys: {shown}), not a state_dict")
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def as_array(value: Any) -> Any:
    """A torch tensor as a numpy array of the same bits, without importing torch; anything else unchanged."""
    if not callable(getattr(value, "detach", None)):
        return value
    try:
        tensor = value.detach().cpu()
        if str(tensor.dtype) != "torch.bfloat16":
            return tensor.numpy()
        return tensor.view(sys.modules["torch"].int16).numpy().view(ml_dtypes.bfloat16)
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
        file.write(safetensors.numpy.save(arrays, None if metadata is None else dict(metadata)))


def _contiguous(path: str | os.PathLike[str], state_dict: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Arrays in C order: safetensors 0.8.0 silently writes the elements of other arrays in the wrong order."""
    arrays = {}
    for key, value in state_dict.items():
        value = as_array(value)
        if not hasattr(value, "dtype") or not hasattr(value, "shape"):
            raise _error(path, f"not written: {key} is a {type(value).__name__}, expected an array")
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
            raise _error(path, f"not written: {error}") from error
        raise
