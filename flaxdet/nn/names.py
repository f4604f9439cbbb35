"""Names of modules in Flax and in torchvision: the path of the Flax variables, and the name of the torch module.

A part with a counterpart in torchvision has a method ``torch_names() -> Iterator[TorchName]``, which yields the modules
in the order of torchvision's state_dict. A part without the method, such as a custom backbone, has no counterpart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple


class TorchName(NamedTuple):
    """One module with parameters.

    Attributes:
        path: of the module's variables inside the part, such as "layer1_0/conv1".
        name: name of torch's module inside torchvision's part, such as "layer1.0.conv1".
        flattened: whether the module is a dense layer on a flattened map; torch flattens maps with channels first.
    """

    path: str
    name: str
    flattened: bool = False


def names_of(part: Any) -> Iterable[TorchName]:
    """The names that a part declares; empty if the part has no ``torch_names``."""
    return part.torch_names() if hasattr(part, "torch_names") else ()


def inside(part: Iterable[TorchName], path: str, name: str) -> Iterator[TorchName]:
    """The names of a part's modules inside a larger part.

    Args:
        part: the names inside the part.
        path: path of the part's variables in the larger part.
        name: torch's name of the part.

    Yields:
        The names, prefixed by ``path`` and ``name``.
    """
    for each in part:
        yield each._replace(path=f"{path}/{each.path}", name=f"{name}.{each.name}")
