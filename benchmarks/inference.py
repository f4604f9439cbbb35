"""Inference time of both detectors, flaxdet against torchvision, in alternation in one process.

    python benchmarks/inference.py [--model MODEL ...] [--repeats 5] [--json FILE]

One 480x640 photo at 800x1088 (min_size 800), float32, the same lively weights on both sides; torchvision eager and
channels_last. Prints medians and ratios and writes them as JSON. torchvision's NMS and RoIAlign are its C++ ones
where they load; the first line says so.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from common import MODELS, describe_machine, measure, photo, show, write

from flaxdet.builders import make_model
from flaxdet.convert import from_torchvision, reference
from flaxdet.predict import jitted_detect
from flaxdet.transform import transform


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
        return jax.block_until_ready(jitted_detect(model, variables, transform([image], model.transform)))

    def eager() -> Any:
        return theirs([tensor])

    def with_channels_last() -> Any:
        return channels_last([tensor])

    return {"flaxdet": ours, "torchvision eager": eager, "torchvision channels_last": with_channels_last}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description="Times flaxdet against torchvision.")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/inference.json"))
    options = parser.parse_args()

    image = photo()
    machine = describe_machine()
    print("one photo of 480x640 at 800x1088, float32, batch 1, seconds: median (smallest to largest)\n")
    results = {}
    with torch.no_grad():
        for name in options.model:
            results[name] = show(name, measure(contenders(name, image), options.repeats))
    write(options.json, machine, results)


if __name__ == "__main__":
    main()
