"""The same detector on both sides, at any depth of ResNet, with lively weights; and real photos."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from flaxdet.convert import from_torchvision, reference
from flaxdet.models import FCOS, FasterRCNN, FastRCNNConvFCHead, RPNHead
from flaxdet.models.faster_rcnn import default_anchor_generator
from flaxdet.nn import BackboneWithFPN, FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7, ResNet

FCOS_NAME, V2_NAME = "fcos_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2"


def torch_detector(name: str, depth: int, num_classes: int, frozen: bool = False, **options: Any) -> Any:
    """torchvision's detector as its builder makes it, on a ResNet of any depth, in evaluation mode."""
    tv = reference.torchvision()
    detection = tv.models.detection
    extract = detection.backbone_utils._resnet_fpn_extractor
    norm = tv.ops.misc.FrozenBatchNorm2d if frozen else tv.ops.misc.torch.nn.BatchNorm2d
    resnet = getattr(tv.models, f"resnet{depth}")(weights=None, norm_layer=norm)
    if name == FCOS_NAME:
        extra = tv.ops.feature_pyramid_network.LastLevelP6P7(256, 256)
        backbone = extract(resnet, 5, returned_layers=[2, 3, 4], extra_blocks=extra)
        return detection.FCOS(backbone, num_classes, **options).eval()
    batch_norm = tv.ops.misc.torch.nn.BatchNorm2d
    rcnn = detection.faster_rcnn
    backbone = extract(resnet, 5, norm_layer=batch_norm)
    return detection.FasterRCNN(
        backbone,
        num_classes=num_classes,
        rpn_anchor_generator=rcnn._default_anchorgen(),
        rpn_head=rcnn.RPNHead(256, 3, conv_depth=2),
        box_head=rcnn.FastRCNNConvFCHead((256, 7, 7), [256] * 4, [1024], norm_layer=batch_norm),
        **options,
    ).eval()


def flax_detector(
    name: str, depth: int, num_classes: int, frozen: bool = False, dtype: Any = np.float32, **options: Any
) -> FCOS | FasterRCNN:
    """Ours, as the builder makes it, on a ResNet of any depth."""
    dtypes: dict[str, Any] = {"dtype": dtype, "precision": jax.lax.Precision.HIGHEST}
    body = ResNet(depth, frozen_bn=frozen, **dtypes)
    if name == FCOS_NAME:
        fpn = FeaturePyramidNetwork(256, LastLevelP6P7(256, 256, **dtypes), **dtypes)
        return FCOS(BackboneWithFPN(body, fpn, ("c3", "c4", "c5")), num_classes, **dtypes, **options)
    fpn = FeaturePyramidNetwork(256, LastLevelMaxPool(), use_norm=True, **dtypes)
    return FasterRCNN(
        BackboneWithFPN(body, fpn),
        num_classes,
        rpn_anchor_generator=default_anchor_generator(),
        rpn_head=RPNHead(256, 3, conv_depth=2, **dtypes),
        box_head=FastRCNNConvFCHead((256, 7, 7), (256,) * 4, (1024,), use_norm=True, **dtypes),
        **dtypes,
        **options,
    )


@functools.cache
def lively_state_dict(name: str, depth: int, num_classes: int, frozen: bool = False) -> dict[str, Any]:
    """torchvision's state_dict with lively weights, float32."""
    from flaxdet.convert.lively import make_lively

    return make_lively(torch_detector(name, depth, num_classes, frozen)).state_dict()


def both(
    name: str,
    depth: int = 18,
    num_classes: int = 11,
    *,
    frozen: bool = False,
    dtype: str = "float32",
    **options: Any,
) -> tuple[FCOS | FasterRCNN, Any, Any]:
    """(our model, its variables, torchvision's model) with the same lively weights; x64 must fit the dtype."""
    theirs = torch_detector(name, depth, num_classes, frozen, **options)
    theirs.load_state_dict(lively_state_dict(name, depth, num_classes, frozen))
    ours = flax_detector(name, depth, num_classes, frozen, np.dtype(dtype).type, **options)
    variables = from_torchvision(ours, theirs.state_dict())
    if dtype == "float64":
        theirs = theirs.double()
    return ours, variables, theirs


@functools.cache
def photo(name: str) -> np.ndarray:
    """A real photo from a package: "grace_hopper" (portrait), "china" or "flower" (landscape); uint8 RGB."""
    if name == "grace_hopper":
        from matplotlib import cbook

        path = cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    else:
        import sklearn.datasets

        path = Path(sklearn.datasets.__file__).parent / "images" / f"{name}.jpg"
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def crop(name: str, rows: int, columns: int) -> np.ndarray:
    """The middle of a photo, resized to exactly this size."""
    image = Image.fromarray(photo(name))
    return np.asarray(image.resize((columns, rows)))
