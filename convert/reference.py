"""torchvision for comparisons: imports torchvision with or without C++ operators, and builds torchvision's models.

Needs the extra ``torch`` (``pip install 'flaxdet[torch]'``); ``import flaxdet`` does not import this module.

The torchvision wheel that pip installs expects CUDA libraries. With a CPU-only torch the wheel's C++ operators can't be
loaded, and the import fails with "operator torchvision::nms does not exist". The function `torchvision` then declares
the three operators that detection needs, and implements the operators in plain torch (`torch_ops`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

from flaxdet import registry

if TYPE_CHECKING:
    import torch

_MISSING_OPS = "operator torchvision::nms does not exist"
_library: torch.library.Library | None = None  # torch removes the declared operators when this object is deleted


def torchvision() -> ModuleType:
    """Imports torchvision so that the detectors run, whether or not torchvision's C++ operators can be loaded.

    Returns:
        The module ``torchvision``. Uses the C++ operators if they can be loaded (see `ops_kind`).

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
        raise ImportError("comparing with torchvision needs torchvision: pip install 'flaxdet[torch]'") from error
    except RuntimeError as error:
        if _MISSING_OPS not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        _declare_ops()
        module = importlib.import_module("torchvision")
    if _library is not None:
        # Only these two modules have all operators now: in other modules a missing operator still raises an error.
        for name in ("torchvision.ops.boxes", "torchvision.ops.roi_align"):
            ops_module: Any = sys.modules[name]
            ops_module._assert_has_ops = lambda: None
            ops_module._has_ops = lambda: True
    return module


def ops_kind() -> str:
    """The operators that torchvision uses: "torchvision's C++ ops" or "plain torch ops"."""
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

    # as in torchvision: under autocast the two operators compute in float32
    library.impl("nms", nms_under_autocast, "AutocastCPU")
    library.impl("roi_align", roi_align_under_autocast, "AutocastCPU")
    _library = library


@contextlib.contextmanager
def exact_nms() -> Iterator[None]:
    """Within the block, torchvision runs NMS class by class.

    Otherwise torchvision, for up to 1000 boxes, shifts the boxes of each class by an offset and runs NMS once. The
    offset costs float32 digits: in 1 to 3% of random sets of boxes, NMS then keeps other boxes.
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
    """Sets the level scales of MultiScaleRoIAlign to the scales inferred from an ordinary photo.

    torchvision's MultiScaleRoIAlign infers the scale of each level from the height of the first image, and uses these
    scales for all later images. If the first image is a strip of some dozen rows, the scales are wrong, and RoIs of
    later images are pooled from wrong places (pytorch/vision 3747).

    Args:
        model: a detector of torchvision. Only the scales are changed.
    """
    torchvision()
    import torch
    from torchvision.ops import MultiScaleRoIAlign, poolers

    pools = [module for module in model.modules() if isinstance(module, MultiScaleRoIAlign)]
    if not pools:
        return
    parameter, size = next(model.parameters()), (256, 320)
    backbone: Any = model.backbone  # torch's type: a tensor or a module
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    with torch.no_grad():
        maps = backbone(parameter.new_zeros(1, 3, *size))
    for module, training in modes:
        module.training = training
    for pool in pools:
        levels = [level for name, level in maps.items() if name in pool.featmap_names]
        scales = poolers._setup_scales(levels, [size], pool.canonical_scale, pool.canonical_level)
        pool.scales, pool.map_levels = scales


def build(
    name: str,
    *,
    frozen: bool = False,
    norm_eps: float = registry.FROZEN_EPS,
    small: bool = False,
    trainable_backbone_layers: int | None = None,
    num_classes: int | None = None,
    **options: Any,
) -> torch.nn.Module:
    """Builds a detector of torchvision by its builder's name, without pretrained weights, for evaluation.

    Args:
        name: name of a builder of flaxdet, or of any other builder in ``torchvision.models.detection``.
        frozen: builds the body on FrozenBatchNorm2d, as torchvision does for pretrained weights.
        norm_eps: eps of FrozenBatchNorm2d, which torchvision changes by ``overwrite_eps`` for some weights.
        small: builds the small form of a detector of flaxdet, see ``registry.make_model``.
        trainable_backbone_layers: torchvision's argument.
        num_classes: torchvision's argument; default 91.
        **options: torchvision's other arguments.

    Raises:
        ValueError: if torchvision has no such builder, or for ``frozen`` with a detector that is never frozen.
    """
    torchvision()
    from torch.nn import BatchNorm2d
    from torchvision import models
    from torchvision.ops.misc import FrozenBatchNorm2d

    registered = registry.names(private=True)
    if frozen and not (name in registered and registry.get(name).freezable):
        freezable = ", ".join(each.name for each in registry.architectures() if each.freezable)
        raise ValueError(f"frozen=True is for {freezable}, found {name!r}")
    if not frozen and not small and not (name in registered and registry.get(name).private):
        if name not in (builders := models.list_models(module=models.detection)):
            raise ValueError(f"torchvision has no detector named {name!r}; it has {', '.join(builders)}")
        builder: Any = getattr(models.detection, name)
        arguments = {"num_classes": num_classes, "trainable_backbone_layers": trainable_backbone_layers}
        arguments = {option: value for option, value in arguments.items() if value is not None}
        return builder(weights=None, weights_backbone=None, **arguments, **options).eval()
    norm = functools.partial(FrozenBatchNorm2d, eps=norm_eps) if frozen else BatchNorm2d
    layers = (3 if frozen else 5) if trainable_backbone_layers is None else trainable_backbone_layers
    classes = registry.NUM_COCO_CLASSES if num_classes is None else num_classes
    return registry.get(name).in_torch(norm, layers, classes, small=small, **options).eval()


def comparison_of(model: Any) -> ModuleType:
    """The module of the zoo that records the stages of a detector of torchvision and calibrates the prediction layers.

    Args:
        model: a detector of torchvision.

    Raises:
        TypeError: if the model is of no registered kind.
    """
    architectures = {each.kind.__name__: each for each in registry.architectures(private=True)}
    for name, architecture in architectures.items():
        if isinstance(model, getattr(torchvision().models.detection, name)):
            return architecture.load_comparison()
    raise TypeError(f"expected torchvision's {' or '.join(architectures)}, found {type(model).__name__}")
