"""The detectors."""

from flaxdet.models.faster_rcnn import FasterRCNN
from flaxdet.models.fcos import FCOS
from flaxdet.models.fcos_head import FCOSHead
from flaxdet.models.roi_heads import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from flaxdet.models.roi_pool import MultiScaleRoIAlign
from flaxdet.models.rpn import RPNHead

__all__ = [
    "FCOS",
    "FCOSHead",
    "FastRCNNConvFCHead",
    "FastRCNNPredictor",
    "FasterRCNN",
    "MultiScaleRoIAlign",
    "RPNHead",
    "TwoMLPHead",
]
