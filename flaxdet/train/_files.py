"""Helpers for the files of a run: atomic writes of JSON, comparison of options, errors in one line."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flaxdet.files.checkpoint import CheckpointError, CheckpointFileError, one_line, replacing

_OS_ERROR_CODE = re.compile(r"os_error_code='(\d+)'")  # the operating system's error in a message of tensorstore
_MAX_LENGTH = 500  # characters of another library's message in an error


def as_json(value: Any, name: str) -> Any:
    """The value after a round trip through JSON: tuples as lists, keys as text.

    Raises:
        TypeError: naming the argument, if JSON cannot hold the value.
    """
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be what JSON can hold: {error}") from None


def write_json(path: Path, value: Any) -> None:
    """Writes or replaces a JSON file atomically."""
    with replacing(path) as file:
        file.write(json.dumps(value, indent=1).encode() + b"\n")


def differences(old: Any, new: Any) -> list[str]:
    """The options in which two configurations differ, with old and new values; names of nested options have dots."""
    before, after = _flatten(old), _flatten(new)

    def shown(values: dict[str, Any], name: str) -> str:
        return json.dumps(values[name]) if name in values else "absent"

    return [
        f"{name} was {shown(before, name)}, is {shown(after, name)}"
        for name in sorted({*before, *after})
        if shown(before, name) != shown(after, name)
    ]


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {
        name: leaf
        for key, inner in value.items()
        for name, leaf in _flatten(inner, f"{prefix}.{key}" if prefix else key).items()
    }


def explain(what: str, error: Exception) -> Exception:
    """An error in one line: an OSError with ``errno`` if the operating system refused something, else a ValueError.

    Args:
        what: the beginning of the line.
        error: the cause; a ValueError of tensorstore has the operating system's code in the message.
    """
    code = getattr(error, "errno", None) or getattr(error.__cause__, "errno", None)
    if code is None and (match := _OS_ERROR_CODE.search(str(error))):
        code = int(match[1])
    if code is None:
        kind = CheckpointFileError if isinstance(error, OSError) else CheckpointError
        return kind(one_line(f"{what}: {error}"[:_MAX_LENGTH]))
    explained = CheckpointFileError(one_line(f"{what}: {os.strerror(code)}"))
    explained.errno = code
    return explained


def import_orbax() -> tuple[Any, Any]:
    """Imports orbax, and makes a context for saving.

    Raises:
        ImportError: if orbax is not installed.
    """
    try:
        from orbax.checkpoint import v1
    except ImportError as error:
        raise ImportError("checkpoints of training need orbax: pip install 'flaxdet[train]'") from error
    context = v1.Context()
    # If a folder can't be made in the background (disk full), orbax's threads wait 20 minutes for it.
    context.asynchronous.create_directories_asynchronously = False
    return v1, context


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Delays a Ctrl-C until the end of the block. Only in the main thread, since no other receives it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    delayed: list[tuple[int, Any]] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: delayed.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler if handler is not None else signal.SIG_DFL)
        if delayed and callable(handler):
            handler(*delayed[0])


class QuietOrbax(logging.Filter):
    """Hides orbax's log: a failed save would fill the screen, although it is raised as an error too.

    With absl's logger at level INFO or below, orbax's log is shown.
    """

    loggers = tuple(logging.getLogger(name) for name in ("absl", "asyncio"))  # the loggers that orbax uses

    def start(self) -> None:
        """Starts hiding."""
        for logger in self.loggers:
            logger.addFilter(self)

    def stop(self) -> None:
        """Stops hiding."""
        for logger in self.loggers:
            logger.removeFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is shown."""
        verbose = logging.getLogger("absl").getEffectiveLevel() <= logging.INFO
        return verbose or f"{os.sep}orbax{os.sep}" not in record.pathname


def remove_folder(folder: Path) -> None:
    """Removes a folder into which other threads, of a save that failed, may still write for a moment."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.05)
