"""Images, boxes and one-line errors: what the benchmarks share that needs neither jax nor torch."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from PIL import Image


def photo(rows: int = 480, columns: int = 640) -> np.ndarray:
    """A real photo of the given size, uint8 RGB."""
    from matplotlib import cbook

    with Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as image:
        return np.asarray(image.convert("RGB").resize((columns, rows)))


def photos(count: int, rows: int = 480, columns: int = 640) -> list[np.ndarray]:
    """Different photos of one size: the same one, moved along and mirrored."""
    one = photo(rows, columns)
    moved = (np.roll(one, 61 * i, axis=1) for i in range(count))
    return [np.array(image[:, ::-1] if i % 2 else image) for i, image in enumerate(moved)]


def ground_truth(count: int, seed: int, rows: int, columns: int) -> dict[str, np.ndarray]:
    """Random boxes of 30 to 200 px inside an image, and their labels 1 to 90."""
    rng = np.random.default_rng(seed)
    sides = rng.uniform(30, min(200, rows, columns), (count, 2))
    corner = rng.uniform(0, 1, (count, 2)) * (np.array([columns, rows]) - sides)
    boxes = np.concatenate([corner, corner + sides], axis=1).astype(np.float32)
    return {"boxes": boxes, "labels": rng.integers(1, 91, count)}


def training_examples(count: int, rows: int, columns: int) -> tuple[list[np.ndarray], list[dict[str, Any]]]:
    """Photos, and their targets with 3 and 8 boxes in turn."""
    targets = [ground_truth(3 + 5 * (i % 2), i, rows, columns) for i in range(count)]
    return photos(count, rows, columns), targets


def describe_error(error: BaseException | str) -> str:
    """One line for table and JSON, without this machine's paths."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return re.sub(r"(/[\w.+-]+){2,}", "<path>", line)[:300]
