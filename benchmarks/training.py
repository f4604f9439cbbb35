"""Time of a training step of both detectors, flaxdet against torchvision, in alternation in one process.

    python benchmarks/training.py [--model MODEL ...] [--batch 2] [--dtype float32] [--contenders NAME ...]
        [--repeats 5] [--json FILE]

Photos at 320x448 with 3 and 8 boxes in turn, 91 classes, everything trains, live BatchNorm, SGD with momentum and
weight decay; from normalised pixels (ours) or images that the model only normalises (torchvision's) to the updated
parameters. Both start from the same weights. torchvision runs eager, channels_last and, if asked or on a GPU, with
backbone and heads compiled; bfloat16 is autocast there, tf32 for GPUs. Prints medians, images/s, ratios and flaxdet's
share of what a large matrix product reaches, and writes them as JSON. torchvision's NMS and RoIAlign are its C++ ones
where they load; the first line says so.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from common import MODELS, describe_machine, json_path, matmul_rate, measure, photos, share_gpu, show, write
from contenders import CONTENDERS, DTYPES, allow_tf32, compile_parts, torch_device

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


def torch_contender(name: str, state: Any, mode: str, dtype: str, images: Any, targets: Any) -> Callable[[], Any]:
    """A function that takes one step of torchvision's model."""
    device = torch_device()
    allow_tf32(dtype)
    model = reference.build(name, **GEOMETRY)
    model.load_state_dict(state)
    model = model.to(device).train()
    if mode != "torchvision eager":
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if mode == "torchvision compiled":
        compile_parts(model, freezing=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, **OPTIONS)
    tensors = [torch.from_numpy(image.copy()).permute(2, 0, 1).float().to(device) / 255 for image in images]
    wanted = [{key: torch.from_numpy(value).to(device) for key, value in target.items()} for target in targets]

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = sum(model(tensors, wanted).values())
        loss.backward()  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
        return loss.item()  # pyright: ignore[reportAttributeAccessIssue]

    return step


def flaxdet_contender(
    name: str, state_dict: Any, dtype: str, images: Any, targets: Any
) -> tuple[Callable[[], Any], float]:
    """A function that takes one step of our model, and the GFLOP of a step as XLA counts them."""
    # a GPU takes TF32 for float32 unless told otherwise
    exact = {"precision": jax.lax.Precision.HIGHEST} if dtype == "float32" and jax.default_backend() != "cpu" else {}
    computes = jnp.bfloat16 if dtype == "bfloat16" else jnp.float32
    model = make_model(name, num_classes=91, dtype=computes, **exact, **GEOMETRY)
    tx = sgd(LEARNING_RATE, **OPTIONS)
    train_step = make_train_step(model, tx)
    batch = transform(images, model.transform)
    padded = transform_targets(targets, batch, max_boxes=8)
    arrays = shard_batch({**vars(batch), **vars(padded)}, None)
    state = create_state(model, from_torchvision(model, state_dict), tx, key=jax.random.key(0))
    costs = train_step.lower(state, arrays).cost_analysis()  # pyright: ignore[reportFunctionMemberAccess]

    def step() -> float:
        nonlocal state
        state, metrics = train_step(state, arrays)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return step, (costs or {}).get("flops", 0.0) / 1e9


def run(name: str, options: Any, limit: float) -> dict[str, Any]:
    """Measures one detector."""
    images = photos(options.batch, ROWS, COLUMNS)
    targets = [truth(3 + 5 * (i % 2), i) for i in range(options.batch)]
    state_dict = reference.build(name, **GEOMETRY).state_dict()
    functions: dict[str, Callable[[], Any]] = {}
    gflop = 0.0
    for contender in options.contenders:
        if contender == "flaxdet":
            functions[contender], gflop = flaxdet_contender(name, state_dict, options.dtype, images, targets)
        else:
            functions[contender] = torch_contender(name, state_dict, contender, options.dtype, images, targets)
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
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="default: benchmarks/training.json")
    options = parser.parse_args()
    if options.dtype == "tf32" and jax.default_backend() == "cpu":
        parser.error("--dtype tf32 is for GPUs")

    share_gpu()
    machine = describe_machine()
    limits = matmul_rate(options.dtype)
    print(
        f"{options.batch} photos of {ROWS}x{COLUMNS}, {options.dtype}, seconds a step: median (smallest to largest)\n"
    )
    results: dict[str, Any] = {"dtype": options.dtype, "batch": options.batch, "limit_gflops": limits}
    results["models"] = {name: run(name, options, max(limits.values())) for name in options.model}
    write(options.json or json_path("training", options.dtype), machine, results)


if __name__ == "__main__":
    main()
