"""A tiny FCOS for tests and demonstrations: a narrow ResNet-18 body, three levels, two convolutions a branch.

It compiles in seconds. torchvision has no such builder; ``flaxdet.convert.reference_tiny`` builds the same network of
torchvision's parts. ``demo/`` holds weights of it that find blood cells, and two photos to find them in
(``benchmarks/train_demo.py`` trains the weights).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from flaxdet.models.fcos import FCOS
from flaxdet.models.fcos_head import FCOSHead
from flaxdet.nn.fpn import BackboneWithFPN, FeaturePyramidNetwork
from flaxdet.nn.resnet import ResNet
from flaxdet.ops import AnchorGenerator

NAME = "tiny_fcos"
DEPTH, WIDTH = 18, 8  # of the ResNet
CHANNELS, CONVS = 64, 2  # of each level, and of each branch of the head
STAGES = ("c3", "c4", "c5")
ANCHOR_SIZES = ((8,), (16,), (32,))
MIN_SIZE, MAX_SIZE = 256, 352

_DEMO = Path(__file__).parent / "demo"
DEMO_WEIGHTS = _DEMO / "blood_cells.safetensors"
DEMO_PHOTOS = (_DEMO / "BloodImage_00222.jpg", _DEMO / "BloodImage_00396.jpg")


def make_tiny_fcos(
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
) -> FCOS:
    """Makes the module, without variables.

    Args:
        num_classes: including the background.
        frozen_bn: ``FrozenBatchNorm`` in the body.
        trainable_backbone_layers: 0..5.
        dtype: computes.
        param_dtype: stores; default float64 if ``dtype`` is, else float32.
        precision: of every convolution and product.
        freeze_bn: keeps live BatchNorm as in evaluation while training.
        remat: in the gradient, computes each residual block of the ResNet again.
        **kwargs: fields of ``flaxdet.FCOS``, but backbone and head. Images are resized to 256 pixels, at most 352,
            unless ``min_size`` and ``max_size`` say otherwise.

    Returns:
        The model.

    Raises:
        TypeError: for an unknown keyword, a backbone or a head.
        ValueError: for an option out of range.
    """
    options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "precision": precision}
    body = ResNet(DEPTH, WIDTH, frozen_bn=frozen_bn, freeze_bn=freeze_bn, remat=remat, **options)
    kwargs.setdefault("min_size", MIN_SIZE)
    kwargs.setdefault("max_size", MAX_SIZE)
    kwargs.setdefault("anchor_generator", AnchorGenerator(ANCHOR_SIZES, ((1.0,),) * len(ANCHOR_SIZES)))
    return FCOS(
        BackboneWithFPN(body, FeaturePyramidNetwork(CHANNELS, **options), STAGES),
        num_classes,
        head=FCOSHead(CHANNELS, 1, num_classes, CONVS, **options),
        trainable_backbone_layers=trainable_backbone_layers,
        **options,
        **kwargs,
    )
