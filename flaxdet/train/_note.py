"""The note of a checkpoint, beside the arrays: the position in the data, metrics, and checksums of arrays and note.

The note is the ``custom_metadata`` of orbax's checkpoint. Metrics that are known after the save are in a file of their
own, which replaces the metrics of the note. Older checkpoints have no checksums, and are read without.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flaxdet.files import checksums, json_text, schema
from flaxdet.train import _files

METRICS = "metrics.json"
_BEST_BY = "AP"
Metrics = dict[str, float]


class Note(NamedTuple):
    """The content.

    Attributes:
        data: the position in the data.
        metrics: of the evaluation, or ``None``.
        arrays: the checksum of each array by name, or ``None`` in an older checkpoint.
    """

    data: Any
    metrics: Metrics | None
    arrays: dict[str, str] | None


def to_json(note: Note) -> dict[str, Any]:
    """The note for JSON, with a checksum of itself."""
    content = note._asdict()
    return {**content, "checksum": checksums.of_json(content)}


def from_json(stored: Any) -> Note:
    """The inverse of ``to_json``.

    Raises:
        ValueError: if ``stored`` is anything else, or changed since.
    """
    if not isinstance(stored, dict):
        raise ValueError("has no note of flaxdet")
    if set(stored) == {"data", "metrics"}:
        return Note(**stored, arrays=None)
    return Note(**_checked(stored, set(Note._fields)))


def write_metrics(folder: Path, metrics: Mapping[str, float]) -> None:
    """Writes the metrics of a checkpoint that is saved already, atomically."""
    content = {"metrics": {name: value if math.isfinite(value) else None for name, value in metrics.items()}}
    _files.write_json(folder / METRICS, {**content, "checksum": checksums.of_json(content)})


def read_metrics(folder: Path) -> Metrics | None:
    """The metrics in a checkpoint's own file; ``None`` if there is no such file.

    Raises:
        ValueError: if the file is damaged.
        OSError: if the file can't be read.
    """
    path = folder / METRICS
    if not path.is_file():
        return None
    stored = json_text.read(path)
    if isinstance(stored, dict) and "checksum" in stored:  # an older flaxdet wrote the figures alone
        stored = _checked(stored, {"metrics"})["metrics"]
    try:
        schema.METRICS(stored, "")
    except ValueError as error:
        raise ValueError(f"{path}: expected figures by name, found something else ({error})") from None
    return None if stored is None else {name: math.nan if value is None else value for name, value in stored.items()}


def best_step(metrics: Mapping[int, Mapping[str, float] | None]) -> int | None:
    """The step of highest AP, the earliest if several are equal.

    Args:
        metrics: of each step; ``None`` for a step that was not evaluated.

    Returns:
        The step; ``None`` if AP is 0 or undefined (NaN) throughout, so that no step is better than the last.
    """
    scores = {step: found.get(_BEST_BY, math.nan) for step, found in metrics.items() if found is not None}
    defined = {step: score for step, score in scores.items() if not math.isnan(score)}
    if not any(defined.values()):
        return None
    return max(defined, key=lambda step: (defined[step], -step))


def _checked(stored: Any, names: set[str]) -> dict[str, Any]:
    if not isinstance(stored, dict) or set(stored) != {*names, "checksum"}:
        raise ValueError(f"expected {', '.join(sorted(names))} and a checksum")
    content = {name: value for name, value in stored.items() if name != "checksum"}
    if checksums.of_json(content) != stored["checksum"]:
        raise ValueError(f"{', '.join(sorted(names))} changed since the save")
    return content
