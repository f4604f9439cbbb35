"""Optional declarations of a backbone, for freezing, folding and strides, after timm's feature_info.

A backbone may have any of these attributes or properties:

- ``stages``: a ``Stage`` for each map, finest first;
- ``trainable_groups``: groups of path prefixes of the parameters, from the last stage to the stem;
- ``conv_norm_pairs``: a ``ConvNorm`` for each norm that can be folded. The backbone then needs the method
  ``without_norms()`` too, which returns the same module with biases in place of the norms.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, TypeGuard

Path = tuple[str, ...]  # names from the root of a tree of variables


@dataclasses.dataclass(frozen=True)
class Stage:
    """A map that a backbone returns.

    Attributes:
        name: name of the map.
        channels: number of channels of the map.
        stride: pixels between neighbouring cells of the map.
    """

    name: str
    channels: int
    stride: int


@dataclasses.dataclass(frozen=True)
class ConvNorm:
    """A convolution and the BatchNorm after it, which can be folded into the convolution.

    Attributes:
        conv: path of the convolution in the module's parameters.
        norm: path of the norm in the module's parameters or statistics.
        eps: eps of the norm, which is added to the variance.
    """

    conv: tuple[str, ...]
    norm: tuple[str, ...]
    eps: float = 1e-5

    def below(self, *names: str) -> ConvNorm:
        """The pair as a module that contains this module declares it.

        Args:
            *names: path of this module in the variables of the containing module.

        Returns:
            The pair with longer paths.
        """
        return ConvNorm((*names, *self.conv), (*names, *self.norm), self.eps)


def stages_of(module: Any) -> tuple[Stage, ...]:
    """The stages that a module declares.

    Args:
        module: any module.

    Returns:
        The module's ``stages``; empty if the module has no such attribute, or one that is no tuple of ``Stage``.
    """
    stages = getattr(module, "stages", ())
    return tuple(stages) if isinstance(stages, tuple) and all(isinstance(stage, Stage) for stage in stages) else ()


def trainable_groups_of(module: Any) -> tuple[tuple[Path, ...], ...]:
    """The groups of parameters that a module declares, from the last stage to the stem.

    Args:
        module: any module.

    Returns:
        The module's ``trainable_groups``; empty if the module has no such attribute.
    """
    return tuple(getattr(module, "trainable_groups", ()))


class Foldable(Protocol):
    """A module whose norms can be folded into its convolutions."""

    @property
    def conv_norm_pairs(self) -> tuple[ConvNorm, ...]:
        """Every convolution with its norm."""
        ...

    def without_norms(self) -> Any:
        """A copy of this module that has biases in place of the norms."""
        ...


def is_foldable(module: Any) -> TypeGuard[Foldable]:
    """Whether a module declares ``conv_norm_pairs`` and ``without_norms``.

    Args:
        module: any module.
    """
    return hasattr(module, "conv_norm_pairs") and hasattr(module, "without_norms")
