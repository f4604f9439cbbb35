"""torchvision's Faster R-CNN in a comparison: records stages, calibrates predictions. Needs the extra ``torch``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

_RPN_DELTAS = (0.0, 0.2)  # boxes move and grow by about a fifth of an anchor
_ROI_DELTAS = (0.0, 0.4)  # divided by the coder's weights 10, 10, 5, 5
_OBJECTNESS = (0.0, 1.5)
_ROI_CLASSES = (0.0, 0.55)  # a small spread: the softmax must not saturate, or scores would tie at 1
_ROI_CANDIDATES = 0.3  # candidates above the score threshold before NMS, per proposal
# A box head without norms spreads the scores of proposals on photos less than the scores of the calibration's boxes.
_ROI_CANDIDATES_WITHOUT_NORM = 3.0


def hooks(model: Any, recorded: dict[str, np.ndarray]) -> list[tuple[torch.nn.Module, Callable[..., None]]]:
    """Modules and forward hooks; the hooks record the stages after the backbone, under the names that our model sows.

    Args:
        model: torchvision's detector.
        recorded: array of each stage; the hooks write into it.
    """
    import torch

    from flaxdet.convert.stages import PROPOSAL_IMAGE, record_map

    def flat(x: torch.Tensor, width: int) -> torch.Tensor:  # [B, A * width, h, w] -> [B, hwA, width]
        batch, _, height, columns = x.shape
        x = x.reshape(batch, -1, width, height, columns).permute(0, 3, 4, 1, 2)
        return x.reshape(batch, -1, width)

    def rpn_head(_: Any, __: Any, output: tuple[list[torch.Tensor], list[torch.Tensor]]) -> None:
        recorded["objectness"] = torch.cat([flat(x, 1) for x in output[0]], dim=1)[..., 0].cpu().numpy()
        recorded["pred_bbox_deltas"] = torch.cat([flat(x, 4) for x in output[1]], dim=1).cpu().numpy()

    def rpn(_: Any, __: Any, output: tuple[list[torch.Tensor], Any]) -> None:
        recorded["proposals"] = torch.cat(output[0]).cpu().numpy()
        recorded[PROPOSAL_IMAGE] = np.repeat(np.arange(len(output[0])), [len(boxes) for boxes in output[0]])

    def predictor(_: Any, __: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        recorded["class_logits"], recorded["box_regression"] = (x.cpu().numpy() for x in output)
        recorded["class_scores"] = output[0].softmax(dim=-1).cpu().numpy()

    heads = model.roi_heads
    return [
        (model.rpn.head, rpn_head),
        (model.rpn, rpn),
        (heads.box_roi_pool, record_map(recorded, "roi_features")),
        (heads.box_predictor, predictor),
    ]


def calibrate(model: Any, features: dict[str, torch.Tensor]) -> None:
    """Scales the prediction layers, see ``flaxdet.convert.lively.make_lively``.

    Args:
        model: torchvision's detector; changed in place.
        features: {name: [1, C, h, w]}, the backbone's output for the calibration picture, the finest level first.
    """
    import torch

    from flaxdet.convert.lively import set_channels

    levels = list(features.values())
    hidden = [model.rpn.head.conv(level) for level in levels]
    set_channels(model.rpn.head.cls_logits, hidden, _OBJECTNESS)
    set_channels(model.rpn.head.bbox_pred, hidden, _RPN_DELTAS)

    # Random boxes of all sizes stand in for proposals, so that no selection influences the calibration.
    size = torch.exp(torch.empty(400, 2, dtype=levels[0].dtype).uniform_(math.log(16), math.log(220)))
    corner = torch.rand_like(size) * (torch.tensor([320.0, 256.0]) - size).clamp(min=0)
    boxes = torch.cat([corner, corner + size], dim=1)
    pooled = model.roi_heads.box_roi_pool(features, [boxes], [(256, 320)])
    hidden = [model.roi_heads.box_head(pooled)]
    predictor = model.roi_heads.box_predictor
    set_channels(predictor.bbox_pred, hidden, _ROI_DELTAS)
    logits = set_channels(predictor.cls_score, hidden, _ROI_CLASSES)
    norms = any(isinstance(module, torch.nn.BatchNorm2d) for module in model.roi_heads.box_head.modules())
    candidates = _ROI_CANDIDATES if norms else _ROI_CANDIDATES_WITHOUT_NORM
    # The bias of the background sets the number of candidates: bisection, since a softmax allows no closed form.
    low, high, shift = -20.0, 40.0, 0.0
    for _ in range(40):
        shift = (low + high) / 2
        scores = torch.cat([logits[:, :1] + shift, logits[:, 1:]], dim=1).softmax(1)[:, 1:]
        low, high = (
            (shift, high) if (scores > model.roi_heads.score_thresh).sum() > candidates * len(logits) else (low, shift)
        )
    predictor.cls_score.bias[0] += shift
