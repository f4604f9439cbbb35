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
    """One square anchor per location; sizes 8 to 128 pixels, one per level."""
    sizes = ((8,), (16,), (32,), (64,), (128,))
    return AnchorGenerator(sizes, ((1.0,),) * len(sizes))


class FCOS(DenseDetector):
    """FCOS on any backbone that returns named feature maps (torchvision's FCOS, names and defaults).

    ``model.apply(variables, batch)`` is ``postprocess(head(features))``; each of these methods can be called
    alone by ``method=``, and each array is sown in ``intermediates`` under its name: c2..c5, p3..p7,
    cls_logits, bbox_regression, bbox_ctrness. A stage of the body that has the name of a level is sown as body_NAME.

    Attributes:
        backbone: Linen module ``(pixels, *, canvas, train) -> {name: [B, h, w, C]}``, finest first, with an attribute
            ``out_channels``, C. It may return any mapping, or one map, which is called "0". It may leave out ``train``,
            and ``canvas`` if no canvas is smaller than its bucket.
        num_classes: k, number of classes, including the background; channel c of the head belongs to label c.
        transform: how images are resized, normalised and padded.
        min_size, max_size, image_mean, image_std, size_divisible, fixed_size: torchvision's keywords, kept in
            ``transform``; see ``TransformConfig``.
        anchor_generator: generator of one anchor per location. The size of the anchor is the unit of the distances.
        head: module ``(features, extents) -> outputs`` as ``FCOSHead``.
        center_sampling_radius: radius of center sampling in training, in anchor sizes.
        score_thresh: detections have scores above this threshold.
        nms_thresh: IoU above which NMS, within each class, suppresses a box.
        detections_per_img: K, detection slots per image.
        topk_candidates: candidates kept per level before NMS.
        trainable_backbone_layers: number of backbone layers that train, 0 to 5, counted from the last stage; the
            optimiser's mask reads it.
        dtype: dtype of the computation; boxes, scores and NMS are in float32 at least. ``dtype``, ``param_dtype`` and
            ``precision`` apply to the parts that the constructor makes. A part that is passed keeps the options of the
            part; a warning names the part if these differ from the options of the model.
        param_dtype: dtype of the parameters; default float64 if ``dtype`` is float64, else float32.
        precision: ``jax.lax.Precision`` of every convolution and matrix product.

    Raises:
        ValueError: for a backbone without out_channels, or with out_channels that the default head can't take; for
            more than one anchor per location; for a head of another number of classes; for an option out of range.
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
        if channels % GROUPS == 0:  # for other channels the user gives the head
            parts["head"] = lambda: FCOSHead(channels, 1, classes or 0, **options, parent=None)
        elif self.head is None:
            owner = f"backbone {type(self.backbone).__name__}: out_channels of a backbone for FCOS's default head"
            check_groups(owner, channels)
        return parts

    @property
    def box_coder(self) -> BoxLinearCoder:
        """The coder of the distances to the sides of a box, in units of the anchor's size."""
        return BoxLinearCoder(normalize_by_size=True)

    def scores(self, outputs: DenseOutputs) -> Float[Array, "n k"]:
        """sqrt(class score * centerness), both sigmoids.

        Args:
            outputs: outputs of the head at n locations of one image.

        Returns:
            [n, k], in 0..1.
        """
        return jnp.sqrt(nn.sigmoid(outputs["cls_logits"]) * nn.sigmoid(outputs["bbox_ctrness"]))

    def match(
        self, anchors: Array, admitted: Array, boxes: Array, valid: Array, counts: tuple[int, ...]
    ) -> Int[Array, " N"]:
        """Center sampling (``ops.fcos_match``) with ``center_sampling_radius``.

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
        """The losses of the three outputs of FCOS's head (``fcos_losses`` in ``models/losses.py``).

        Args:
            outputs: outputs of the head.
            anchors: [B, N, 4] xyxy in pixels of each canvas, of all levels.
            admitted: [B, N], True for anchors inside the canvas.
            matched: [B, N], for each image the result of ``match``.
            targets: ground truth in the pixels of the resized images.

        Returns:
            {"classification", "bbox_regression", "bbox_ctrness"}.
        """
        return fcos_losses(outputs, anchors, admitted, matched, targets, self.box_coder)
