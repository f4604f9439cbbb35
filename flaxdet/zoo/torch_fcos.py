"""torchvision's FCOS in a comparison: records stages, calibrates predictions. Needs the extra ``torch``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

_CENTERNESS = (0.0, 1.0)
_DISTANCES = (2.6, 0.7)  # in anchor sizes: boxes of about five strides, so that neighbouring boxes overlap
_CLASS_SPREAD = 1.0  # standard deviation of the class logits
_CANDIDATES = 300  # candidates above the score threshold before NMS, on the calibration picture


def hooks(model: Any, recorded: dict[str, np.ndarray]) -> list[tuple[torch.nn.Module, Callable[..., None]]]:
    """Modules and forward hooks; the hooks record the stages after the backbone, under the names that our model sows.

    Args:
        model: torchvision's detector.
        recorded: array of each stage; the hooks write into it.
    """

    def head(_: Any, __: Any, output: dict[str, torch.Tensor]) -> None:
        recorded.update({name: x.cpu().numpy() for name, x in output.items()})

    return [(model.head, head)]


def calibrate(model: Any, features: dict[str, torch.Tensor]) -> None:
    """Scales the prediction layers, see ``flaxdet.convert.lively.make_lively``.

    Args:
        model: torchvision's detector; changed in place.
        features: {name: [1, C, h, w]}, the backbone's output for the calibration picture, the finest level first.
    """
    import torch

    from flaxdet.convert.lively import set_channels

    levels = list(features.values())
    classification, regression = model.head.classification_head, model.head.regression_head
    towers = [regression.conv(level) for level in levels]
    set_channels(regression.bbox_reg, towers, _DISTANCES)
    centerness = set_channels(regression.bbox_ctrness, towers, _CENTERNESS)
    towers = [classification.conv(level) for level in levels]
    logits = set_channels(classification.cls_logits, towers, (0.0, _CLASS_SPREAD))
    # sqrt(sigmoid(logit + shift) * sigmoid(centerness)) > threshold, solved for the shift of each candidate
    needed = (model.score_thresh**2 * (1 + torch.exp(-centerness))).clamp(1e-6, 1 - 1e-6)
    shifts = (torch.logit(needed) - logits).flatten()
    count = min(_CANDIDATES, shifts.numel() // 4)
    classification.cls_logits.bias.add_(shifts.kthvalue(count).values)
