"""fcos_resnet50_fpn, after torchvision.models.detection.fcos: builder, weights, parts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from flaxdet.models.fcos import FCOS
from flaxdet.models.fcos_head import FCOSHead
from flaxdet.nn.extra_levels import LastLevelP6P7
from flaxdet.nn.fpn import BackboneWithFPN, FeaturePyramidNetwork
from flaxdet.registry import Architecture, Keys, Training, register
from flaxdet.zoo.build import build
from flaxdet.zoo.categories import COCO_CATEGORIES
from flaxdet.zoo.keys import DEEPER_BODY, RESNET50
from flaxdet.zoo.torch_resnet import resnet50
from flaxdet.zoo.weights import REFERENCES, ObjectDetection, ResNet50_Weights, Weights, WeightsEnum

SMALL_CONVS = 1  # convolutions of each branch of the head in the small form


class FCOS_ResNet50_FPN_Weights(WeightsEnum):  # noqa: N801  (torchvision's name)
    """Weights for ``flaxdet.fcos_resnet50_fpn``."""

    COCO_V1 = Weights(
        url="https://download.pytorch.org/models/fcos_resnet50_fpn_coco-99b0c9b7.pth",
        preset=ObjectDetection(),
        meta={
            "num_params": 32_269_600,
            "categories": list(COCO_CATEGORIES),
            "min_size": (1, 1),
            "recipe": f"{REFERENCES}/detection#fcos-resnet-50-fpn",
            "_metrics": {"COCO-val2017": {"box_map": 39.2}},
            "_ops": 128.207,
            "_file_size": 123.608,
            "_docs": "Trained on COCO by a recipe close to the paper's.",
        },
    )
    DEFAULT = COCO_V1


def _make(num_classes: int, body: Any, shared: dict[str, Any], *, small: bool, **fields: Any) -> FCOS:
    if small:
        fields.setdefault("head", FCOSHead(256, 1, num_classes, SMALL_CONVS, **shared))
    fpn = FeaturePyramidNetwork(256, LastLevelP6P7(256, 256, **shared), **shared)
    return FCOS(BackboneWithFPN(body, fpn, ("c3", "c4", "c5")), num_classes, **shared, **fields)


def _in_torch(norm_layer: Any, layers: int, num_classes: int, *, small: bool, **options: Any) -> Any:
    from torchvision.models import detection
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
    from torchvision.models.detection.fcos import FCOSHead as TheirFCOSHead
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7 as TheirLastLevelP6P7

    if small:
        options.setdefault("head", TheirFCOSHead(256, 1, num_classes, SMALL_CONVS))
    body = resnet50(norm_layer, small=small)
    extra = TheirLastLevelP6P7(256, 256)
    backbone = _resnet_fpn_extractor(body, layers, returned_layers=[2, 3, 4], extra_blocks=extra)
    return detection.FCOS(backbone, num_classes, **options)


ARCHITECTURE = register(
    Architecture(
        name="fcos_resnet50_fpn",
        title="FCOS with a ResNet-50-FPN backbone",
        kind=FCOS,
        make=_make,
        weights=FCOS_ResNet50_FPN_Weights,
        keys=Keys(
            present=RESNET50
            | frozenset(
                {
                    "backbone.fpn.layer_blocks.2.0.weight",
                    "backbone.fpn.extra_blocks.p7.weight",
                    "head.classification_head.cls_logits.weight",
                    "head.regression_head.bbox_ctrness.weight",
                }
            ),
            absent=DEEPER_BODY | frozenset({"backbone.fpn.layer_blocks.3.0.weight"}),
            class_key="head.classification_head.cls_logits.weight",
            relative=(
                frozenset({"head.regression_head.bbox_ctrness.weight"}),
                "an FCOS with another backbone than ResNet-50-FPN",
            ),
        ),
        # torchvision's references: 8 devices with 2 images each, flips, mixed precision (``dtype=jnp.bfloat16``)
        training=Training(
            lr=0.01,
            batch_size=16,
            epochs=26,
            milestones=(16, 22),
            weight_decay=1e-4,
            fine_tuning_lr=0.01,
            alias="fcos_recipe",
        ),
        in_torch=_in_torch,
        comparison="flaxdet.zoo.torch_fcos",
        freezable=True,
        default=True,
    )
)


def fcos_resnet50_fpn(
    *,
    weights: FCOS_ResNet50_FPN_Weights | str | None = None,
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
) -> tuple[FCOS, dict[str, Any]]:
    """FCOS with a ResNet-50-FPN backbone (torchvision.models.detection.fcos_resnet50_fpn).

    As in torchvision, the backbone's BatchNorm is frozen if anything is pretrained, and live otherwise.

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
        **kwargs: fields of ``flaxdet.FCOS``, under torchvision's names.

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
