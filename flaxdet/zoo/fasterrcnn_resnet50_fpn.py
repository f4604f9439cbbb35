"""fasterrcnn_resnet50_fpn, after torchvision.models.detection.faster_rcnn: builder, weights, parts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from flaxdet.models.faster_rcnn import FasterRCNN
from flaxdet.nn.extra_levels import LastLevelMaxPool
from flaxdet.nn.fpn import BackboneWithFPN, FeaturePyramidNetwork
from flaxdet.registry import Architecture, Keys, Training, register
from flaxdet.zoo.build import build
from flaxdet.zoo.categories import COCO_CATEGORIES
from flaxdet.zoo.keys import DEEPER_BODY, FASTER_RCNN, OTHER_BRANCHES, OTHER_FASTER_RCNN, RESNET50
from flaxdet.zoo.torch_resnet import resnet50
from flaxdet.zoo.weights import REFERENCES, ObjectDetection, ResNet50_Weights, Weights, WeightsEnum


class FasterRCNN_ResNet50_FPN_Weights(WeightsEnum):  # noqa: N801  (torchvision's name)
    """Weights for ``flaxdet.fasterrcnn_resnet50_fpn``."""

    COCO_V1 = Weights(
        url="https://download.pytorch.org/models/fasterrcnn_resnet50_fpn_coco-258fb6c6.pth",
        preset=ObjectDetection(),
        meta={
            "categories": list(COCO_CATEGORIES),
            "min_size": (1, 1),
            "num_params": 41_755_286,
            "recipe": f"{REFERENCES}/detection#faster-r-cnn-resnet-50-fpn",
            "_metrics": {"COCO-val2017": {"box_map": 37.0}},
            "_ops": 134.38,
            "_file_size": 159.743,
            "_docs": "Trained on COCO by a recipe close to the paper's.",
        },
        # only these weights were trained when FrozenBatchNorm2d had no eps yet (torchvision's overwrite_eps)
        options={"norm_eps": 0.0},
    )
    DEFAULT = COCO_V1


def _make(num_classes: int, body: Any, shared: dict[str, Any], *, small: bool, **fields: Any) -> FasterRCNN:
    del small  # the body alone is smaller
    fpn = FeaturePyramidNetwork(256, LastLevelMaxPool(), **shared)
    return FasterRCNN(BackboneWithFPN(body, fpn), num_classes, **shared, **fields)


def _in_torch(norm_layer: Any, layers: int, num_classes: int, *, small: bool, **options: Any) -> Any:
    from torchvision.models.detection import FasterRCNN as TheirFasterRCNN
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor

    body = resnet50(norm_layer, small=small)
    return TheirFasterRCNN(_resnet_fpn_extractor(body, layers), num_classes=num_classes, **options)


ARCHITECTURE = register(
    Architecture(
        name="fasterrcnn_resnet50_fpn",
        title="Faster R-CNN with a ResNet-50-FPN backbone",
        kind=FasterRCNN,
        make=_make,
        weights=FasterRCNN_ResNet50_FPN_Weights,
        keys=Keys(
            present=RESNET50
            | FASTER_RCNN
            | frozenset(
                {
                    "backbone.fpn.layer_blocks.3.0.weight",
                    "rpn.head.conv.0.0.weight",
                    "roi_heads.box_head.fc6.weight",
                    "roi_heads.box_head.fc7.weight",
                }
            ),
            absent=DEEPER_BODY
            | OTHER_BRANCHES
            | frozenset({"backbone.fpn.layer_blocks.3.1.weight", "rpn.head.conv.1.0.weight"}),
            class_key="roi_heads.box_predictor.cls_score.weight",
            relative=OTHER_FASTER_RCNN,
        ),
        # torchvision's references: 8 devices with 2 images each
        training=Training(
            lr=0.02,
            batch_size=16,
            epochs=26,
            milestones=(16, 22),
            weight_decay=1e-4,
            fine_tuning_lr=0.02,
        ),
        in_torch=_in_torch,
        comparison="flaxdet.zoo.torch_faster_rcnn",
        freezable=True,
    )
)


def fasterrcnn_resnet50_fpn(
    *,
    weights: FasterRCNN_ResNet50_FPN_Weights | str | None = None,
    progress: bool = True,
    num_classes: int | None = None,
    weights_backbone: ResNet50_Weights | str | None = ResNet50_Weights.IMAGENET1K_V1,
    trainable_backbone_layers: int | None = None,
    key: jax.Array | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    precision: Any = None,
    freeze_bn: bool = False,
    remat: bool = False,
    **kwargs: Any,
) -> tuple[FasterRCNN, dict[str, Any]]:
    """Faster R-CNN with a ResNet-50-FPN (torchvision.models.detection.fasterrcnn_resnet50_fpn).

    As in torchvision, the backbone's BatchNorm is frozen if anything is pretrained, and live otherwise. With
    ``weights="COCO_V1"``, and only then, FrozenBatchNorm adds no eps to the variance.

    Args:
        weights: weights of the whole model: a member of the weight enum or the name of a member ("COCO_V1",
            "DEFAULT"). Downloaded on first use.
        progress: shows a progress bar while downloading.
        num_classes: number of classes, including the background; default 91. With ``weights``, only the number of
            classes of the weights is accepted.
        weights_backbone: ImageNet weights of the ResNet-50; unused if ``weights`` are given.
        trainable_backbone_layers: number of backbone layers that train, counted from the last stage: 0 (none) to 5
            (all); default 3. Always 5 if nothing is pretrained.
        key: random key of the initialisation; default ``jax.random.key(0)``.
        dtype: dtype of the computation; boxes, scores and NMS are in float32 at least.
        param_dtype: dtype of the parameters; default float64 if ``dtype`` is float64, else float32.
        precision: ``jax.lax.Precision`` of every convolution and matrix product.
        freeze_bn: in training, live BatchNorm normalises with the running statistics and does not update them (an
            addition to torchvision).
        remat: rematerialises each residual block of the ResNet in the backward pass: less memory, more time (see
            ``flaxdet.nn.ResNet``).
        **kwargs: fields of ``flaxdet.FasterRCNN``, under torchvision's names.

    Returns:
        The model and its variables {"params": ..., "batch_stats": ...}.

    Raises:
        TypeError: for an unknown keyword.
        ValueError: for a ``num_classes`` that doesn't match the weights, ``trainable_backbone_layers`` outside 0..5,
            an unknown name of weights, or float64 without jax's 64-bit mode.
        flaxdet.files.download.DownloadError: if weights can't be downloaded.
    """
    return build(
        ARCHITECTURE,
        weights,
        ResNet50_Weights.verify(weights_backbone),
        progress=progress,
        num_classes=num_classes,
        trainable_backbone_layers=trainable_backbone_layers,
        key=key,
        dtype=dtype,
        param_dtype=param_dtype,
        precision=precision,
        freeze_bn=freeze_bn,
        remat=remat,
        **kwargs,
    )
