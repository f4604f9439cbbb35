"""What the files of a run have in common: JSON written whole or not at all, options compared, errors in one line."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flaxdet.files.checkpoint import CheckpointError, CheckpointFileError, one_line, replacing

_OS_ERROR_CODE = re.compile(r"os_error_code='(\d+)'")  # how tensorstore words what the system answered
_LONGEST = 500  # characters of an error that is somebody else's


def as_json(value: Any, name: str) -> Any:
    """A value as it would come back from JSON: tuples as lists, keys as text.

    Raises:
        TypeError: naming the argument, if JSON cannot hold it.
    """
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be what JSON can hold: {error}") from None


def write_json(path: Path, value: Any) -> None:
    """Writes or replaces a JSON file at once."""
    with replacing(path) as file:
        file.write(json.dumps(value, indent=1).encode() + b"\n")


def differences(old: Any, new: Any) -> list[str]:
    """The options in which two configurations differ, each with both values; nested ones joined by dots."""
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
    """An error in one line: an OSError with its ``errno`` where the system refused something, else a ValueError.

    Args:
        what: the beginning of the line.
        error: the cause; tensorstore's ValueErrors give the system's code in their text.
    """
    code = getattr(error, "errno", None) or getattr(error.__cause__, "errno", None)
    if code is None and (found := _OS_ERROR_CODE.search(str(error))):
        code = int(found[1])
    if code is None:
        kind = CheckpointFileError if isinstance(error, OSError) else CheckpointError
        return kind(one_line(f"{what}: {error}"[:_LONGEST]))
    explained = CheckpointFileError(one_line(f"{what}: {os.strerror(code)}"))
    explained.errno = code
    return explained


def import_orbax() -> tuple[Any, Any]:
    """Orbax and a context to save in.

    Raises:
        ImportError: if it is missing.
    """
    try:
        from orbax.checkpoint import v1
    except ImportError as error:
        raise ImportError("checkpoints of training need orbax: pip install 'flaxdet[train]'") from error
    context = v1.Context()
    # made in the background, folders that can't be made (disk full) leave threads that wait 20 minutes for them
    context.asynchronous.create_directories_asynchronously = False
    return v1, context


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds back a Ctrl-C until the end of the block. In the main thread; others don't get it anyway."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[tuple[int, Any]] = []
    usual = signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual if usual is not None else signal.SIG_DFL)
        if held and callable(usual):
            usual(*held[0])


class QuietOrbax(logging.Filter):
    """Keeps orbax's log off the screen: a save that fails fills it with pages, and is raised as an error anyway.

    Whoever has asked absl for its details (level INFO) gets them.
    """

    loggers = tuple(logging.getLogger(name) for name in ("absl", "asyncio"))  # through which orbax speaks

    def start(self) -> None:
        """From here on."""
        for logger in self.loggers:
            logger.addFilter(self)

    def stop(self) -> None:
        """Until here."""
        for logger in self.loggers:
            logger.removeFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is shown."""
        asked = logging.getLogger("absl").getEffectiveLevel() <= logging.INFO
        return asked or f"{os.sep}orbax{os.sep}" not in record.pathname
