"""``flaxdet detect --demo``: the photos and the weights that are part of the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flaxdet import registry

THRESHOLD = 0.4  # default score threshold of --demo: with the model's .2, boxes crowd the pictures

NEXT = """
That was a tiny model for blood cells. Next:
  flaxdet verify                           compares each detector with torchvision's (needs the extra torch)
  flaxdet detect photo.jpg                 detects 80 classes of objects in your photos (downloads 124 MB once)
  flaxdet detect --help"""


def check_demo(command: Any) -> None:
    """Raises ValueError if ``--demo`` is combined with photos, weights or names from the user."""
    given = {"IMAGE": command.images, "--model": command.model, "--categories": command.categories}
    given["--weights"] = command.weights != type(command).weights
    for option, value in given.items():
        if value:
            raise ValueError(f"--demo uses photos, weights and names of the package: expected no {option} beside it")


def demo_photos() -> tuple[str, ...]:
    """The paths of the demonstration's photos."""
    from flaxdet.zoo._tiny import DEMO_PHOTOS

    return tuple(map(str, DEMO_PHOTOS))


def load_demo(command: Any) -> tuple[Any, Any, list[str]]:
    """The tiny model, its variables and the names of its labels.

    Args:
        command: a command with the options threshold, min_size, max_size and dtype.

    Returns:
        Model, variables and names, label 0 first.
    """
    import jax.numpy as jnp

    from flaxdet.files import models
    from flaxdet.zoo._tiny import DEMO_WEIGHTS, NAME

    threshold = THRESHOLD if command.threshold is None else command.threshold
    given = {registry.get(NAME).kind.score_field: threshold, "min_size": command.min_size, "max_size": command.max_size}
    options = {name: value for name, value in given.items() if value is not None}
    file = models.read_model(DEMO_WEIGHTS)
    return *models.make(file, **options, dtype=jnp.dtype(command.dtype).type), file.categories or []


def print_next(pictures: list[Path]) -> None:
    """Prints the paths of the pictures, and commands to try next."""
    for picture in pictures:
        print(f"picture: {picture}")
    print(NEXT)
