"""The time of `import flaxdet`, compared with `import flax` alone.

    python benchmarks/import_time.py [--repeat 5] [--json FILE]

Every import runs in a fresh interpreter; the shortest of the repeats counts, since longer times measure other load.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

BUDGET = 2.5  # seconds more than flax


def seconds(statement: str, repeat: int) -> float:
    """The shortest of several runs of a fresh interpreter."""
    times = []
    for _ in range(repeat + 1):  # the first fills the disk cache
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", statement], check=True)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description="How long `import flaxdet` takes.")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/import_time.json"))
    options = parser.parse_args()
    times = {name: seconds(f"import {name}", options.repeat) for name in ("jax", "flax", "flaxdet", "flaxdet.cli.main")}
    for name, value in times.items():
        print(f"import {name:18s} {value:6.2f} s")
    extra = times["flaxdet"] - times["flax"]
    print(f"flaxdet takes {extra:.2f} s more than flax (budget {BUDGET} s)")
    options.json.write_text(json.dumps({"seconds": times, "flaxdet_over_flax": extra, "budget": BUDGET}, indent=2))


if __name__ == "__main__":
    main()
