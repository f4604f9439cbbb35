"""Faster R-CNN, after torchvision.models.detection.faster_rcnn.

Ren et al., "Faster R-CNN" (arXiv 1506.01497); v2's parts: Li et al., "Benchmarking Detection Transfer Learning
with Vision Transformers" (arXiv 2111.11429).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from flaxdet.models.detector import Detector, call_part, feature_extents, level_shapes, whole_extents
from flaxdet.models.roi_heads import (
    FastRCNNPredictor,
    MultiScaleRoIAlign,
    TwoMLPHead,
    pooled_channels,
    postprocess_detections,
)
from flaxdet.models.rpn import RPNHead, filter_proposals
from flaxdet.nn.fpn import Features
from flaxdet.nn.layers import Array, Dtype, Precision
from flaxdet.ops import AnchorGenerator, BoxCoder
from flaxdet.structures import Detections, ImageBatch, Proposals

REPRESENTATION_SIZE = 1024


def default_anchor_generator() -> AnchorGenerator:
    """Sizes 32 to 512, one a level, in the shapes 1:2, 1:1 and 2:1 (height to width .5, 1, 2)."""
    sizes = ((32,), (64,), (128,), (256,), (512,))
    return AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))


class FasterRCNN(Detector):
    """Faster R-CNN on any backbone that returns named feature maps (torchvision's names and defaults).

    ``model.apply(variables, batch)`` is ``postprocess(box(propose(features)))``; each of these methods can be
    called alone by ``method=`` (``box`` also with proposals of the user's own), and each array is sown in
    ``intermediates`` under its name: c2..c5, p2..p5, pool, objectness, pred_bbox_deltas, proposals,
    roi_features, class_logits, box_regression, class_scores.

    Attributes:
        backbone: Linen module ``(pixels, *, canvas, train) -> {name: [B, h, w, C]}`` with an attribute
            ``out_channels``; it may leave out ``train``, and ``canvas`` if no canvas is smaller than its bucket.
        num_classes: k, including the background; ``None`` where ``box_predictor`` is given.
        min_size, max_size, image_mean, image_std, size_divisible, fixed_size: see ``TransformConfig``.
        rpn_anchor_generator: the anchors.
        rpn_head: module ``(features, extents) -> (objectness, deltas)`` as ``RPNHead``.
        rpn_pre_nms_top_n_train, rpn_pre_nms_top_n_test: candidates kept a level before NMS.
        rpn_post_nms_top_n_train, rpn_post_nms_top_n_test: R, proposals kept an image.
        rpn_nms_thresh: IoU above which the RPN's NMS suppresses.
        rpn_fg_iou_thresh, rpn_bg_iou_thresh: IoU from which an anchor is positive, below which negative.
        rpn_batch_size_per_image, rpn_positive_fraction: the RPN's sampling in training.
        rpn_score_thresh: keeps proposals of at least this objectness (sigmoid).
        box_roi_pool: ``MultiScaleRoIAlign``.
        box_head: module [R, h, w, C] -> [R, D], e.g. ``FastRCNNConvFCHead`` or ``TwoMLPHead``.
        box_predictor: module [R, D] -> (logits [R, k], offsets [R, k * 4]).
        box_score_thresh: keeps detections above it.
        box_nms_thresh: IoU above which the final NMS suppresses.
        box_detections_per_img: K, detection slots of an image.
        box_fg_iou_thresh, box_bg_iou_thresh: IoU from which a proposal is positive, below which negative.
        box_batch_size_per_image, box_positive_fraction: the box head's sampling in training.
        bbox_reg_weights: of the offsets (dx, dy, dw, dh); default (10, 10, 5, 5).
        trainable_backbone_layers: 0..5, read by the optimiser's mask.
        dtype: computes. Boxes, scores and NMS are float32 at least.
        param_dtype: stores; default float64 if ``dtype`` is, else float32.
        precision: of every convolution and product.

    Raises:
        ValueError: for a backbone without out_channels; for both or neither of num_classes and box_predictor.
        TypeError: for an anchor generator or RoI pooling of another kind.
    """

    backbone: nn.Module
    num_classes: int | None = None
    min_size: int | tuple[int, ...] = 800
    max_size: int = 1333
    image_mean: tuple[float, ...] | None = None
    image_std: tuple[float, ...] | None = None
    rpn_anchor_generator: AnchorGenerator | None = None
    rpn_head: nn.Module | None = None
    rpn_pre_nms_top_n_train: int = 2000
    rpn_pre_nms_top_n_test: int = 1000
    rpn_post_nms_top_n_train: int = 2000
    rpn_post_nms_top_n_test: int = 1000
    rpn_nms_thresh: float = 0.7
    rpn_fg_iou_thresh: float = 0.7
    rpn_bg_iou_thresh: float = 0.3
    rpn_batch_size_per_image: int = 256
    rpn_positive_fraction: float = 0.5
    rpn_score_thresh: float = 0.0
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
    bbox_reg_weights: tuple[float, ...] | None = None
    size_divisible: int = 32
    fixed_size: tuple[int, int] | None = None
    trainable_backbone_layers: int = 5
    dtype: Dtype = jnp.float32
    param_dtype: Dtype | None = None
    precision: Precision = None

    def __post_init__(self) -> None:
        for name, kind in (("rpn_anchor_generator", AnchorGenerator), ("box_roi_pool", MultiScaleRoIAlign)):
            value = getattr(self, name)
            if not isinstance(value, (kind, type(None))):
                raise TypeError(f"{name} should be of type {kind.__name__} or None instead of {type(value)}")
        if self.num_classes is None and self.box_predictor is None:
            raise ValueError("num_classes should not be None when box_predictor is not specified")
        # Flax clones this module with both given, the predictor being the one made here: they agree
        agree = getattr(self.box_predictor, "num_classes", None) == self.num_classes
        if self.num_classes is not None and self.box_predictor is not None and not agree:
            raise ValueError("num_classes should be None when box_predictor is specified")
        if hasattr(self.backbone, "out_channels"):
            self._fill_in_parts(self.backbone.out_channels)  # pyright: ignore[reportAttributeAccessIssue]
        super().__post_init__()

    def _fill_in_parts(self, out_channels: int) -> None:
        options: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "precision": self.precision,
            "parent": None,
        }
        anchors = self.rpn_anchor_generator or default_anchor_generator()
        pool = self.box_roi_pool or MultiScaleRoIAlign()
        inputs = pooled_channels(out_channels, pool.output_size)
        defaults = {
            "rpn_anchor_generator": lambda: anchors,
            "rpn_head": lambda: RPNHead(out_channels, anchors.num_anchors_per_location()[0], **options),
            "box_roi_pool": lambda: pool,
            "box_head": lambda: TwoMLPHead(inputs, REPRESENTATION_SIZE, **options),
            "box_predictor": lambda: FastRCNNPredictor(REPRESENTATION_SIZE, self.num_classes or 0, **options),
        }
        for name, make in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, make())

    def __call__(self, batch: ImageBatch, *, train: bool = False) -> Detections:
        """Detects.

        Args:
            batch: images from ``flaxdet.transform``.
            train: BatchNorm's mode.

        Returns:
            Detections in the pixels of the resized images.
        """
        features = self.features(batch, train=train)
        proposals = self.propose(features, batch, train=train)
        class_logits, box_regression = self.box(features, proposals, batch, train=train)
        return self.postprocess(class_logits, box_regression, proposals, batch)

    def propose(self, features: Features, batch: ImageBatch, *, train: bool = False) -> Proposals:
        """Runs the region proposal network.

        Args:
            features: of the backbone.
            batch: the images that they belong to.
            train: takes the training numbers of candidates and proposals.

        Returns:
            Proposals in the pixels of the resized images.
        """
        objectness, deltas = call_part(
            self.rpn_head, features, role="rpn_head", extents=feature_extents(features, batch)
        )
        objectness = [x.astype(self.box_dtype) for x in objectness]
        deltas = [x.astype(self.box_dtype) for x in deltas]
        self.sow_all(
            {
                "objectness": jnp.concatenate(objectness, axis=1),
                "pred_bbox_deltas": jnp.concatenate(deltas, axis=1),
            }
        )
        shapes = level_shapes(features)
        canvas, extents = whole_extents(batch, shapes)
        assert self.rpn_anchor_generator is not None
        proposals = filter_proposals(
            objectness,
            deltas,
            self.rpn_anchor_generator,
            shapes,
            batch.size,
            canvas,
            extents,
            pre_nms_top_n=self.rpn_pre_nms_top_n_train if train else self.rpn_pre_nms_top_n_test,
            post_nms_top_n=self.rpn_post_nms_top_n_train if train else self.rpn_post_nms_top_n_test,
            nms_thresh=self.rpn_nms_thresh,
            score_thresh=self.rpn_score_thresh,
        )
        self.sow_all({"proposals": proposals})
        return proposals

    def box(
        self, features: Features, proposals: Proposals, batch: ImageBatch, *, train: bool = False
    ) -> tuple[Float[Array, "B R k"], Float[Array, "B R k*4"]]:
        """Pools the proposals and classifies them.

        Args:
            features: of the backbone.
            proposals: boxes in the pixels of the resized images, of ``propose`` or one's own.
            batch: the images.
            train: BatchNorm's mode.

        Returns:
            Class logits [B, R, k] and box offsets [B, R, k * 4].
        """
        assert self.box_roi_pool is not None
        count, slots = proposals.valid.shape
        pooled = self.box_roi_pool(features, proposals.boxes.astype(self.box_dtype), batch)
        self.sow_all({"roi_features": pooled})
        vectors = call_part(
            self.box_head,
            pooled.reshape(count * slots, *pooled.shape[2:]),
            role="box_head",
            train=train,
            mask=proposals.valid.reshape(-1),
        )
        outputs = call_part(self.box_predictor, vectors, role="box_predictor", train=train)
        class_logits, box_regression = (x.reshape(count, slots, -1).astype(self.box_dtype) for x in outputs)
        self.sow_all({"class_logits": class_logits, "box_regression": box_regression})
        return class_logits, box_regression

    def postprocess(
        self,
        class_logits: Float[Array, "B R k"],
        box_regression: Float[Array, "B R k*4"],
        proposals: Proposals,
        batch: ImageBatch,
    ) -> Detections:
        """Scores, decodes and suppresses.

        Args:
            class_logits: of each proposal.
            box_regression: offsets of each proposal and class.
            proposals: the boxes that the offsets refer to, in the pixels of the resized images.
            batch: the images (sizes are read).

        Returns:
            Detections in the pixels of the resized images; ``overflow`` is never set.
        """
        self.sow_all({"class_scores": nn.softmax(class_logits, axis=-1)})
        return postprocess_detections(
            class_logits,
            box_regression,
            proposals,
            batch.size,
            coder=BoxCoder(self.bbox_reg_weights or (10.0, 10.0, 5.0, 5.0)),  # pyright: ignore[reportArgumentType]
            score_thresh=self.box_score_thresh,
            nms_thresh=self.box_nms_thresh,
            detections_per_img=self.box_detections_per_img,
        )
