"""torchvision itself, ready to be compared with: its operators in place, its models lively.

Needs the extra ``torch`` (``pip install 'flaxdet[torch]'``); nothing here is imported by ``import flaxdet``.

The torchvision wheel that pip installs expects CUDA libraries. Beside a CPU-only torch its C++ operators
cannot be loaded, and importing it fails with "operator torchvision::nms does not exist". `torchvision` then
declares the three operators that detection needs and implements them in plain torch, with the semantics of
the C++ ones.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

_MISSING_OPS = "operator torchvision::nms does not exist"
_library: torch.library.Library | None = None  # torch forgets the declared operators when this is collected


def torchvision() -> ModuleType:
    """Imports torchvision so that its detectors run, whether or not its C++ operators can be loaded.

    Returns:
        The module ``torchvision``; the real C++ operators are used wherever they load (see `ops_kind`).

    Raises:
        ImportError: if torch or torchvision is not installed.
    """
    try:
        import torch  # noqa: F401  (a clearer error than torchvision's own)
    except ImportError as error:
        raise ImportError("comparing with torchvision needs torch: pip install 'flaxdet[torch]'") from error
    try:
        module = importlib.import_module("torchvision")
    except ImportError as error:
        raise ImportError("comparing with torchvision needs it: pip install 'flaxdet[torch]'") from error
    except RuntimeError as error:
        if _MISSING_OPS not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        _declare_ops()
        module = importlib.import_module("torchvision")
    if _library is not None:
        # Only the two modules whose operators exist now: every other operator still reports itself missing.
        for name in ("torchvision.ops.boxes", "torchvision.ops.roi_align"):
            part: Any = sys.modules[name]
            part._assert_has_ops = lambda: None
            part._has_ops = lambda: True
    return module


def ops_kind() -> str:
    """Says which operators torchvision runs with: "torchvision's C++ ops" or "plain torch ops"."""
    torchvision()
    return "torchvision's C++ ops" if _library is None else "plain torch ops"


def _declare_ops() -> None:
    """Declares torchvision's three detection operators and implements them in plain torch."""
    global _library
    import torch

    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define(
        "roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width, "
        "int sampling_ratio, bool aligned) -> Tensor"
    )
    library.impl("nms", plain_nms, "CPU")
    library.impl("roi_align", plain_roi_align, "CompositeImplicitAutograd")
    _library = library


def plain_nms(dets: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Greedy non-maximum suppression; reproduces the C++ ``torchvision::nms``.

    The IoU is computed in the boxes' dtype and compared with the threshold in double precision; NaN (two
    boxes without area, infinite boxes) neither suppresses nor is suppressed; equal scores keep their order.

    Args:
        dets: boxes [N, 4], xyxy, float32 or float64.
        scores: [N].
        iou_threshold: a box is dropped if its IoU with a kept box is larger than this.

    Returns:
        Indices of the kept boxes, int64, best first.
    """
    import torch

    if dets.dtype not in (torch.float32, torch.float64):
        raise RuntimeError(f"nms takes float32 or float64 boxes, found {dets.dtype}")
    if dets.dim() != 2 or dets.shape[1] != 4 or scores.shape != dets.shape[:1]:
        raise RuntimeError(
            f"nms takes boxes [N, 4] and scores [N], found {tuple(dets.shape)} and {tuple(scores.shape)}"
        )
    order = torch.sort(scores.detach(), stable=True, descending=True).indices.numpy()
    boxes = dets.detach().numpy()[order]
    kept: list[int] = []
    zero = boxes.dtype.type(0)
    with np.errstate(all="ignore"):
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        while len(order):
            kept.append(int(order[0]))
            one, one_area, order, boxes, area = boxes[0], area[0], order[1:], boxes[1:], area[1:]
            # `where` and not `maximum`: C++'s max(0, NaN) is 0.
            width = np.minimum(one[2], boxes[:, 2]) - np.maximum(one[0], boxes[:, 0])
            height = np.minimum(one[3], boxes[:, 3]) - np.maximum(one[1], boxes[:, 1])
            overlap = np.where(width > 0, width, zero) * np.where(height > 0, height, zero)
            iou = overlap / (one_area + area - overlap)
            alive = ~(iou.astype(np.float64) > iou_threshold)
            order, boxes, area = order[alive], boxes[alive], area[alive]
    return torch.tensor(kept, dtype=torch.int64)


def plain_roi_align(
    features: torch.Tensor,
    rois: torch.Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> torch.Tensor:
    """RoIAlign; reproduces the C++ ``torchvision::roi_align``, its adaptive sampling included.

    Every output bin is one weighted sum over the corners of its samples, which is torch's ``embedding_bag``:
    quick, without large temporaries, and differentiable. As in C++ no gradient flows to the boxes.

    Args:
        features: [N, C, H, W].
        rois: [K, 5]: index of the image, then xyxy in pixels of the image.
        spatial_scale: size of the features over size of the image.
        pooled_height: rows of the output.
        pooled_width: columns of the output.
        sampling_ratio: samples a bin and axis; adaptive, as many as the bin has pixels, if not positive.
        aligned: shifts the boxes by half a pixel, and does not widen those smaller than one.

    Returns:
        [K, C, pooled_height, pooled_width].
    """
    import torch
    from torch.nn import functional

    n, channels, height, width = features.shape
    rows = features.permute(0, 2, 3, 1).reshape(n * height * width, channels)
    bins = pooled_height * pooled_width
    with torch.no_grad():
        image = rois[:, 0].long()
        start, end = (rois[:, i : i + 2] * spatial_scale - (0.5 if aligned else 0.0) for i in (1, 3))
        size = end - start if aligned else (end - start).clamp(min=1.0)
        bin_size = size / size.new_tensor([pooled_width, pooled_height])
        grid = torch.ceil(bin_size).long().clamp(min=0)
        if sampling_ratio > 0:
            grid = torch.full_like(grid, sampling_ratio)

    # RoIs with the same sampling grid go together: all of them unless the sampling is adaptive.
    output = features.new_zeros(len(rois), bins, channels) + rows[:0].sum()  # differentiable without RoIs too
    for columns, lines in torch.unique(grid, dim=0).tolist():
        if columns * lines == 0:
            continue
        chosen = torch.where((grid == grid.new_tensor([columns, lines])).all(dim=1))[0]
        with torch.no_grad():
            x = _corners(start[chosen, 0], bin_size[chosen, 0], pooled_width, columns, width)
            y = _corners(start[chosen, 1], bin_size[chosen, 1], pooled_height, lines, height)
            # [K, rows, columns, y corners, x corners]
            index = y[0][:, :, None, :, None] * width + x[0][:, None, :, None, :]
            index = index + (image[chosen] * height * width)[:, None, None, None, None]
            weight = y[1][:, :, None, :, None] * x[1][:, None, :, None, :] / (columns * lines)
            corners = 4 * columns * lines
            index, weight = index.reshape(-1, corners), weight.reshape(-1, corners)
        pooled = functional.embedding_bag(index, rows, mode="sum", per_sample_weights=weight)
        output = output.index_copy(0, chosen, pooled.reshape(-1, bins, channels))
    return output.permute(0, 2, 1).reshape(-1, channels, pooled_height, pooled_width)


def _corners(
    start: torch.Tensor, bin_size: torch.Tensor, bins: int, samples: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both neighbours of every sample on one axis: indices and weights, [K, bins, 2 x samples]."""
    import torch

    steps = torch.arange(bins, dtype=start.dtype)
    inner = torch.arange(samples, dtype=start.dtype) + 0.5
    at = (start[:, None] + steps * bin_size[:, None])[..., None] + (inner * bin_size[:, None] / samples)[:, None]
    inside = (at >= -1.0) & (at <= length)  # False for NaN
    at = torch.where(inside, at, 0.0).clamp(min=0.0)
    low = at.long().clamp(max=length - 1)
    fraction = torch.where(low >= length - 1, 0.0, at - low)
    index = torch.cat([low, (low + 1).clamp(max=length - 1)], dim=-1)
    weight = torch.cat([torch.where(inside, 1.0 - fraction, 0.0), torch.where(inside, fraction, 0.0)], dim=-1)
    return index, weight


@contextlib.contextmanager
def exact_nms() -> Iterator[None]:
    """While it lasts, torchvision suppresses class by class.

    For up to 1000 boxes torchvision shifts each class by an offset instead, which costs float32 digits:
    between 1 and 3 % of random sets then keep other boxes.
    """
    torchvision()
    boxes: Any = sys.modules["torchvision.ops.boxes"]
    trick = boxes._batched_nms_coordinate_trick
    boxes._batched_nms_coordinate_trick = boxes._batched_nms_vanilla
    try:
        yield
    finally:
        boxes._batched_nms_coordinate_trick = trick


def reset_roi_scales(model: torch.nn.Module) -> None:
    """Makes MultiScaleRoIAlign forget the scales that it inferred from the first images that it saw."""
    torchvision()
    from torchvision.ops import MultiScaleRoIAlign

    for module in model.modules():
        if isinstance(module, MultiScaleRoIAlign):
            module.scales = None
            module.map_levels = None


def build(name: str, *, frozen: bool = False, **kwargs: Any) -> torch.nn.Module:
    """Builds a detector of torchvision by its builder's name, without pretrained weights, for evaluation.

    Args:
        name: "fcos_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2" or any other of
            ``torchvision.models.detection``.
        frozen: build FCOS on FrozenBatchNorm2d, as torchvision does with any pretrained weights.
        **kwargs: torchvision's own.

    Raises:
        ValueError: if torchvision has no such builder, or `frozen` is asked of another model than FCOS.
    """
    torchvision()
    from torchvision.models import detection, list_models, resnet50
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7
    from torchvision.ops.misc import FrozenBatchNorm2d

    if not frozen:
        if name not in (known := list_models(module=detection)):
            raise ValueError(f"torchvision has no detector named {name!r}; it has {', '.join(known)}")
        builder: Any = getattr(detection, name)
        return builder(weights=None, weights_backbone=None, **kwargs).eval()
    if name != "fcos_resnet50_fpn":
        raise ValueError(f"frozen=True is for fcos_resnet50_fpn, found {name!r}")
    classes = kwargs.pop("num_classes", None)
    layers = kwargs.pop("trainable_backbone_layers", None)
    backbone = _resnet_fpn_extractor(
        resnet50(weights=None, norm_layer=FrozenBatchNorm2d),
        3 if layers is None else layers,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    return detection.FCOS(backbone, 91 if classes is None else classes, **kwargs).eval()


def make_lively(model: Any, seed: int = 0) -> Any:
    """Gives a torchvision detector seeded weights under which every tensor matters: `lively.make_lively`."""
    torchvision()
    from . import lively

    return lively.make_lively(model, seed)
