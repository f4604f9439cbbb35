"""Modules that hold parameters and know nothing of detection."""

from flaxdet.nn.fpn import BackboneWithFPN, FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7
from flaxdet.nn.norm import BatchNorm, FrozenBatchNorm, GroupNorm
from flaxdet.nn.resnet import ResNet

__all__ = [
    "BackboneWithFPN",
    "BatchNorm",
    "FeaturePyramidNetwork",
    "FrozenBatchNorm",
    "GroupNorm",
    "LastLevelMaxPool",
    "LastLevelP6P7",
    "ResNet",
]
