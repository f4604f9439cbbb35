"""Modules that hold parameters and know nothing of detection."""

from flaxdet.nn.backbone import ConvNorm, Stage
from flaxdet.nn.extra_levels import LastLevelMaxPool, LastLevelP6P7
from flaxdet.nn.fpn import BackboneWithFPN, FeaturePyramidNetwork
from flaxdet.nn.norm import BatchNorm, FrozenBatchNorm, GroupNorm
from flaxdet.nn.resnet import ResNet

__all__ = [
    "BackboneWithFPN",
    "BatchNorm",
    "ConvNorm",
    "FeaturePyramidNetwork",
    "FrozenBatchNorm",
    "GroupNorm",
    "LastLevelMaxPool",
    "LastLevelP6P7",
    "ResNet",
    "Stage",
]
