"""Names of modules on both sides: where a part's variables lie in Flax, and what torchvision calls the module.

A part that torchvision has says so by a method ``torch_names() -> Iterator[TorchName]``, its modules in the order of
torchvision's state_dict. A part without the method, such as a backbone of the user's own, has no counterpart there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple


class TorchName(NamedTuple):
    """One module with parameters.

    Attributes:
        path: of the module's variables inside the part, such as "layer1_0/conv1".
        name: of torch's module inside torchvision's part, such as "layer1.0.conv1".
        flattened: whether it is a dense layer on a flattened map, which torch flattens channels first.
    """

    path: str
    name: str
    flattened: bool = False


def names_of(part: Any) -> Iterable[TorchName]:
    """The names that a part says, none where it has no ``torch_names``."""
    return part.torch_names() if hasattr(part, "torch_names") else ()


def inside(part: Iterable[TorchName], path: str, name: str) -> Iterator[TorchName]:
    """The names of a part's modules inside a larger part.

    Args:
        part: names inside the part.
        path: where the part lies in Flax.
        name: torch's name of the part.

    Yields:
        The names, each after the part's own.
    """
    for each in part:
        yield each._replace(path=f"{path}/{each.path}", name=f"{name}.{each.name}")
