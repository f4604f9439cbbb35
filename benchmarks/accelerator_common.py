"""What the stages of accelerator.py share: their notes, their clock, and what both sides are given.

Nothing here imports jax or torch: a stage of one side holds that side's library alone.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from photos import describe_error

SIZE = (480, 640)  # of the photos before the resize
FULL = {"min_size": 800, "rows": 800, "columns": 1088, "verify_size": 480, "repeats": 10, "seconds": 0.7}
SMALL = {"min_size": 64, "rows": 64, "columns": 96, "verify_size": 96, "repeats": 1, "seconds": 0.0}


@dataclass(frozen=True)
class Notes:
    """Where a stage writes what it found, line by line, so that a stage that is killed leaves what it had."""

    path: Path

    def add(self, kind: str, **fields: Any) -> None:
        """Writes one finding.

        Args:
            kind: "rate", "memory", "verify", ...; accelerator_table.py reads them.
            **fields: whatever JSON can hold.
        """
        with self.path.open("a") as file:
            file.write(json.dumps({"kind": kind, **fields}) + "\n")

    @contextmanager
    def attempt(self, **fields: Any) -> Iterator[None]:
        """Notes an error in place of the findings of the block, and lets the stage go on."""
        try:
            yield
        except Exception as error:
            self.add("failure", **fields, error=describe_error(error))


def sizes(options: Mapping[str, Any]) -> dict[str, Any]:
    """Shapes and numbers of repeats, in full or ``--small``."""
    return SMALL if options["small"] else FULL


def weights_file(options: Mapping[str, Any], model: str) -> Path:
    """The .safetensors that both sides read."""
    return Path(options["out"]) / f"{model}.safetensors"


def timed(run: Callable[[], Any], wait: Callable[[Any], Any], options: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of a call on the device, after two calls to warm up.

    Short calls are made several at a time, with one wait at the end, so that the device and not the host's way back and
    forth is timed; each turn takes 20 ms or more.

    Args:
        run: starts the work and returns what to wait for.
        wait: returns when it is done.
        options: of the stage.

    Returns:
        Median, smallest and largest seconds a call over all turns, and their number.
    """
    wait(run())
    start = time.perf_counter()
    wait(run())
    once = time.perf_counter() - start
    numbers = sizes(options)
    calls = 1 if options["small"] else max(1, min(200, round(0.02 / once)))
    turns = max(1 if options["small"] else 3, min(numbers["repeats"], round(numbers["seconds"] / (once * calls))))
    seconds = []
    for _ in range(turns):
        start = time.perf_counter()
        result = None
        for _ in range(calls):
            result = run()
        wait(result)
        seconds.append((time.perf_counter() - start) / calls)
    return {
        "median": statistics.median(seconds),
        "smallest": min(seconds),
        "largest": max(seconds),
        "turns": turns,
        "calls": calls,
    }


def peak_resident() -> float:
    """MiB of this process at its largest, which stands for a device's memory on a CPU."""
    from alone import resident

    return resident("VmHWM")


def kernels(rows: Mapping[str, tuple[float, int]], limit: int = 60) -> dict[str, Any]:
    """A profile for the notes: the longest first.

    Args:
        rows: (milliseconds, launches) by name.
        limit: of the rows that are kept.

    Returns:
        {"total_ms", "launches", "rows": [[name, milliseconds, launches], ...]}.
    """
    ordered = sorted(rows.items(), key=lambda row: -row[1][0])
    return {
        "total_ms": sum(ms for ms, _ in rows.values()),
        "launches": sum(count for _, count in rows.values()),
        "rows": [[name[:160], ms, count] for name, (ms, count) in ordered[:limit]],
    }
