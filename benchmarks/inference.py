"""Inference time of both detectors, flaxdet against torchvision, in alternation in one process.

    python benchmarks/inference.py [--model MODEL ...] [--repeats 5] [--json FILE]

One 480x640 photo at 800x1088 (min_size 800), float32, the same lively weights on both sides; torchvision eager and
channels_last. Prints medians and ratios and writes them as JSON. torchvision's NMS and RoIAlign are its C++ ones
where they load; the first line says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from PIL import Image

from flaxdet.builders import make_model
from flaxdet.convert import from_torchvision, reference
from flaxdet.predict import detect
from flaxdet.transform import transform

MODELS = ("fcos_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2")


def photo() -> np.ndarray:
    """A real photo of 480x640 pixels."""
    from matplotlib import cbook

    with Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as image:
        return np.asarray(image.convert("RGB").resize((640, 480)))


def contenders(name: str, image: np.ndarray) -> dict[str, Any]:
    """Functions without arguments that run one image from pixels to detections, by name."""
    theirs = reference.make_lively(reference.build(name))
    variables_of = theirs.state_dict()
    model = make_model(name, num_classes=91)
    variables = from_torchvision(model, variables_of)
    tensor = torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255
    channels_last = reference.build(name)
    channels_last.load_state_dict(variables_of)
    channels_last = channels_last.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def ours() -> Any:
        return jax.block_until_ready(detect(model, variables, transform([image], model.transform)))

    def eager() -> Any:
        return theirs([tensor])

    def with_channels_last() -> Any:
        return channels_last([tensor])

    return {"flaxdet": ours, "torchvision eager": eager, "torchvision channels_last": with_channels_last}


def measure(functions: dict[str, Any], repeats: int) -> dict[str, list[float]]:
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


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description="Times flaxdet against torchvision.")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/inference.json"))
    options = parser.parse_args()

    image = photo()
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "device": str(jax.devices()[0]),
        "torch_threads": torch.get_num_threads(),
        "torchvision_ops": reference.ops_kind(),
        **{package: version(package) for package in ("jax", "flax", "torch", "torchvision")},
    }
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print("one photo of 480x640 at 800x1088, float32, batch 1, seconds: median (smallest to largest)\n")
    results = {}
    with torch.no_grad():
        for name in options.model:
            seconds = measure(contenders(name, image), options.repeats)
            medians = {contender: statistics.median(values) for contender, values in seconds.items()}
            results[name] = {"seconds": seconds, "median": medians}
            print(name)
            for contender, values in seconds.items():
                ratio = medians["flaxdet"] / medians[contender]
                spread = f"({min(values):.2f} to {max(values):.2f})"
                print(f"  {contender:<28}{medians[contender]:6.2f} {spread:<18} flaxdet takes {ratio:.2f} of it")
    report = {"machine": machine, "date": time.strftime("%Y-%m-%d"), "results": results}
    options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
