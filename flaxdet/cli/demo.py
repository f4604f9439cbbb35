"""What ``flaxdet detect --demo`` runs on: the photos and the weights that the package brings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flaxdet import registry

THRESHOLD = 0.4  # of the scores, unless another is given: the model's own .2 crowds the pictures

NEXT = """
That was a tiny model for blood cells. Next:
  flaxdet verify                           the proof: each detector beside torchvision's (needs the extra torch)
  flaxdet detect photo.jpg                 80 classes of things in your own photos (downloads 124 MB once)
  flaxdet detect --help"""


def check_demo(command: Any) -> None:
    """Raises ValueError where ``--demo`` comes beside photos, weights or names that the user chose."""
    given = {"IMAGE": command.images, "--model": command.model, "--categories": command.categories}
    given["--weights"] = command.weights != type(command).weights
    for option, value in given.items():
        if value:
            raise ValueError(f"--demo brings photos, weights and names of its own: expected no {option} beside it")


def demo_photos() -> tuple[str, ...]:
    """Paths of the photos, in place of the command's arguments."""
    from flaxdet.zoo._tiny import DEMO_PHOTOS

    return tuple(map(str, DEMO_PHOTOS))


def load_demo(command: Any) -> tuple[Any, Any, list[str]]:
    """The tiny model, its variables and the names of its labels.

    Args:
        command: with the options threshold, min_size, max_size and dtype.

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
    """Says where the pictures are, and what to run next."""
    for picture in pictures:
        print(f"picture: {picture}")
    print(NEXT)
