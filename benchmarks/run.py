"""All benchmarks of speed, one after the other, each in a process of its own.

    python benchmarks/run.py [--quick] [--only NAME ...] [--out FOLDER]

Tables go to the terminal, figures as JSON to benchmarks/ (with --quick, whose figures mean nothing, to a temporary
folder). On two CPU cores all of it takes about two hours. On a GPU name another folder, which keeps the CPU's figures.
Exit status 1 if one of them failed; the others run all the same.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent

_SMALL = ("--min-size", "128")
_ONE = ("--model", "fcos_resnet50_fpn")

# name: (options of a real run, options of a quick one)
BENCHMARKS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "inference": (
        ("--memory",),
        (*_ONE, *_SMALL, "--batches", "1", "--repeats", "1", "--memory", "--memory-batches", "1"),
    ),
    "parts": ((), (*_SMALL, "--repeats", "1")),
    "stream": ((), (*_ONE, *_SMALL, "--count", "6")),
    "startup": ((), (*_ONE, *_SMALL, "--repeats", "1")),
    "training": ((), (*_ONE, "--repeats", "1")),
}


def main() -> None:
    """Runs them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run: small images, one repeat, one model")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument("--out", type=Path, help="folder for the JSON files")
    options = parser.parse_args()

    out = options.out or (Path(tempfile.mkdtemp(prefix="flaxdet-benchmarks-")) if options.quick else HERE)
    out.mkdir(parents=True, exist_ok=True)
    # compile times are those without a cache
    env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    failed = []
    for name in options.only:
        given = BENCHMARKS[name][options.quick]
        target = out / f"{name}.json"
        print(f"== {name} {' '.join(given)}", flush=True)
        start = time.perf_counter()
        done = subprocess.run([sys.executable, HERE / f"{name}.py", *given, "--json", target], env=env)
        failed += [name] if done.returncode else []
        print(
            f"== {name}: {'failed' if done.returncode else 'done'} in {time.perf_counter() - start:.0f} s\n", flush=True
        )
    if "inference" in options.only and "inference" not in failed:
        subprocess.run([sys.executable, HERE / "plot.py", out / "inference.json"], check=True)
    print(f"figures in {out}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
