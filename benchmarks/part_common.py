"""What the benchmarks of parts share: calls that wait for their result, seeded boxes, and the ratio of both sides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from contenders import torch_device

import flaxdet

Run = Callable[[], Any]
ROWS, COLUMNS = 800, 1066  # of the resized photo; its canvas is 800x1088


def jitted(function: Callable[..., Any]) -> Any:
    """Compiled as flaxdet compiles its own."""
    return jax.jit(function, compiler_options=flaxdet.compiler_options())


def ready(function: Callable[..., Any], *args: Any) -> Run:
    """A call that waits for its result."""
    return lambda: jax.block_until_ready(function(*args))


def tensors(tree: Any) -> Any:
    """numpy arrays as torch tensors on torch's device."""
    return jax.tree.map(lambda x: torch.from_numpy(np.array(x)).to(torch_device()), tree)


def grouped_boxes(rng: np.random.Generator, count: int, objects: int, small: float, large: float) -> np.ndarray:
    """[count, 4] boxes around some objects, as a detector proposes them: near ones often, shifted and stretched."""
    side = np.exp(rng.uniform(np.log(small), np.log(large), (objects, 1)))
    size = side * np.exp(rng.normal(0, 0.4, (objects, 2)))
    centre = rng.uniform(0, (COLUMNS, ROWS), (objects, 2))
    of = rng.integers(objects, size=count)
    centre = centre[of] + rng.normal(0, 0.15, (count, 2)) * size[of]
    size = size[of] * np.exp(rng.normal(0, 0.2, (count, 2)))
    boxes = np.concatenate([centre - size / 2, centre + size / 2], axis=1)
    return boxes.clip(0, (COLUMNS, ROWS, COLUMNS, ROWS)).astype(np.float32)


def with_ratio(result: dict[str, Any]) -> dict[str, Any]:
    """Adds how many times as fast as torchvision's better mode flaxdet is, and prints it."""
    best = min((value, name) for name, value in result["median"].items() if name != "flaxdet")
    result["compared_with"], result["times_as_fast"] = best[1], best[0] / result["median"]["flaxdet"]
    print(f"  flaxdet is {result['times_as_fast']:.2f} times as fast as {best[1]}", flush=True)
    return result
