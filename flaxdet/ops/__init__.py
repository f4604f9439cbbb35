"""Pure functions on the arrays of one image: box algebra, anchors, NMS, RoIAlign, matching, losses.

Functions that torchvision.ops has too carry torchvision's names. All have static shapes and work under ``jit`` and
``vmap``, and under ``grad`` where a gradient exists. Every array argument may be a numpy array or nested lists.
"""

from flaxdet.ops.anchors import AnchorGenerator
from flaxdet.ops.boxes import (
    box_area,
    box_convert,
    clip_boxes_to_image,
    remove_small_boxes,
    resize_boxes,
)
from flaxdet.ops.coders import BoxCoder, BoxLinearCoder
from flaxdet.ops.iou import box_iou, complete_box_iou, distance_box_iou, generalized_box_iou
from flaxdet.ops.losses import (
    binary_cross_entropy_with_logits,
    complete_box_iou_loss,
    cross_entropy,
    distance_box_iou_loss,
    generalized_box_iou_loss,
    sigmoid_focal_loss,
    smooth_l1_loss,
)
from flaxdet.ops.matching import BELOW_LOW_THRESHOLD, BETWEEN_THRESHOLDS, fcos_match, match
from flaxdet.ops.nms import batched_nms, nms
from flaxdet.ops.roi_align import multiscale_roi_align, roi_align
from flaxdet.ops.sampling import balanced_sample

__all__ = [
    "BELOW_LOW_THRESHOLD",
    "BETWEEN_THRESHOLDS",
    "AnchorGenerator",
    "BoxCoder",
    "BoxLinearCoder",
    "balanced_sample",
    "batched_nms",
    "binary_cross_entropy_with_logits",
    "box_area",
    "box_convert",
    "box_iou",
    "clip_boxes_to_image",
    "complete_box_iou",
    "complete_box_iou_loss",
    "cross_entropy",
    "distance_box_iou",
    "distance_box_iou_loss",
    "fcos_match",
    "generalized_box_iou",
    "generalized_box_iou_loss",
    "match",
    "multiscale_roi_align",
    "nms",
    "remove_small_boxes",
    "resize_boxes",
    "roi_align",
    "sigmoid_focal_loss",
    "smooth_l1_loss",
]
