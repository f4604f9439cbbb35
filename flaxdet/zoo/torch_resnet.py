"""torchvision's ResNet as the body of a detector. Needs the extra ``torch`` when called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def resnet50(norm_layer: Callable[..., Any], *, small: bool) -> Any:
    """torchvision's ResNet-50 without trained weights, or the ResNet-10 of the small forms.

    Args:
        norm_layer: torchvision's argument, makes a norm.
        small: one basic block per stage.
    """
    from torchvision.models import resnet

    if small:
        return resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], norm_layer=norm_layer)
    return resnet.resnet50(weights=None, norm_layer=norm_layer)
