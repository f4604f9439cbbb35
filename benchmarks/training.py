"""Time of a training step of both detectors, flaxdet against torchvision, in alternation in one process.

    python benchmarks/training.py [--model MODEL ...] [--batch 2] [--rows 320 --columns 448] [--dtype float32]
        [--contenders NAME ...] [--repeats 5] [--json FILE]

Photos (at 320x448) with 3 and 8 boxes in turn, 91 classes, all parameters train, live BatchNorm, SGD with momentum and
weight decay. The time is from normalised pixels (flaxdet) or images that the model only normalises (torchvision) to the
updated parameters. Both models start from the same weights. torchvision runs eager, channels_last and, on request or on
a GPU, with backbone and heads compiled; its bfloat16 is autocast, tf32 is for GPUs. Prints medians, images/s, ratios
and flaxdet's speed relative to a large matrix product, and writes them as JSON. torchvision's NMS and RoIAlign are the
C++ operators if these can be loaded; the first line says so.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import torch
from common import MODELS, describe_machine, json_path, matmul_rate, measure, share_gpu, show, write
from contenders import (
    CONTENDERS,
    DTYPES,
    allow_tf32,
    compile_parts,
    flaxdet_dtype,
    flaxdet_training,
    torch_device,
    torch_training,
)
from photos import training_examples

from flaxdet.convert import from_torchvision, reference
from flaxdet.registry import make_model

LEARNING_RATE = 1e-4


def geometry(options: Any) -> dict[str, Any]:
    """Of models that don't resize images of the given size."""
    rows, columns = options.rows, options.columns
    return {"min_size": min(rows, columns), "max_size": max(rows, columns)}


def torch_contender(name: str, state: Any, mode: str, images: Any, targets: Any, options: Any) -> Callable[[], Any]:
    """A function that takes one step of torchvision's model."""
    allow_tf32(options.dtype)
    model = reference.build(name, **geometry(options))
    model.load_state_dict(state)
    model = model.to(torch_device()).train()
    if mode != "torchvision eager":
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if mode == "torchvision compiled":
        compile_parts(model, freezing=False)
    step = torch_training(model, images, targets, LEARNING_RATE, dtype=options.dtype)
    return lambda: step().item()


def flaxdet_contender(
    name: str, state_dict: Any, images: Any, targets: Any, options: Any
) -> tuple[Callable[[], Any], float]:
    """A function that takes one step of our model, and the GFLOP of a step as XLA counts them."""
    model = make_model(name, num_classes=91, **flaxdet_dtype(options.dtype), **geometry(options))
    variables = from_torchvision(model, state_dict)
    train_step, state, arrays = flaxdet_training(model, variables, images, targets, LEARNING_RATE)
    costs = train_step.lower(state, arrays).cost_analysis()

    def step() -> float:
        nonlocal state
        state, metrics = train_step(state, arrays)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return step, (costs or {}).get("flops", 0.0) / 1e9


def run(name: str, options: Any, limit: float) -> dict[str, Any]:
    """Measures one detector."""
    images, targets = training_examples(options.batch, options.rows, options.columns)
    state_dict = reference.build(name, **geometry(options)).state_dict()
    functions: dict[str, Callable[[], Any]] = {}
    gflop = 0.0
    for contender in options.contenders:
        if contender == "flaxdet":
            functions[contender], gflop = flaxdet_contender(name, state_dict, images, targets, options)
        else:
            functions[contender] = torch_contender(name, state_dict, contender, images, targets, options)
    failed: dict[str, str] = {}
    result = show(f"{name}, batch {options.batch}", measure(functions, options.repeats, failed))
    for contender, error in failed.items():
        print(f"  {contender:<28}failed: {error}")
    result |= {"failed": failed, "gflop": gflop}
    result["images_per_second"] = {one: options.batch / median for one, median in result["median"].items()}
    print("  images/s: " + ", ".join(f"{one} {rate:.2f}" for one, rate in result["images_per_second"].items()))
    if "flaxdet" in result["median"]:
        result["share_of_limit"] = gflop / result["median"]["flaxdet"] / limit
        print(f"  flaxdet computes {gflop:.0f} GFLOP a step, at {result['share_of_limit']:.0%} of {limit:.0f} GFLOP/s")
    return result


def main() -> None:
    """Runs the benchmark."""
    on_gpu = torch_device() == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS[: 4 if on_gpu else 3])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rows", type=int, default=320, help="of the images; multiples of 32 need no padding")
    parser.add_argument("--columns", type=int, default=448)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="default: benchmarks/training.json")
    options = parser.parse_args()
    if options.dtype == "tf32" and jax.default_backend() == "cpu":
        parser.error("--dtype tf32 is for GPUs")

    share_gpu()
    machine = describe_machine()
    limits = matmul_rate(options.dtype)
    print(f"{options.batch} photos of {options.rows}x{options.columns}, {options.dtype}")
    print("seconds a step: median (smallest to largest)\n")
    results: dict[str, Any] = {key: getattr(options, key) for key in ("dtype", "batch", "rows", "columns")}
    results["limit_gflops"] = limits
    results["models"] = {name: run(name, options, max(limits.values())) for name in options.model}
    write(options.json or json_path("training", options.dtype), machine, results)


if __name__ == "__main__":
    main()
