"""What the benchmarks share: the machine's description, timing in alternation, the table and the JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from PIL import Image

from flaxdet.convert import reference

MODELS = ("fcos_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2")


def photo(rows: int = 480, columns: int = 640) -> np.ndarray:
    """A real photo of the given size, uint8 RGB."""
    from matplotlib import cbook

    with Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as image:
        return np.asarray(image.convert("RGB").resize((columns, rows)))


def describe_machine() -> dict[str, Any]:
    """Processor, device, threads and versions; printed as well."""
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "device": str(jax.devices()[0]),
        "torch_threads": torch.get_num_threads(),
        "torchvision_ops": reference.ops_kind(),
        **{package: version(package) for package in ("jax", "flax", "torch", "torchvision")},
    }
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    return machine


def measure(functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run, the functions in turn after one warm-up each."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def show(title: str, seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    """Prints medians and what flaxdet takes of each; returns them for the JSON."""
    medians = {contender: statistics.median(values) for contender, values in seconds.items()}
    print(title)
    for contender, values in seconds.items():
        ratio = medians["flaxdet"] / medians[contender]
        spread = f"({min(values):.2f} to {max(values):.2f})"
        print(f"  {contender:<28}{medians[contender]:6.2f} {spread:<18} flaxdet takes {ratio:.2f} of it", flush=True)
    return {"seconds": dict(seconds), "median": medians}


def write(path: Path, machine: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Writes the figures as JSON."""
    report = {"machine": machine, "date": time.strftime("%Y-%m-%d"), "results": results}
    path.write_text(json.dumps(report, indent=1) + "\n")
