"""Faster R-CNN, after torchvision.models.detection.faster_rcnn.

Ren et al., "Faster R-CNN" (arXiv 1506.01497); v2's parts: Li et al., "Benchmarking Detection Transfer Learning
with Vision Transformers" (arXiv 2111.11429).
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import flax.linen as nn
from jaxtyping import Float

from flaxdet.models.detector import freeze_lists, no_detections
from flaxdet.models.labels import label_range
from flaxdet.models.losses import roi_losses, sample_proposals
from flaxdet.models.rcnn import RCNN
from flaxdet.models.roi_heads import FastRCNNPredictor, TwoMLPHead, postprocess_detections
from flaxdet.models.roi_pool import MultiScaleRoIAlign, pooled_channels
from flaxdet.nn.fpn import Features
from flaxdet.nn.layers import Array
from flaxdet.nn.options import check_counts, check_numbers
from flaxdet.nn.typed import SHARED_OPTIONS
from flaxdet.ops import BoxCoder
from flaxdet.structures import Detections, ImageBatch, Proposals, Targets

REPRESENTATION_SIZE = 1024


class FasterRCNN(RCNN):
    """Faster R-CNN on any backbone that returns named feature maps (torchvision's names and defaults).

    ``model.apply(variables, batch)`` is ``postprocess(box(propose(features)))``; each of these methods can be
    called alone by ``method=`` (``box`` also with custom proposals), and each array is sown in
    ``intermediates`` under its name: c2..c5, p2..p5, pool, objectness, pred_bbox_deltas, proposals,
    roi_features, class_logits, box_regression, class_scores. A stage of the body that has the name of a level is
    sown as body_NAME.

    Attributes:
        backbone: Linen module ``(pixels, *, canvas, train) -> {name: [B, h, w, C]}``, finest first, with an attribute
            ``out_channels``, C. It may return any mapping, or one map, which is called "0". It may leave out ``train``,
            and ``canvas`` if no canvas is smaller than its bucket.
        num_classes: k, number of classes, including the background; ``None`` if ``box_predictor`` is given.
        transform: how images are resized, normalised and padded.
        min_size, max_size, image_mean, image_std, size_divisible, fixed_size: torchvision's keywords, kept in
            ``transform``; see ``TransformConfig``.
        rpn_anchor_generator: generator of the anchors.
        rpn_head: module ``(features, extents) -> (objectness, deltas)`` as ``RPNHead``.
        rpn_pre_nms_top_n_train, rpn_pre_nms_top_n_test: candidates kept per level before NMS.
        rpn_post_nms_top_n_train, rpn_post_nms_top_n_test: R, proposals kept per image.
        rpn_nms_thresh: IoU above which the RPN's NMS suppresses a box.
        rpn_fg_iou_thresh: IoU from which an anchor is positive.
        rpn_bg_iou_thresh: IoU below which an anchor is negative.
        rpn_batch_size_per_image: number of anchors sampled per image in training.
        rpn_positive_fraction: largest fraction of positives among the sampled anchors.
        rpn_score_thresh: lowest objectness score (sigmoid) of a proposal.
        box_roi_pool: the ``MultiScaleRoIAlign`` that pools the proposals.
        box_head: module [R, h, w, C] -> [R, D], e.g. ``FastRCNNConvFCHead`` or ``TwoMLPHead``.
        box_predictor: module [R, D] -> (logits [R, k], offsets [R, k * 4]).
        box_score_thresh: detections have scores above this threshold.
        box_nms_thresh: IoU above which the final NMS, within each class, suppresses a box.
        box_detections_per_img: K, detection slots per image.
        box_fg_iou_thresh: IoU from which a proposal is positive.
        box_bg_iou_thresh: IoU below which a proposal is background.
        box_batch_size_per_image: number of proposals sampled per image in training.
        box_positive_fraction: largest fraction of positives among the sampled proposals.
        bbox_reg_weights: weights of the offsets (dx, dy, dw, dh); default (10, 10, 5, 5).
        trainable_backbone_layers: number of backbone layers that train, 0 to 5, counted from the last stage; the
            optimiser's mask reads it.
        dtype: dtype of the computation; boxes, scores and NMS are in float32 at least. ``dtype``, ``param_dtype`` and
            ``precision`` apply to the parts that the constructor makes. A part that is passed keeps the options of the
            part; a warning names the part if these differ from the options of the model.
        param_dtype: dtype of the parameters; default float64 if ``dtype`` is float64, else float32.
        precision: ``jax.lax.Precision`` of every convolution and matrix product.

    Raises:
        ValueError: for a backbone without out_channels; for both or neither of num_classes and box_predictor; for an
            rpn_head with another number of anchors per location than the generator; for an option out of range.
        TypeError: for a backbone, anchor generator, RoI pooling or option of another kind.
    """

    box_roi_pool: MultiScaleRoIAlign | None = None
    box_head: nn.Module | None = None
    box_predictor: nn.Module | None = None
    box_score_thresh: float = 0.05
    box_nms_thresh: float = 0.5
    box_detections_per_img: int = 100
    box_fg_iou_thresh: float = 0.5
    box_bg_iou_thresh: float = 0.5
    box_batch_size_per_image: int = 512
    box_positive_fraction: float = 0.25
    bbox_reg_weights: tuple[float, float, float, float] | None = None

    _own_stages = frozenset(
        (
            "objectness",
            "pred_bbox_deltas",
            "proposals",
            "roi_features",
            "class_logits",
            "box_regression",
            "class_scores",
        )
    )
    class_part = "box_predictor"
    torch_parts = MappingProxyType(
        {
            "backbone": "backbone",
            "rpn_head": "rpn.head",
            "box_head": "roi_heads.box_head",
            "box_predictor": "roi_heads.box_predictor",
        }
    )
    loss_names = ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg")
    score_field = "box_score_thresh"

    def __post_init__(self) -> None:
        object.__setattr__(self, "bbox_reg_weights", freeze_lists(self.bbox_reg_weights))
        self._check_box_options()
        # Flax clones this module with num_classes and the predictor that was made here, which agree
        agree = getattr(self.box_predictor, "num_classes", None) == self.num_classes
        if self.num_classes is not None and self.box_predictor is not None and not agree:
            raise ValueError("num_classes should be None when box_predictor is specified")
        super().__post_init__()

    def _check_box_options(self) -> None:
        if self.num_classes is not None:
            check_counts(self, 2, "num_classes")  # the background is one
        elif self.box_predictor is None:
            raise ValueError("num_classes should not be None when box_predictor is not specified")
        check_counts(self, 1, "box_batch_size_per_image")
        check_counts(self, 0, "box_detections_per_img")
        check_numbers(self, "box_score_thresh", "box_nms_thresh")
        self._check_sampling("box")
        self._check_type("box_roi_pool", MultiScaleRoIAlign)
        if self.bbox_reg_weights is not None:
            try:
                _ = self.box_coder
            except (TypeError, ValueError) as error:
                raise ValueError(f"FasterRCNN: bbox_reg_weights: {error}") from None

    def _default_parts(self) -> dict[str, Callable[[], Any]]:
        options: dict[str, Any] = {name: getattr(self, name) for name in SHARED_OPTIONS} | {"parent": None}
        pool = self.box_roi_pool or MultiScaleRoIAlign()
        inputs = pooled_channels(self.backbone.out_channels, pool.output_size)
        parts = super()._default_parts() | {
            "box_roi_pool": MultiScaleRoIAlign,
            "box_head": lambda: TwoMLPHead(inputs, REPRESENTATION_SIZE, **options),
        }
        classes = self.num_classes
        if classes is not None:  # otherwise the user gives the predictor
            parts["box_predictor"] = lambda: FastRCNNPredictor(REPRESENTATION_SIZE, classes, **options)
        return parts

    @property
    def box_coder(self) -> BoxCoder:
        """The coder of the box head's offsets."""
        return BoxCoder((10.0, 10.0, 5.0, 5.0) if self.bbox_reg_weights is None else self.bbox_reg_weights)

    @property
    def target_labels(self) -> range:
        """The labels that a ground-truth box may have, 1..k-1: label 0 is the background.

        There is no upper bound if a custom ``box_predictor`` has no attribute ``num_classes``.
        """
        num_classes = getattr(self.box_predictor, "num_classes", None) if self.num_classes is None else self.num_classes
        return label_range(num_classes, background=True)

    def detect(self, features: Features, proposals: Proposals, batch: ImageBatch, *, train: bool = False) -> Detections:
        """Runs the box branch and keeps the best boxes: ``box``, then ``postprocess``.

        Args:
            features: feature maps of the backbone.
            proposals: boxes in the pixels of the resized images, from ``propose`` or custom.
            batch: the images.
            train: whether BatchNorm is in training mode.

        Returns:
            Detections in the pixels of the resized images.
        """
        class_logits, box_regression = self.box(features, proposals, batch, train=train)
        return self.postprocess(class_logits, box_regression, proposals, batch)

    def box(
        self, features: Features, proposals: Proposals, batch: ImageBatch, *, train: bool = False
    ) -> tuple[Float[Array, "B R k"], Float[Array, "B R k*4"]]:
        """Pools the proposals and classifies them.

        Args:
            features: feature maps of the backbone.
            proposals: boxes in the pixels of the resized images, from ``propose`` or custom.
            batch: the images.
            train: whether BatchNorm is in training mode.

        Returns:
            Class logits [B, R, k] and box offsets [B, R, k * 4].
        """
        pooled, *outputs = self.roi_branch("box", features, proposals, batch, train=train)
        shape = (*proposals.valid.shape, -1)
        class_logits, box_regression = (x.reshape(shape).astype(self.box_dtype) for x in outputs)
        self.sow_all({"roi_features": pooled, "class_logits": class_logits, "box_regression": box_regression})
        return class_logits, box_regression

    def postprocess(
        self,
        class_logits: Float[Array, "B R k"],
        box_regression: Float[Array, "B R k*4"],
        proposals: Proposals,
        batch: ImageBatch,
    ) -> Detections:
        """Computes scores, decodes boxes and runs NMS.

        Args:
            class_logits: logits of each proposal and class.
            box_regression: offsets of each proposal and class.
            proposals: the boxes that the offsets refer to, in the pixels of the resized images.
            batch: the images, whose sizes are read.

        Returns:
            Detections in the pixels of the resized images.
        """
        if self.is_initializing():
            return no_detections(len(batch.size), self.box_detections_per_img, self.box_dtype)
        self.sow_all({"class_scores": nn.softmax(class_logits, axis=-1)})
        return postprocess_detections(
            class_logits,
            box_regression,
            proposals,
            batch.size,
            coder=self.box_coder,
            score_thresh=self.box_score_thresh,
            nms_thresh=self.box_nms_thresh,
            detections_per_img=self.box_detections_per_img,
        )

    def roi_losses(
        self, features: Features, proposals: Proposals, batch: ImageBatch, targets: Targets, keys: Array, *, train: bool
    ) -> tuple[dict[str, Float[Array, ""]], range]:
        """The losses of the box branch, on sampled proposals.

        Args:
            features: feature maps of the backbone.
            proposals: proposals of the RPN.
            batch: the images.
            targets: ground truth in the pixels of the resized images.
            keys: [B] random keys of the sampling.
            train: whether BatchNorm is in training mode.

        Returns:
            {"loss_classifier", "loss_box_reg"}, and the labels for which the class layer has an output.
        """
        sampled, labels, boxes = sample_proposals(proposals, targets, keys, self._sampling("box"))
        class_logits, box_regression = self.box(features, sampled, batch, train=train)
        losses = roi_losses(class_logits, box_regression, sampled, labels, boxes, self.box_coder)
        return losses, label_range(class_logits.shape[-1], background=True)
