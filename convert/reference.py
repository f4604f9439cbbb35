"""torchvision itself, ready to be compared with: its operators in place, its models built.

Needs the extra ``torch`` (``pip install 'flaxdet[torch]'``); nothing here is imported by ``import flaxdet``.

The torchvision wheel that pip installs expects CUDA libraries. Beside a CPU-only torch its C++ operators
cannot be loaded, and importing it fails with "operator torchvision::nms does not exist". `torchvision` then
declares the three operators that detection needs and implements them in plain torch (`torch_ops`).
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

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

    from flaxdet.convert import torch_ops

    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define(
        "roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width, "
        "int sampling_ratio, bool aligned) -> Tensor"
    )
    library.impl("nms", torch_ops.nms, "CPU")
    library.impl("roi_align", torch_ops.roi_align, "CompositeImplicitAutograd")

    def nms_under_autocast(dets: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return torch_ops.nms(dets.float(), scores.float(), iou_threshold)

    def roi_align_under_autocast(features: torch.Tensor, rois: torch.Tensor, *options: Any) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return torch_ops.roi_align(features.float(), rois.float(), *options).to(features.dtype)

    # as torchvision's: autocast computes both in float32
    library.impl("nms", nms_under_autocast, "AutocastCPU")
    library.impl("roi_align", roi_align_under_autocast, "AutocastCPU")
    _library = library


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


def see_ordinary_photo(model: torch.nn.Module) -> None:
    """Gives MultiScaleRoIAlign the scales that it infers when the first image that it sees is an ordinary photo.

    It infers the scale of each level from the height of that image and keeps it, so that after a strip of some dozen
    rows all later images are pooled from wrong places (pytorch/vision 3747).

    Args:
        model: a detector of torchvision; nothing else in it changes.
    """
    torchvision()
    import torch
    from torchvision.ops import MultiScaleRoIAlign, poolers

    pools = [module for module in model.modules() if isinstance(module, MultiScaleRoIAlign)]
    if not pools:
        return
    parameter, size = next(model.parameters()), (256, 320)
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    with torch.no_grad():
        maps: Any = model.backbone(parameter.new_zeros(1, 3, *size))  # pyright: ignore[reportCallIssue]
    for module, training in modes:
        module.training = training
    for pool in pools:
        levels = [level for name, level in maps.items() if name in pool.featmap_names]
        scales = poolers._setup_scales(levels, [size], pool.canonical_scale, pool.canonical_level)
        pool.scales, pool.map_levels = scales


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
