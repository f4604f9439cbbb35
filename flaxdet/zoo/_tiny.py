"""A tiny FCOS for tests and demonstrations: a narrow ResNet-18 body, three levels, two convolutions per branch.

The model compiles in seconds. torchvision has no such builder, so the keys of a state_dict never identify this model.
``demo/`` holds weights that find blood cells, and two photos of blood cells (``benchmarks/train_demo.py`` trains the
weights).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flaxdet.models.fcos import FCOS
from flaxdet.models.fcos_head import FCOSHead
from flaxdet.nn.fpn import BackboneWithFPN, FeaturePyramidNetwork
from flaxdet.nn.resnet import ResNet
from flaxdet.ops import AnchorGenerator
from flaxdet.registry import Architecture, Training, register

NAME = "tiny_fcos"
WIDTH = 8  # channels of the ResNet's stem
CHANNELS, CONVS = 64, 2  # channels of each pyramid level, convolutions of each branch of the head
ANCHOR_SIZES = ((8,), (16,), (32,))
SIZES = {"min_size": 256, "max_size": 352}

_DEMO = Path(__file__).parent / "demo"
DEMO_WEIGHTS = _DEMO / "blood_cells.safetensors"
DEMO_PHOTOS = (_DEMO / "BloodImage_00222.jpg", _DEMO / "BloodImage_00396.jpg")


def _make_body(*, small: bool, **options: Any) -> ResNet:
    del small  # there is only one form
    return ResNet(18, width=WIDTH, **options)


def _make(num_classes: int, body: Any, shared: dict[str, Any], *, small: bool, **fields: Any) -> FCOS:
    del small
    return FCOS(
        BackboneWithFPN(body, FeaturePyramidNetwork(CHANNELS, **shared), ("c3", "c4", "c5")),
        num_classes,
        head=FCOSHead(CHANNELS, 1, num_classes, CONVS, **shared),
        anchor_generator=AnchorGenerator(ANCHOR_SIZES, ((1.0,),) * len(ANCHOR_SIZES)),
        **shared,
        **{**SIZES, **fields},
    )


def _in_torch(norm_layer: Any, layers: int, num_classes: int, *, small: bool, **options: Any) -> Any:
    """torchvision's FCOS on a narrow ResNet-18. torchvision's ResNet-18 has width 64, so its layers are replaced."""
    del small
    from torch import nn
    from torchvision.models import detection, resnet
    from torchvision.models.detection import anchor_utils, backbone_utils, fcos

    body: Any = resnet.resnet18(weights=None, norm_layer=norm_layer)
    body.inplanes = WIDTH
    body.conv1 = nn.Conv2d(3, WIDTH, kernel_size=7, stride=2, padding=3, bias=False)
    body.bn1 = norm_layer(WIDTH)
    for i in range(4):
        stage = body._make_layer(resnet.BasicBlock, WIDTH * 2**i, 2, stride=1 if i == 0 else 2)
        setattr(body, f"layer{i + 1}", stage)
    for module in body.modules():
        if isinstance(module, nn.Conv2d):  # the initialisation in the constructor of torchvision's ResNet
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    trained = ("layer4", "layer3", "layer2", "layer1", "conv1", "bn1")[: 6 if layers == 5 else layers]
    for name, parameter in body.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    returned = {f"layer{i}": str(i - 2) for i in (2, 3, 4)}
    channels = [WIDTH * 2**i for i in (1, 2, 3)]
    backbone = backbone_utils.BackboneWithFPN(body, returned, channels, CHANNELS)
    backbone.fpn.extra_blocks = None  # the constructor's default adds a level
    anchors = anchor_utils.AnchorGenerator(ANCHOR_SIZES, ((1.0,),) * len(ANCHOR_SIZES))
    head = fcos.FCOSHead(CHANNELS, 1, num_classes, num_convs=CONVS)
    return detection.FCOS(backbone, num_classes, head=head, anchor_generator=anchors, **{**SIZES, **options})


ARCHITECTURE = register(
    Architecture(
        name=NAME,
        title="A tiny FCOS with a narrow ResNet-18-FPN backbone",
        kind=FCOS,
        make=_make,
        weights=None,
        keys=None,
        # benchmarks/train_demo.py trains the demonstration's weights in this way, with AdamW
        training=Training(
            lr=2e-3,
            batch_size=4,
            epochs=40,
            milestones=(),
            weight_decay=1e-4,
            fine_tuning_lr=0.0025,
        ),
        in_torch=_in_torch,
        comparison="flaxdet.zoo.torch_fcos",
        make_body=_make_body,
        made_parts=("anchor_generator", "head"),
        freezable=True,
        private=True,
    )
)
