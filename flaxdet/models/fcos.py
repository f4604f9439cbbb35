"""FCOS, after torchvision.models.detection.fcos.

Tian et al., "FCOS: A simple and strong anchor-free object detector" (arXiv 2006.09214).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float, Int

from flaxdet.models.dense import DenseDetector, DenseOutputs
from flaxdet.models.fcos_head import GROUPS, FCOSHead, check_groups
from flaxdet.models.losses import fcos_losses
from flaxdet.nn.layers import Array
from flaxdet.nn.options import check_numbers
from flaxdet.nn.typed import SHARED_OPTIONS
from flaxdet.ops import AnchorGenerator, BoxLinearCoder
from flaxdet.ops.matching import fcos_match
from flaxdet.structures import Targets


def default_anchor_generator() -> AnchorGenerator:
    """One square anchor a location: sizes 8 to 128, one a level."""
    sizes = ((8,), (16,), (32,), (64,), (128,))
    return AnchorGenerator(sizes, ((1.0,),) * len(sizes))


class FCOS(DenseDetector):
    """FCOS on any backbone that returns named feature maps (torchvision's FCOS, names and defaults).

    ``model.apply(variables, batch)`` is ``postprocess(head(features))``; each of these methods can be called
    alone by ``method=``, and each array is sown in ``intermediates`` under its name: c2..c5, p3..p7,
    cls_logits, bbox_regression, bbox_ctrness. A body's stage of the name of a pyramid's level is sown as body_NAME.

    Attributes:
        backbone: Linen module ``(pixels, *, canvas, train) -> {name: [B, h, w, C]}``, finest first, with an attribute
            ``out_channels``, C. It may return any mapping, or one map, which is called "0". It may leave out ``train``,
            and ``canvas`` if no canvas is smaller than its bucket.
        num_classes: including the background; a channel of the head is a label.
        transform: how images are resized, normalised and padded.
        min_size, max_size, image_mean, image_std, size_divisible, fixed_size: torchvision's keywords, kept in
            ``transform``; see ``TransformConfig``.
        anchor_generator: one anchor a location, whose size is the unit of distances.
        head: module ``(features, extents) -> outputs`` as ``FCOSHead``.
        center_sampling_radius: in anchor sizes, for the training assignment.
        score_thresh: keeps scores above it.
        nms_thresh: IoU above which NMS suppresses.
        detections_per_img: K, detection slots of an image.
        topk_candidates: candidates kept per level before NMS.
        trainable_backbone_layers: 0..5, read by the optimiser's mask.
        dtype: computes. Boxes, scores and NMS are float32 at least. This and the next two hold for the parts made here;
            a part that is given keeps its own, and a warning names it where that differs from what is asked for here.
        param_dtype: stores; default float64 if ``dtype`` is, else float32.
        precision: of every convolution and product.

    Raises:
        ValueError: for a backbone without out_channels, or whose out_channels the default head can't take; more than
            one anchor a location; a head of another number of classes; an option out of range.
        TypeError: for a backbone, anchor generator or option of another kind.
    """

    center_sampling_radius: float = 1.5
    score_thresh: float = 0.2
    nms_thresh: float = 0.6
    detections_per_img: int = 100
    topk_candidates: int = 1000

    _own_stages = frozenset(("cls_logits", "bbox_regression", "bbox_ctrness"))
    loss_names = ("classification", "bbox_regression", "bbox_ctrness")

    def __post_init__(self) -> None:
        check_numbers(self, "center_sampling_radius", low=0)
        super().__post_init__()
        for level, anchors in enumerate(self._anchors().num_anchors_per_location()):
            if anchors != 1:
                raise ValueError(
                    f"anchor_generator.num_anchors_per_location()[{level}] should be 1 instead of {anchors}"
                )
        anchors = getattr(self.head, "num_anchors", 1)
        if anchors != 1:
            raise ValueError(f"head has num_anchors={anchors}, and FCOS has one anchor a location")

    def _default_parts(self) -> dict[str, Callable[[], Any]]:
        channels, classes = self.backbone.out_channels, self.num_classes
        options = {name: getattr(self, name) for name in SHARED_OPTIONS}
        parts: dict[str, Callable[[], Any]] = {"anchor_generator": default_anchor_generator}
        if channels % GROUPS == 0:  # the head of another backbone is its user's
            parts["head"] = lambda: FCOSHead(channels, 1, classes or 0, **options, parent=None)
        elif self.head is None:
            owner = f"backbone {type(self.backbone).__name__}: out_channels of a backbone for FCOS's default head"
            check_groups(owner, channels)
        return parts

    @property
    def box_coder(self) -> BoxLinearCoder:
        """Of the distances to the sides of a box, in units of the anchor's size."""
        return BoxLinearCoder(normalize_by_size=True)

    def scores(self, outputs: DenseOutputs) -> Float[Array, "n k"]:
        """sqrt(class score * centerness), both sigmoids.

        Args:
            outputs: of the head, at n locations of one image.

        Returns:
            [n, k], in 0..1.
        """
        return jnp.sqrt(nn.sigmoid(outputs["cls_logits"]) * nn.sigmoid(outputs["bbox_ctrness"]))

    def match(
        self, anchors: Array, admitted: Array, boxes: Array, valid: Array, counts: tuple[int, ...]
    ) -> Int[Array, " N"]:
        """Center sampling (``ops.fcos_match``) by ``center_sampling_radius``.

        Args:
            anchors: [N, 4] xyxy in pixels, of all levels of one image.
            admitted: [N], True for anchors inside the canvas.
            boxes: [G, 4] xyxy in the pixels of the resized image, the ground truth.
            valid: [G], True for slots with a box.
            counts: number of anchors of each level.

        Returns:
            [N] index of each anchor's box, or -1.
        """
        radius = self.center_sampling_radius
        return fcos_match(anchors, boxes, counts, center_sampling_radius=radius, valid_gt=valid, valid=admitted)

    def matched_losses(
        self, outputs: DenseOutputs, anchors: Array, admitted: Array, matched: Array, targets: Targets
    ) -> dict[str, Float[Array, ""]]:
        """The losses of FCOS's three outputs; see ``losses.fcos_losses``.

        Args:
            outputs: of the head.
            anchors: [B, N, 4] xyxy in pixels of each canvas, of all levels.
            admitted: [B, N], True for anchors inside the canvas.
            matched: [B, N], of ``match``.
            targets: ground truth in the pixels of the resized images.

        Returns:
            {"classification", "bbox_regression", "bbox_ctrness"}.
        """
        return fcos_losses(outputs, anchors, admitted, matched, targets, self.box_coder)
