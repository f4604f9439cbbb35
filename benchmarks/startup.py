"""Time from the start of a process to its first detection, without and with jax's compilation cache.

    python benchmarks/startup.py [--model MODEL ...] [--repeats 3] [--json FILE]

Each run is a fresh process that imports flaxdet, reads weights from a .safetensors file, makes a ``Predictor`` and
detects objects in one photo of 480x640 at 800x1088: cold, with an empty cache folder (JAX_COMPILATION_CACHE_DIR), then
warm, with the folder that the cold run left. torchvision eager does the same in its own process, for comparison.
Prints medians and writes them as JSON.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from common import describe_machine, json_path, lively_weights, photo, run_alone, write
from contenders import DTYPES, MODELS
from PIL import Image

BUDGET = 15  # seconds to the first detection with a warm cache
MOMENTS = ("imported", "loaded", "first detection")


def one_model(name: str, weights: Path, image: Path, options: Any) -> dict[str, list[dict[str, Any]]]:
    """Seconds to each moment, of every run."""
    given = ("--dtype", options.dtype, "--min-size", options.min_size)
    runs: dict[str, list[dict[str, Any]]] = {"flaxdet, cold": [], "flaxdet, warm": [], "torchvision eager": []}
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as cache:
            # jax leaves out of the cache what took less than a second to compile, unless told otherwise
            env = {
                **os.environ,
                "JAX_COMPILATION_CACHE_DIR": cache,
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": str(options.cache_from),
            }
            for state in ("cold", "warm"):
                runs[f"flaxdet, {state}"].append(run_alone("flaxdet", name, weights, image, *given, env=env))
        runs["torchvision eager"].append(run_alone("torchvision eager", name, weights, image, *given))
    return runs


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--min-size", type=int, default=800)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--cache-from", type=float, default=0, help="seconds of compiling from which jax caches")
    parser.add_argument("--json", type=Path, help="default: benchmarks/startup.json")
    options = parser.parse_args()

    machine = describe_machine()
    print(
        f"one photo of 480x640, shorter side {options.min_size}, {options.dtype}: seconds since the process started\n"
    )
    results: dict[str, Any] = {"budget_warm": BUDGET, "min_size": options.min_size, "dtype": options.dtype}
    with tempfile.TemporaryDirectory() as folder:
        image, weights = Path(folder) / "photo.png", Path(folder) / "weights.safetensors"
        Image.fromarray(photo()).save(image)
        for name in options.model:
            lively_weights(name, weights)
            runs = one_model(name, weights, image, options)
            print(f"{name}\n  {'':<22}" + "".join(f"{moment:>17}" for moment in MOMENTS))
            results[name] = {}
            for state, rows in runs.items():
                times = [row["seconds"] for row in rows if "error" not in row]
                errors = sorted({row["error"] for row in rows if "error" in row})
                medians = {moment: statistics.median(row[moment] for row in times) for moment in MOMENTS if times}
                results[name][state] = {"seconds": times, "median": medians, "errors": errors}
                cells = "".join(f"{value:17.2f}" for value in medians.values())
                print(f"  {state:<22}{cells}{''.join(f'  failed: {error}' for error in errors)}", flush=True)
            print()
            write(options.json or json_path("startup", options.dtype), machine, results)


if __name__ == "__main__":
    main()
