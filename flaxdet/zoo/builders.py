"""torchvision's two builders."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from flaxdet.convert.state_dict import backbone_from_torchvision, from_torchvision
from flaxdet.models.detector import example_batch
from flaxdet.models.faster_rcnn import FasterRCNN, default_anchor_generator
from flaxdet.models.fcos import FCOS
from flaxdet.models.roi_heads import FastRCNNConvFCHead
from flaxdet.models.rpn import RPNHead
from flaxdet.nn.extra_levels import LastLevelMaxPool, LastLevelP6P7
from flaxdet.nn.fpn import BackboneWithFPN, FeaturePyramidNetwork
from flaxdet.nn.resnet import ResNet
from flaxdet.xla.devices import platform_of
from flaxdet.zoo.weights import FasterRCNN_ResNet50_FPN_V2_Weights, FCOS_ResNet50_FPN_Weights, ResNet50_Weights

Variables = dict[str, Any]

NUM_COCO_CLASSES = 91
# Set by the builders themselves, so not to be passed through **kwargs.
OWN_FIELDS = {"backbone", "num_classes", "trainable_backbone_layers", "dtype", "param_dtype", "precision"}
OWN_PARTS = {
    "fcos_resnet50_fpn": (),
    "fasterrcnn_resnet50_fpn_v2": ("rpn_anchor_generator", "rpn_head", "box_head"),
}
BUILDERS = {"fcos_resnet50_fpn": FCOS, "fasterrcnn_resnet50_fpn_v2": FasterRCNN}


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
) -> tuple[FCOS, Variables]:
    """FCOS with a ResNet-50-FPN backbone (torchvision.models.detection.fcos_resnet50_fpn).

    As in torchvision, BatchNorm is frozen where anything is pretrained, and live otherwise.

    Args:
        weights: of the whole model; a member or its name ("COCO_V1", "DEFAULT"). Downloaded on first use.
        progress: shows a bar while downloading.
        num_classes: including the background; default 91. With ``weights`` only their own number.
        weights_backbone: ImageNet weights of the ResNet-50; not used where ``weights`` are given.
        trainable_backbone_layers: 0 (none) to 5 (all), counted from the last stage; default 3. With nothing
            pretrained always 5.
        key: of the random initialisation; default ``jax.random.key(0)``.
        dtype: computes; boxes, scores and NMS are float32 at least.
        param_dtype: stores; default float64 if ``dtype`` is, else float32.
        precision: of every convolution and product.
        freeze_bn: keeps live BatchNorm as in evaluation while training (an addition to torchvision).
        remat: for the gradient, computes each residual block of the ResNet again: less memory, more time (see
            ``flaxdet.nn.ResNet``).
        **kwargs: fields of ``flaxdet.FCOS``, under torchvision's names.

    Returns:
        The model and its variables {"params": ..., "batch_stats": ...}.

    Raises:
        TypeError: for an unknown keyword.
        ValueError: for a number of classes that doesn't fit the weights, layers outside 0..5, an unknown
            name of weights, or float64 without jax's 64-bit mode.
        flaxdet.zoo.weights.DownloadError: if weights can't be downloaded.
    """
    detector_weights = FCOS_ResNet50_FPN_Weights.verify(weights)
    body_weights = ResNet50_Weights.verify(weights_backbone)
    return _build(
        "fcos_resnet50_fpn",
        detector_weights,
        body_weights,
        progress,
        num_classes,
        trainable_backbone_layers,
        key,
        {
            "dtype": dtype,
            "param_dtype": param_dtype,
            "precision": precision,
            "freeze_bn": freeze_bn,
            "remat": remat,
            **kwargs,
        },
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
) -> tuple[FasterRCNN, Variables]:
    """Faster R-CNN v2 with a ResNet-50-FPN (torchvision.models.detection.fasterrcnn_resnet50_fpn_v2).

    BatchNorm is live in the backbone, the pyramid and the box head.

    Args:
        weights: of the whole model; a member or its name ("COCO_V1", "DEFAULT"). Downloaded on first use.
        progress: shows a bar while downloading.
        num_classes: including the background; default 91. With ``weights`` only their own number.
        weights_backbone: ImageNet weights of the ResNet-50; not used where ``weights`` are given.
        trainable_backbone_layers: 0 (none) to 5 (all), counted from the last stage; default 3. With nothing
            pretrained always 5.
        key: of the random initialisation; default ``jax.random.key(0)``.
        dtype: computes; boxes, scores and NMS are float32 at least.
        param_dtype: stores; default float64 if ``dtype`` is, else float32.
        precision: of every convolution and product.
        freeze_bn: keeps BatchNorm, in the backbone, the pyramid and the box head, as in evaluation while training (an
            addition to torchvision).
        remat: for the gradient, computes each residual block of the ResNet again: less memory, more time (see
            ``flaxdet.nn.ResNet``).
        **kwargs: fields of ``flaxdet.FasterRCNN``, under torchvision's names.

    Returns:
        The model and its variables {"params": ..., "batch_stats": ...}.

    Raises:
        TypeError: for an unknown keyword, or one of the parts that this builder makes itself
            (rpn_anchor_generator, rpn_head, box_head).
        ValueError: for a number of classes that doesn't fit the weights, layers outside 0..5, an unknown
            name of weights, or float64 without jax's 64-bit mode.
        flaxdet.zoo.weights.DownloadError: if weights can't be downloaded.
    """
    detector_weights = FasterRCNN_ResNet50_FPN_V2_Weights.verify(weights)
    body_weights = ResNet50_Weights.verify(weights_backbone)
    return _build(
        "fasterrcnn_resnet50_fpn_v2",
        detector_weights,
        body_weights,
        progress,
        num_classes,
        trainable_backbone_layers,
        key,
        {
            "dtype": dtype,
            "param_dtype": param_dtype,
            "precision": precision,
            "freeze_bn": freeze_bn,
            "remat": remat,
            **kwargs,
        },
    )


def _build(
    builder: str,
    weights: Any,
    weights_backbone: Any,
    progress: bool,
    num_classes: int | None,
    trainable_backbone_layers: int | None,
    key: jax.Array | None,
    options: dict[str, Any],
) -> tuple[Any, Variables]:
    if weights is not None:
        weights_backbone = None
        expected = len(weights.meta["categories"])
        if num_classes not in (None, expected):
            raise ValueError(
                f"The parameter 'num_classes' expected value {expected} but got {num_classes} instead "
                f"({weights} were trained on {expected} classes)."
            )
        num_classes = expected
    elif num_classes is None:
        num_classes = NUM_COCO_CLASSES
    is_trained = weights is not None or weights_backbone is not None
    layers = _validate_trainable_layers(is_trained, trainable_backbone_layers)
    model = make_model(
        builder,
        num_classes=num_classes,
        frozen_bn=builder == "fcos_resnet50_fpn" and is_trained,
        trainable_backbone_layers=layers,
        **options,
    )
    if weights is not None:
        return model, from_torchvision(model, weights.get_state_dict(progress=progress))
    variables = initial_variables(model, jax.random.key(0) if key is None else key)
    if weights_backbone is not None:
        state_dict = weights_backbone.get_state_dict(progress=progress)
        variables = backbone_from_torchvision(model, variables, state_dict)
    return model, variables


def _validate_trainable_layers(is_trained: bool, layers: int | None, most: int = 5, default: int = 3) -> int:
    """torchvision's rule of the same name."""
    if not is_trained:
        if layers is not None:
            warnings.warn(
                "Changing trainable_backbone_layers has no effect if neither weights nor weights_backbone are "
                f"given: all {most} layers are trainable",
                stacklevel=4,
            )
        return most
    if layers is None:
        return default
    if not 0 <= layers <= most:
        raise ValueError(f"Trainable backbone layers should be in the range [0, {most}], got {layers}")
    return layers


def make_model(
    builder: str,
    *,
    num_classes: int,
    frozen_bn: bool = False,
    trainable_backbone_layers: int = 5,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    precision: Any = None,
    freeze_bn: bool = False,
    remat: bool = False,
    **kwargs: Any,
) -> FCOS | FasterRCNN:
    """The module that a builder returns, without variables.

    Args:
        builder: "fcos_resnet50_fpn" or "fasterrcnn_resnet50_fpn_v2".
        num_classes: including the background.
        frozen_bn: ``FrozenBatchNorm`` in the backbone (FCOS alone).
        trainable_backbone_layers: 0..5.
        dtype: computes.
        param_dtype: stores.
        precision: of every convolution and product.
        freeze_bn: keeps live BatchNorm as in evaluation while training.
        remat: in the gradient, computes each residual block of the ResNet again.
        **kwargs: fields of the model's class.

    Returns:
        The model.

    Raises:
        TypeError: for a keyword that is unknown or that the builder sets itself.
        ValueError: for an unknown builder, fewer than one class, or a frozen v2.
    """
    if builder not in BUILDERS:
        raise ValueError(f"unknown model {builder!r}; expected one of {', '.join(BUILDERS)}")
    for name in kwargs:
        if name in OWN_PARTS[builder]:
            raise TypeError(f"{builder}() got multiple values for keyword argument {name!r}: it makes its own")
        known = {field.name for field in dataclasses.fields(BUILDERS[builder])} - {"parent", "name"}
        if name not in known - OWN_FIELDS:
            taken = ", ".join(sorted(known - OWN_FIELDS - set(OWN_PARTS[builder])))
            raise TypeError(f"{builder}() got an unexpected keyword argument {name!r}; it takes {taken}")
    if num_classes < 1:
        raise ValueError(f"num_classes should be at least 1, got {num_classes}")
    options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "precision": precision}
    body = ResNet(50, frozen_bn=frozen_bn, freeze_bn=freeze_bn, remat=remat, **options)
    if builder == "fcos_resnet50_fpn":
        fpn = FeaturePyramidNetwork(256, LastLevelP6P7(256, 256, **options), **options)
        return FCOS(
            BackboneWithFPN(body, fpn, ("c3", "c4", "c5")),
            num_classes,
            trainable_backbone_layers=trainable_backbone_layers,
            **options,
            **kwargs,
        )
    if frozen_bn:
        raise ValueError("fasterrcnn_resnet50_fpn_v2 has live BatchNorm throughout: frozen_bn should be False")
    fpn = FeaturePyramidNetwork(256, LastLevelMaxPool(), use_norm=True, freeze_bn=freeze_bn, **options)
    anchors = default_anchor_generator()
    return FasterRCNN(
        BackboneWithFPN(body, fpn),
        num_classes,
        rpn_anchor_generator=anchors,
        rpn_head=RPNHead(256, anchors.num_anchors_per_location()[0], conv_depth=2, **options),
        box_head=FastRCNNConvFCHead((256, 7, 7), (256,) * 4, (1024,), use_norm=True, freeze_bn=freeze_bn, **options),
        trainable_backbone_layers=trainable_backbone_layers,
        **options,
        **kwargs,
    )


def initial_variables(model: FCOS | FasterRCNN, key: jax.Array) -> Variables:
    """Random variables as torchvision initialises them, module by module.

    Args:
        model: the detector.
        key: of the randomness.

    Returns:
        {"params": ..., "batch_stats": ...} in the model's ``param_dtype``.
    """
    if isinstance(jax.random.key_data(key), Tracer):  # under eval_shape or jit, where only those compile
        return _init(model, key)
    return _jitted_init(platform_of(key))(model, key)


def _init(model: FCOS | FasterRCNN, key: jax.Array) -> Variables:
    variables = model.init(key, example_batch())
    return {name: variables[name] for name in ("params", "batch_stats") if name in variables}


@functools.cache
def _jitted_init(backend: str) -> Callable[[FCOS | FasterRCNN, jax.Array], Variables]:
    # Hundreds of small random draws: on a CPU, optimising them takes longer than running them.
    options = {"xla_backend_optimization_level": 0} if backend == "cpu" else None
    return jax.jit(_init, static_argnums=0, compiler_options=options)
