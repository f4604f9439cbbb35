"""Inference of both detectors, flaxdet against torchvision, in alternation in one process.

    python benchmarks/inference.py [--model MODEL ...] [--batches 1 2 4 8] [--dtype float32] [--memory] [--json FILE]

Photos of 480x640 at 800x1088 (--min-size 800), the same lively weights on both sides, from uint8 pixels in host memory
to detections in host memory. flaxdet is ``Predictor`` with one bucket; torchvision runs eager, channels_last, and with
backbone and heads compiled (inductor, frozen weights). bfloat16 is torchvision under autocast; tf32 is for GPUs. Prints
medians, images/s, flaxdet's compile time and flaxdet's speed relative to a large matrix product on this machine, and
writes them as JSON. With --memory each contender's peak memory is measured in a separate process, at batches 1 and 8
(--memory-batches). A contender that fails is reported with the error. torchvision's NMS and RoIAlign are the C++
operators if these can be loaded; the first line says so.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import (
    describe_error,
    describe_machine,
    json_path,
    lively_weights,
    matmul_rate,
    measure,
    photos,
    run_alone,
    share_gpu,
    show,
    write,
)
from contenders import CONTENDERS, DTYPES, MODELS, Contender, load_torch, make_predictor, torch_contender
from PIL import Image

from flaxdet.images.transform import transform
from flaxdet.inference.detect import detect

SIZE = (480, 640)


def make(
    name: str, weights: Path, contender: str, images: list[np.ndarray], options: Any
) -> tuple[Contender, float | None, Any]:
    """A contender for one batch size, how long it compiled, and flaxdet's ``Predictor``."""
    numbers: dict[str, Any] = {"dtype": options.dtype, "min_size": options.min_size}
    if contender == "flaxdet":
        predictor = make_predictor(weights, SIZE, batch=len(images), **numbers)
        start = time.perf_counter()
        predictor.warmup()
        return predictor, time.perf_counter() - start, predictor
    run = torch_contender(load_torch(name, weights, contender, **numbers), dtype=options.dtype)
    if contender != "torchvision compiled":
        return run, None, None
    start = time.perf_counter()
    run(images)
    return run, time.perf_counter() - start, None


def one_batch(name: str, weights: Path, batch: int, options: Any) -> dict[str, Any]:
    """Times all contenders at one batch size."""
    images = photos(batch, *SIZE)
    functions: dict[str, Callable[[], Any]] = {}
    compiling: dict[str, float] = {}
    failed: dict[str, str] = {}
    gflop = None
    for contender in options.contenders:
        try:
            run, seconds, predictor = make(name, weights, contender, images, options)
        except Exception as error:
            failed[contender] = describe_error(error)
            continue
        functions[contender] = functools.partial(run, images)
        if seconds is not None:
            compiling[contender] = seconds
        if predictor is not None:
            gflop = batch * model_flops(predictor) / 1e9

    result = show(f"{name}, batch {batch}", measure(functions, options.repeats, failed))
    for contender, seconds in compiling.items():
        print(f"  {contender:<28}{seconds:8.2f} s to compile")
    for contender, error in failed.items():
        print(f"  {contender:<28}failed: {error}")
    return {
        **result,
        "images_per_second": {contender: batch / median for contender, median in result["median"].items()},
        "compile_seconds": compiling,
        "failed": failed,
        "gflop": gflop,
    }


def model_flops(predictor: Any) -> float:
    """Operations of the model on one image, as XLA counts them (in a loop over images it counts one turn)."""
    ((rows, columns),) = predictor.buckets
    batch = transform([np.zeros((rows, columns, 3), np.uint8)], predictor.model.transform, bucket=(rows, columns))
    model = jax.jit(functools.partial(detect, predictor.model))
    costs = model.lower(predictor._programs.variables, batch).cost_analysis()
    return (costs or {})["flops"]


def show_rates(name: str, batches: dict[str, Any], limit: float) -> None:
    """Prints images/s over batch size, and flaxdet's share of the limit, which it notes in the results."""
    known = [contender for contender in CONTENDERS if any(contender in b["median"] for b in batches.values())]
    print(f"\n{name}, images/s, and flaxdet's share of {limit:.0f} GFLOP/s")
    print(f"  {'batch':<8}" + "".join(f"{contender:>27}" for contender in known) + f"{'share':>8}")
    for batch, result in batches.items():
        rates = result["images_per_second"]
        cells = "".join(f"{rates[contender]:27.3f}" if contender in rates else f"{'failed':>27}" for contender in known)
        if result["gflop"] is not None and "flaxdet" in rates:
            result["share_of_limit"] = result["gflop"] / result["median"]["flaxdet"] / limit
            cells += f"{result['share_of_limit']:8.0%}"
        print(f"  {batch:<8}{cells}")
    print(flush=True)


def peaks(name: str, weights: Path, image: Path, options: Any) -> dict[str, Any]:
    """Peak memory of each contender alone, by batch size."""
    print(f"{name}, peak memory in MiB: whole process, calls after the first (and of the device, on a GPU)")
    results: dict[str, Any] = {}
    for batch in options.memory_batches:
        rows = results.setdefault(str(batch), {})
        for contender in options.contenders:
            given = ("--batch", batch, "--dtype", options.dtype, "--min-size", options.min_size)
            rows[contender] = row = run_alone(contender, name, weights, image, *given)
            cells = [row.get("error", "")] if "error" in row else [row["peak"], row["running_peak"], row["device_peak"]]
            figures = " ".join(f"{x:9.0f}" if isinstance(x, float) else str(x or "") for x in cells)
            print(f"  batch {batch:<3} {contender:<28}{figures}", flush=True)
    return results


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 2, 4, 8))
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--min-size", type=int, default=800)
    parser.add_argument("--memory", action="store_true", help="measure peak memory as well")
    parser.add_argument("--memory-batches", nargs="+", type=int, default=(1, 8))
    parser.add_argument("--json", type=Path, help="default: benchmarks/inference.json")
    options = parser.parse_args()
    if options.dtype == "tf32" and jax.default_backend() == "cpu":
        parser.error("--dtype tf32 is for GPUs")

    share_gpu()
    machine = describe_machine()
    limits = matmul_rate(options.dtype)
    print("a large matrix product: " + ", ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in limits.items()))
    print(f"photos of 480x640, shorter side {options.min_size}, {options.dtype}: median (smallest to largest)\n")
    results: dict[str, Any] = {
        "dtype": options.dtype,
        "min_size": options.min_size,
        "limit_gflops": limits,
        "models": {name: {} for name in options.model},
    }
    target = options.json or json_path("inference", options.dtype)
    with tempfile.TemporaryDirectory() as folder:
        image, weights = Path(folder) / "photo.png", Path(folder) / "weights.safetensors"
        Image.fromarray(photos(1, *SIZE)[0]).save(image)
        for name, result in results["models"].items():
            lively_weights(name, weights)
            result["batches"] = batches = {}
            for batch in options.batches:
                batches[str(batch)] = one_batch(name, weights, batch, options)
            show_rates(name, batches, max(limits.values()))
            if options.memory:
                result["memory_mib"] = peaks(name, weights, image, options)
            write(target, machine, results)


if __name__ == "__main__":
    main()
