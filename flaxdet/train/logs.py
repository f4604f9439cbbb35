"""Writers for the numbers of a training run: a file of JSON lines, TensorBoard, or a class of the user."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from flaxdet import registry
from flaxdet.files.checkpoint import replacing
from flaxdet.train import _files


class Writer(Protocol):
    """A writer of the training loop: any class with these two methods."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Takes numbers by name, measured after ``step`` steps."""
        ...

    def close(self) -> None:
        """Flushes and closes the writer."""
        ...


class JsonLinesWriter:
    """A file with one JSON object a line: {"step": 20, "loss": 0.71, ...}.

    Each line is flushed before training goes on, so the log of a run that is killed is complete. NaN and infinities are
    written as null, which every JSON reader accepts.

    Attributes:
        path: the file.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume_from: int | None = None):
        """Opens the file to append to it.

        Args:
            path: the file; missing folders are made.
            resume_from: the step from which a resumed run continues. Lines of later steps and an incomplete last line
                are dropped, so that the log equals the log of an uninterrupted run. The file is replaced atomically.
                ``None``: an existing file is replaced by an empty one.

        Raises:
            ValueError: if the existing file is no such log.
            OSError: if the file cannot be read or written.
        """
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = [] if resume_from is None or not self.path.exists() else _rows(self.path)
        with replacing(self.path) as file:
            for row in rows:
                if resume_from is not None and row["step"] <= resume_from:
                    file.write(_line(row))
        # of the last step that is kept: a run that was killed before it saved these numbers measures them again
        self._written = {(row["step"], frozenset(row)) for row in rows if row["step"] == resume_from}
        self._file = open(self.path, "ab")  # noqa: SIM115  (closed by close)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Appends a line, unless the log of the resumed run has a line of this step with these names already.

        Args:
            step: number of steps done.
            values: numbers by name.

        Raises:
            OSError: if the line cannot be written (disk full); the message is one line that names the file.
        """
        if (step, frozenset({"step", *values})) in self._written:
            return
        try:
            self._file.write(_line({"step": int(step), **{name: float(value) for name, value in values.items()}}))
            self._file.flush()
        except OSError as error:
            raise _files.explain(f"{self.path}: cannot be written", error) from error

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoardWriter:
    """Event files for TensorBoard. Losses are grouped under "loss/", evaluations under "evaluation/".

    Attributes:
        folder: the folder of the event files.
    """

    def __init__(self, folder: str | os.PathLike[str], *, resume_from: int | None = None):
        """Begins an event file.

        Args:
            folder: for the event files; each start of a run adds one.
            resume_from: the step from which a resumed run continues; TensorBoard hides the points of later steps.

        Raises:
            ImportError: if tensorboardX is not installed.
        """
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ImportError("TensorBoard's files need tensorboardX: pip install 'flaxdet[train]'") from error
        self.folder = Path(folder)
        self._writer = SummaryWriter(str(folder), purge_step=None if resume_from is None else resume_from + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one point to each curve; none for NaN and infinities.

        Args:
            step: number of steps done.
            values: numbers by name.
        """
        for name, value in values.items():
            if math.isfinite(value):  # an undefined AP
                self._writer.add_scalar(_tag(name), float(value), int(step))

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._writer.close()


def read_log(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """Reads the log of a ``JsonLinesWriter``.

    Args:
        path: the file. An incomplete last line, of a run that was killed, is left out.

    Returns:
        A dict for each line, in the order of the file: "step" (int) and the numbers by name, with NaN for null.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a line is no JSON object with a "step"; the message names file and line.
    """
    return [{name: math.nan if value is None else value for name, value in row.items()} for row in _rows(Path(path))]


def is_loss(name: str) -> bool:
    """Whether a number of this name is a loss: the sum "loss", or a loss of one of the detectors."""
    return name.startswith("loss") or any(name in each.kind.loss_names for each in registry.architectures(private=True))


def _rows(path: Path) -> list[dict[str, Any]]:
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines[:-1], 1):  # the text after the last line break is empty, or an incomplete line
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ValueError(f'{path}, line {number}: expected a JSON object with a whole "step", got {line[:80]!r}')
        rows.append(row)
    return rows


def _line(row: Mapping[str, Any]) -> bytes:
    finite = {name: value if isinstance(value, int) or _is_finite(value) else None for name, value in row.items()}
    return json.dumps(finite).encode() + b"\n"


def _is_finite(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _tag(name: str) -> str:
    if is_loss(name):
        return f"loss/{name}"
    return f"evaluation/{name}" if name.startswith(("AP", "AR", "val/")) else f"training/{name}"
