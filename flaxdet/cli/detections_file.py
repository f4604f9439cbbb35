"""detections.json of ``flaxdet detect``, which is written while the command runs."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from flaxdet.files.checkpoint import CheckpointFileError, replacing

_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
Row = dict[str, Any]


class DetectionsFile:
    """A JSON file that has each image as soon as it is added, and is whole JSON at any moment.

    A file of an earlier run is replaced when the first image or failure is added, or by ``close``.

    Attributes:
        images: the rows of images so far.
        failed: the rows of failures so far.
    """

    def __init__(
        self,
        path: Path,
        weights: str,
        skipped: Sequence[Row] = (),
        *,
        make_room: Callable[[list[Row]], int | None],
    ):
        """Writes nothing yet.

        Args:
            path: the file.
            weights: the value of "weights" in the file.
            skipped: the rows of "skipped" in the file.
            make_room: called with ``images`` if the disk is full. Removes something from the disk and from one of the
                rows, and returns the index of the row; ``None`` if there is nothing to remove.
        """
        self.path, self.skipped, self.images, self.failed = path, list(skipped), list[Row](), list[Row]()
        self._head = f'{{\n "weights": {json.dumps(weights)},\n "images": ['
        self._make_room = make_room
        self._file: BinaryIO | None = None
        self._starts: list[int] = []  # where the text of each row begins in the file
        self._tail = len(self._head.encode())  # where the text after the last row begins

    def add(self, row: Row) -> None:
        """Adds an image.

        Raises:
            OSError: if the disk is full and ``make_room`` finds nothing; the file then has all rows before.
        """
        self.images.append(row)
        try:
            self._save(len(self.images) - 1)
        except OSError:
            self.images.pop()
            raise

    def replace_last(self, row: Row) -> None:
        """Replaces the row of the last image. Raises OSError as ``add``."""
        self.images[-1] = row
        self._save(len(self.images) - 1)

    def fail(self, row: Row) -> None:
        """Adds a failure. Raises OSError as ``add``."""
        self.failed.append(row)
        try:
            self._save(len(self.images))
        except OSError:
            self.failed.pop()
            raise

    def close(self) -> None:
        """Writes the file if there was neither an image nor a failure, and closes it."""
        if self._file is None:
            self._save(0)
        if self._file is not None:
            self._file.close()

    def __del__(self) -> None:  # after an error
        if self._file is not None:
            self._file.close()

    def _save(self, index: int) -> None:
        """Writes the rows from an index on, and all that follows."""
        while True:
            try:
                return self._write(index)
            except OSError as error:
                freed = self._make_room(self.images) if error.errno in _FULL else None
                if freed is None:
                    if isinstance(error, CheckpointFileError):
                        raise
                    raise CheckpointFileError(f"{self.path}: cannot be written: {error.strerror}") from error
                index = min(index, freed)

    def _write(self, index: int) -> None:
        starts, texts = self._starts[:index], []
        position = self._starts[index] if index < len(self._starts) else self._tail
        for i, row in enumerate(self.images[index:], index):
            starts.append(position)
            texts.append((("," if i else "") + _indented(row, 2)).encode())
            position += len(texts[-1])
        begin = starts[index] if index < len(starts) else position
        last = "\n ]" if self.images else "]"
        others = {"failed": self.failed, "skipped": self.skipped}
        end = last + "".join(f',\n "{name}": {_indented(rows, 1).lstrip()}' for name, rows in others.items())
        end = f"{end}\n}}".encode()
        content = b"".join((*texts, end))
        if self._file is None:
            try:
                with replacing(self.path) as file:
                    file.write(self._head.encode() + content)
            except CheckpointFileError as error:
                error.errno = getattr(error.__cause__, "errno", None)
                raise
            self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115  (closed by close)
        else:
            self._overwrite(begin, content)
        self._starts, self._tail = starts, position

    def _overwrite(self, begin: int, content: bytes) -> None:
        """Replaces the text from ``begin`` on; after an error the file is as before."""
        file = self._file
        assert file is not None
        file.seek(begin)
        before = file.read()
        try:
            _write_all(file, begin, content)
        except OSError:
            _write_all(file, begin, before)  # takes no space that the file did not have
            file.truncate(begin + len(before))
            raise
        if len(content) < len(before):
            file.truncate(begin + len(content))


def _write_all(file: BinaryIO, begin: int, content: bytes) -> None:
    file.seek(begin)
    rest = memoryview(content)
    while rest:  # a disk that becomes full takes a part of the text, and then raises
        rest = rest[file.write(rest) :]


def _indented(value: Any, depth: int) -> str:
    """JSON on a new line, as json.dumps(..., indent=1) writes it at this depth."""
    space = "\n" + depth * " "
    return space + json.dumps(value, indent=1).replace("\n", space)
