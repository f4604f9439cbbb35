"""Time of a training step of both detectors, flaxdet against torchvision, in alternation in one process.

    python benchmarks/training.py [--model MODEL ...] [--repeats 5] [--json FILE]

Two photos at 320x448 with 3 and 8 boxes, float32, 91 classes, everything trains, live BatchNorm, SGD with momentum and
weight decay; from normalised pixels (ours) or images that the model only normalises (torchvision's) to the updated
parameters. Both start from the same weights; torchvision eager and channels_last. Prints medians and ratios and writes
them as JSON. torchvision's NMS and RoIAlign are its C++ ones where they load; the first line says so.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from common import MODELS, describe_machine, measure, photo, show, write

from flaxdet.builders import make_model
from flaxdet.convert import from_torchvision, reference
from flaxdet.train import create_state, make_train_step, sgd, shard_batch
from flaxdet.transform import transform, transform_targets

ROWS, COLUMNS = 320, 448
GEOMETRY: dict[str, Any] = {"min_size": ROWS, "max_size": COLUMNS}  # images of this size are not resized
OPTIONS: dict[str, Any] = {"momentum": 0.9, "weight_decay": 1e-4}
LEARNING_RATE = 1e-4  # small: what a step costs in time depends on its proposals, so the weights had better stay


def truth(count: int, seed: int) -> dict[str, np.ndarray]:
    """Random boxes of 30 to 200 px and their labels."""
    rng = np.random.default_rng(seed)
    sides = rng.uniform(30, 200, (count, 2))
    corner = rng.uniform(0, 1, (count, 2)) * (np.array([COLUMNS, ROWS]) - sides)
    boxes = np.concatenate([corner, corner + sides], axis=1).astype(np.float32)
    return {"boxes": boxes, "labels": rng.integers(1, 91, count)}


def torch_contender(name: str, state: Any, memory_format: Any, images: Any, targets: Any) -> Callable[[], Any]:
    """A function that takes one step of torchvision's model."""
    model = reference.build(name, **GEOMETRY)
    model.load_state_dict(state)
    model = model.to(memory_format=memory_format).train()  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, **OPTIONS)
    tensors = [torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255 for image in images]
    wanted = [{key: torch.from_numpy(value) for key, value in target.items()} for target in targets]

    def step() -> float:
        optimizer.zero_grad()
        loss = sum(model(tensors, wanted).values())
        loss.backward()  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
        return loss.item()  # pyright: ignore[reportAttributeAccessIssue]

    return step


def contenders(name: str) -> dict[str, Callable[[], Any]]:
    """Functions without arguments that take one training step, by name."""
    landscape = photo(ROWS, COLUMNS)
    images, targets = [landscape, landscape[:, ::-1]], [truth(3, 0), truth(8, 1)]
    state_dict = reference.build(name, **GEOMETRY).state_dict()
    model = make_model(name, num_classes=91, **GEOMETRY)
    tx = sgd(LEARNING_RATE, **OPTIONS)
    train_step = make_train_step(model, tx)
    batch = transform(images, model.transform)
    padded = transform_targets(targets, batch, max_boxes=8)
    arrays = shard_batch({**vars(batch), **vars(padded)}, None)
    state = create_state(model, from_torchvision(model, state_dict), tx, key=jax.random.key(0))

    def ours() -> float:
        nonlocal state
        state, metrics = train_step(state, arrays)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return {
        "flaxdet": ours,
        "torchvision eager": torch_contender(name, state_dict, torch.contiguous_format, images, targets),
        "torchvision channels_last": torch_contender(name, state_dict, torch.channels_last, images, targets),
    }


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description="Times a training step of flaxdet against torchvision's.")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/training.json"))
    options = parser.parse_args()

    machine = describe_machine()
    print(f"two photos of {ROWS}x{COLUMNS}, float32, seconds a step: median (smallest to largest)\n")
    results = {name: show(name, measure(contenders(name), options.repeats)) for name in options.model}
    write(options.json, machine, results)


if __name__ == "__main__":
    main()
