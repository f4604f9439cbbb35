"""Sizes, dates and checksums of the image files of a run, to notice on resume that a file has changed."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flaxdet.data.samples import Dataset

NAME = "images.json"  # beside the checkpoints
_THREADS = 8
_CHUNK = 1 << 20
_NAMED = 3  # files that a message names
Files = dict[str, list[Any]]  # by name: [bytes, date of change in ns, CRC-32 of the content]; [] for a broken file


def describe_files(datasets: Mapping[str, Dataset | None], *, progress: bool = False) -> dict[str, Files]:
    """Size, date and checksum of each image file.

    Args:
        datasets: the data sets of a run by role ("train", "val"); ``None`` for a role that the run does not have.
        progress: shows a bar.

    Returns:
        For each role, [bytes, date in ns, checksum] by the name of the file in the folder of the data set; an empty
        list for a file that can't be read. JSON can hold it.
    """
    from tqdm import tqdm

    described = {}
    for role, dataset in datasets.items():
        if dataset is None:
            continue
        paths = _paths(dataset)
        with ThreadPoolExecutor(_THREADS) as pool:
            rows = tqdm(
                pool.map(_describe, paths),
                desc=f"looking at {role} images",
                total=len(paths),
                unit="image",
                leave=False,
                disable=not progress,
            )
            described[role] = dict(zip(_names(dataset), rows, strict=True))
    return described


def compare_files(stored: Mapping[str, Files], found: Mapping[str, Files]) -> tuple[list[str], list[str]]:
    """Compares two results of ``describe_files``.

    Args:
        stored: at the beginning of the run.
        found: now.

    Returns:
        Texts about files whose size or content changed, or that only one of the two has; and texts about files of
        which the date alone changed. Each text names some of the files. Files that were broken may change.
    """
    changes: dict[str, list[str]] = {}
    dates = []
    for role in sorted({*stored, *found}):
        before, after = stored.get(role, {}), found.get(role, {})
        for name in sorted({*before, *after}):
            shown = f"{name} ({role})"
            if name not in after or name not in before:
                kind = "{} gone" if name not in after else "{} new"
                changes.setdefault(kind, []).append(shown)
            elif not before[name]:
                continue
            elif before[name][:1] != after[name][:1]:
                changes.setdefault("the size of {} changed", []).append(shown)
            elif before[name][2:] != after[name][2:]:
                changes.setdefault("the content of {} changed", []).append(shown)
            elif before[name] != after[name]:
                dates.append(shown)
    faults = [kind.format(_listed(names)) for kind, names in changes.items()]
    return faults, [f"the date of {_listed(dates)} changed, the content did not"] if dates else []


def without_broken(stored: Mapping[str, Files], datasets: Mapping[str, Dataset | None], error: str) -> dict[str, Files]:
    """The result of ``describe_files`` with the image that an error names as broken, so that it may be mended.

    Args:
        stored: the result.
        datasets: as for ``describe_files``.
        error: the message, which begins with the path of the image if it is about one.
    """
    names = {
        role: dict(zip(_names(dataset), _paths(dataset), strict=True)) for role, dataset in datasets.items() if dataset
    }
    return {
        role: {name: [] if error.startswith(f"{names[role].get(name)}:") else row for name, row in files.items()}
        for role, files in stored.items()
    }


def with_mended(stored: Mapping[str, Files], found: Mapping[str, Files]) -> dict[str, Files]:
    """The first result of ``describe_files``, with the entries of the second for files that were broken.

    Args:
        stored: at the beginning of the run.
        found: now.
    """
    return {
        role: {name: row or found.get(role, {}).get(name, []) for name, row in files.items()}
        for role, files in stored.items()
    }


def _paths(dataset: Dataset) -> list[Path]:
    return [Path(dataset[i].path) for i in range(len(dataset))]


def _names(dataset: Dataset) -> list[str]:
    """The path of each image in the folder of the data set."""
    folder = getattr(dataset, "images", None)
    return [
        str(path.relative_to(folder) if folder and path.is_relative_to(folder) else path) for path in _paths(dataset)
    ]


def _describe(path: Path) -> list[Any]:
    try:
        status, sum_ = path.stat(), 0
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                sum_ = zlib.crc32(chunk, sum_)
    except OSError:
        return []  # whoever needs the image reports it
    return [status.st_size, status.st_mtime_ns, f"{sum_:08x}"]


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} others" if more > 0 else "")
