"""fasterrcnn_resnet50_fpn_v2, after torchvision.models.detection.faster_rcnn: builder, weights, parts.

The parts of version 2: Li et al., "Benchmarking Detection Transfer Learning with Vision Transformers" (arXiv
2111.11429).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from flaxdet.models.faster_rcnn import FasterRCNN
from flaxdet.models.rcnn import default_anchor_generator
from flaxdet.models.roi_heads import FastRCNNConvFCHead
from flaxdet.models.rpn import RPNHead
from flaxdet.nn.extra_levels import LastLevelMaxPool
from flaxdet.nn.fpn import BackboneWithFPN, FeaturePyramidNetwork
from flaxdet.registry import Architecture, Keys, Training, register
from flaxdet.zoo.build import build
from flaxdet.zoo.categories import COCO_CATEGORIES
from flaxdet.zoo.keys import DEEPER_BODY, FASTER_RCNN, OTHER_BRANCHES, OTHER_FASTER_RCNN, RESNET50
from flaxdet.zoo.torch_resnet import resnet50
from flaxdet.zoo.weights import ObjectDetection, ResNet50_Weights, Weights, WeightsEnum

CONVS, SMALL_CONVS = 4, 2  # convolutions of the box head, and in the small form


class FasterRCNN_ResNet50_FPN_V2_Weights(WeightsEnum):  # noqa: N801  (torchvision's name)
    """Weights for ``flaxdet.fasterrcnn_resnet50_fpn_v2``."""

    COCO_V1 = Weights(
        url="https://download.pytorch.org/models/fasterrcnn_resnet50_fpn_v2_coco-dd69338a.pth",
        preset=ObjectDetection(),
        meta={
            "categories": list(COCO_CATEGORIES),
            "min_size": (1, 1),
            "num_params": 43_712_278,
            "recipe": "https://github.com/pytorch/vision/pull/5763",
            "_metrics": {"COCO-val2017": {"box_map": 46.7}},
            "_ops": 280.371,
            "_file_size": 167.104,
            "_docs": "Trained on COCO by a long schedule with large-scale jitter, which raises the accuracy.",
        },
    )
    DEFAULT = COCO_V1


def _make(num_classes: int, body: Any, shared: dict[str, Any], *, small: bool, **fields: Any) -> FasterRCNN:
    norms: dict[str, Any] = {"use_norm": True, "freeze_bn": body.freeze_bn, **shared}
    fpn = FeaturePyramidNetwork(256, LastLevelMaxPool(), **norms)
    anchors = default_anchor_generator()
    return FasterRCNN(
        BackboneWithFPN(body, fpn),
        num_classes,
        rpn_anchor_generator=anchors,
        rpn_head=RPNHead(256, anchors.num_anchors_per_location()[0], conv_depth=2, **shared),
        box_head=FastRCNNConvFCHead((256, 7, 7), (256,) * (SMALL_CONVS if small else CONVS), (1024,), **norms),
        **shared,
        **fields,
    )


def _in_torch(norm_layer: Any, layers: int, num_classes: int, *, small: bool, **options: Any) -> Any:
    from torch.nn import BatchNorm2d
    from torchvision.models.detection import faster_rcnn
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor

    body = resnet50(norm_layer, small=small)
    convs = [256] * (SMALL_CONVS if small else CONVS)
    return faster_rcnn.FasterRCNN(
        _resnet_fpn_extractor(body, layers, norm_layer=BatchNorm2d),
        num_classes=num_classes,
        rpn_anchor_generator=faster_rcnn._default_anchorgen(),
        rpn_head=faster_rcnn.RPNHead(256, 3, conv_depth=2),
        box_head=faster_rcnn.FastRCNNConvFCHead((256, 7, 7), convs, [1024], norm_layer=BatchNorm2d),
        **options,
    )


ARCHITECTURE = register(
    Architecture(
        name="fasterrcnn_resnet50_fpn_v2",
        title="Faster R-CNN v2 with a ResNet-50-FPN backbone",
        kind=FasterRCNN,
        make=_make,
        weights=FasterRCNN_ResNet50_FPN_V2_Weights,
        keys=Keys(
            present=RESNET50
            | FASTER_RCNN
            | frozenset(
                {
                    "backbone.fpn.layer_blocks.3.1.weight",
                    "rpn.head.conv.1.0.weight",
                    "roi_heads.box_head.3.1.weight",
                    "roi_heads.box_head.5.weight",
                }
            ),
            absent=DEEPER_BODY | OTHER_BRANCHES,
            class_key="roi_heads.box_predictor.cls_score.weight",
            relative=OTHER_FASTER_RCNN,
        ),
        # torchvision: 32 devices with 2 images each, large-scale jitter, fixed crops, BatchNorm over the global batch
        training=Training(
            lr=0.1,
            batch_size=64,
            epochs=400,
            milestones=(352, 384),
            weight_decay=4e-5,
            fine_tuning_lr=0.08,
            alias="fasterrcnn_v2_recipe",
            data={"flip": 0.5, "jitter": (0.1, 2.0), "crop": (1024, 1024)},
        ),
        in_torch=_in_torch,
        comparison="flaxdet.zoo.torch_faster_rcnn",
        made_parts=("rpn_anchor_generator", "rpn_head", "box_head"),
    )
)


def fasterrcnn_resnet50_fpn_v2(
    *,
    weights: FasterRCNN_ResNet50_FPN_V2_Weights | str | None = None,
    progress: bool = True,
    num_classes: int | None = None,
    weights_backbone: ResNet50_Weights | str | None = None,
    trainable_backbone_layers: int | None = None,
    key: jax.Array | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    precision: Any = None,
    freeze_bn: bool = False,
    remat: bool = False,
    **kwargs: Any,
) -> tuple[FasterRCNN, dict[str, Any]]:
    """Faster R-CNN v2 with a ResNet-50-FPN (torchvision.models.detection.fasterrcnn_resnet50_fpn_v2).

    BatchNorm is live in the backbone, the pyramid and the box head.

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
        freeze_bn: in training, BatchNorm of the backbone, the pyramid and the box head normalises with the running
            statistics and does not update them (an addition to torchvision).
        remat: rematerialises each residual block of the ResNet in the backward pass: less memory, more time (see
            ``flaxdet.nn.ResNet``).
        **kwargs: fields of ``flaxdet.FasterRCNN``, under torchvision's names.

    Returns:
        The model and its variables {"params": ..., "batch_stats": ...}.

    Raises:
        TypeError: for an unknown keyword, or for a part that this builder makes (rpn_anchor_generator, rpn_head,
            box_head).
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
