"""Faster R-CNN, after torchvision.models.detection.faster_rcnn.

Ren et al., "Faster R-CNN" (arXiv 1506.01497); v2's parts: Li et al., "Benchmarking Detection Transfer Learning
with Vision Transformers" (arXiv 2111.11429).
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from flaxdet.models.backbones import check_backbone
from flaxdet.models.detector import (
    Detector,
    batch_anchors,
    call_part,
    feature_extents,
    freeze_lists,
    level_shapes,
    whole_extents,
)
from flaxdet.models.labels import check_targets, label_range, refuse_labels
from flaxdet.models.losses import roi_losses, rpn_losses, sample_proposals
from flaxdet.models.roi_heads import FastRCNNPredictor, TwoMLPHead, postprocess_detections
from flaxdet.models.roi_pool import MultiScaleRoIAlign, pooled_channels
from flaxdet.models.rpn import RPNHead, filter_proposals
from flaxdet.nn.fpn import Features
from flaxdet.nn.layers import Array
from flaxdet.nn.options import check_counts, check_numbers
from flaxdet.nn.typed import SHARED_OPTIONS
from flaxdet.ops import AnchorGenerator, BoxCoder
from flaxdet.structures import Detections, ImageBatch, Proposals, Targets

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
    roi_features, class_logits, box_regression, class_scores. A body's stage of the name of a pyramid's level is
    sown as body_NAME.

    Attributes:
        backbone: Linen module ``(pixels, *, canvas, train) -> {name: [B, h, w, C]}``, finest first, with an attribute
            ``out_channels``, C. It may return any mapping, or one map, which is called "0". It may leave out ``train``,
            and ``canvas`` if no canvas is smaller than its bucket.
        num_classes: k, including the background; ``None`` where ``box_predictor`` is given.
        transform: how images are resized, normalised and padded.
        min_size, max_size, image_mean, image_std, size_divisible, fixed_size: torchvision's keywords, kept in
            ``transform``; see ``TransformConfig``.
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
        dtype: computes. Boxes, scores and NMS are float32 at least. This and the next two hold for the parts made here;
            a part that is given keeps its own, and a warning names it where that differs from what is asked for here.
        param_dtype: stores; default float64 if ``dtype`` is, else float32.
        precision: of every convolution and product.

    Raises:
        ValueError: for a backbone without out_channels; for both or neither of num_classes and box_predictor; for an
            rpn_head of another number of anchors; for an option out of range.
        TypeError: for a backbone, anchor generator, RoI pooling or option of another kind.
    """

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
        self._check_options()
        for name, kind in (("rpn_anchor_generator", AnchorGenerator), ("box_roi_pool", MultiScaleRoIAlign)):
            value = getattr(self, name)
            if not isinstance(value, (kind, type(None))):
                raise TypeError(f"{name} should be of type {kind.__name__} or None instead of {type(value)}")
        check_backbone(self)
        if self.num_classes is None and self.box_predictor is None:
            raise ValueError("num_classes should not be None when box_predictor is not specified")
        # Flax clones this module with both given, the predictor being the one made here: they agree
        agree = getattr(self.box_predictor, "num_classes", None) == self.num_classes
        if self.num_classes is not None and self.box_predictor is not None and not agree:
            raise ValueError("num_classes should be None when box_predictor is specified")
        self._fill_in_parts()
        anchors = self.rpn_anchor_generator.num_anchors_per_location()  # pyright: ignore[reportOptionalMemberAccess]
        if isinstance(self.rpn_head, RPNHead) and set(anchors) != {self.rpn_head.num_anchors}:
            raise ValueError(
                "rpn_anchor_generator should have as many anchors a location on every level as the rpn_head predicts, "
                f"num_anchors={self.rpn_head.num_anchors}, and has {anchors}"
            )
        super().__post_init__()

    def _check_options(self) -> None:
        if self.num_classes is not None:
            check_counts(self, 2, "num_classes")  # the background is one
        check_counts(self, 1, "rpn_pre_nms_top_n_test", "rpn_post_nms_top_n_test", "box_batch_size_per_image")
        # without proposals the box head still trains on the ground truth
        check_counts(self, 0, "rpn_pre_nms_top_n_train", "rpn_post_nms_top_n_train", "rpn_batch_size_per_image")
        check_counts(self, 0, "box_detections_per_img", "trainable_backbone_layers")
        check_numbers(self, "rpn_score_thresh", "rpn_nms_thresh", "box_score_thresh", "box_nms_thresh")
        for part in ("rpn", "box"):
            check_numbers(self, f"{part}_positive_fraction", low=0, high=1)
            names = f"{part}_bg_iou_thresh", f"{part}_fg_iou_thresh"
            check_numbers(self, *names)
            low, high = (getattr(self, name) for name in names)
            if low > high:
                raise ValueError(f"FasterRCNN: {names[0]} should not exceed {names[1]}, got {low} and {high}")
        if self.bbox_reg_weights is not None:
            try:
                _ = self.box_coder
            except (TypeError, ValueError) as error:
                raise ValueError(f"FasterRCNN: bbox_reg_weights: {error}") from None

    def _default_parts(self) -> dict[str, Callable[[], Any]]:
        options: dict[str, Any] = {name: getattr(self, name) for name in SHARED_OPTIONS} | {"parent": None}
        channels = self.backbone.out_channels
        anchors = self.rpn_anchor_generator or default_anchor_generator()
        pool = self.box_roi_pool or MultiScaleRoIAlign()
        inputs = pooled_channels(channels, pool.output_size)
        parts: dict[str, Callable[[], Any]] = {
            "rpn_anchor_generator": default_anchor_generator,
            "rpn_head": lambda: RPNHead(channels, anchors.num_anchors_per_location()[0], **options),
            "box_roi_pool": MultiScaleRoIAlign,
            "box_head": lambda: TwoMLPHead(inputs, REPRESENTATION_SIZE, **options),
        }
        classes = self.num_classes
        if classes is not None:  # else the predictor is the user's
            parts["box_predictor"] = lambda: FastRCNNPredictor(REPRESENTATION_SIZE, classes, **options)
        return parts

    @property
    def target_labels(self) -> range:
        """The labels that a ground-truth box may have, 1..k-1: label 0 is the background.

        Without an upper bound where a ``box_predictor`` of one's own has no attribute ``num_classes``.
        """
        num_classes = getattr(self.box_predictor, "num_classes", None) if self.num_classes is None else self.num_classes
        return label_range(num_classes, background=True)

    def __call__(
        self,
        batch: ImageBatch,
        targets: Targets | None = None,
        *,
        train: bool = False,
        with_detections: bool = False,
    ) -> Any:
        """Detects, or computes the losses.

        Args:
            batch: images from ``flaxdet.transform``.
            targets: ground truth in the pixels of the resized images; needs ``rngs={"sampling": key}``.
            train: BatchNorm's mode (``mutable=["batch_stats"]`` then keeps its statistics) and the RPN's numbers of
                candidates. Targets with ``train=False`` give validation losses.
            with_detections: with targets, return the detections too, those of test-time proposals.

        Returns:
            Without targets: ``Detections`` in the pixels of the resized images. With targets: torchvision's losses
            {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}, or the pair (losses,
            detections). Under jit, all losses and their gradients are NaN if the label of a valid box is not one of
            ``target_labels``.

        Raises:
            ValueError: for such a label outside of jit.
        """
        features = self.features(batch, train=train)
        shapes = level_shapes(features)
        objectness, deltas = self.rpn(features, batch)
        losses = {}
        if targets is not None:
            keys = jax.random.split(self.make_rng("sampling"), (2, batch.size.shape[0]))
            proposals = self.filter_proposals(objectness, deltas, batch, shapes, train=train)
            losses = self.compute_loss(features, objectness, deltas, proposals, batch, targets, keys, train=train)
            if not with_detections:
                return losses
            train = False
        proposals = self.filter_proposals(objectness, deltas, batch, shapes, train=train)
        self.sow_all({"proposals": proposals})
        class_logits, box_regression = self.box(features, proposals, batch, train=train)
        detections = self.postprocess(class_logits, box_regression, proposals, batch)
        return detections if targets is None else (losses, detections)

    def rpn(self, features: Features, batch: ImageBatch) -> tuple[list[Array], list[Array]]:
        """Runs the RPN's head.

        Args:
            features: of the backbone.
            batch: the images that they belong to.

        Returns:
            Per level the objectness logits [B, hwA] and the offsets [B, hwA, 4].
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
        return objectness, deltas

    def propose(self, features: Features, batch: ImageBatch, *, train: bool = False) -> Proposals:
        """Runs the region proposal network.

        Args:
            features: of the backbone.
            batch: the images that they belong to.
            train: takes the training numbers of candidates and proposals.

        Returns:
            Proposals in the pixels of the resized images.
        """
        objectness, deltas = self.rpn(features, batch)
        return self.filter_proposals(objectness, deltas, batch, level_shapes(features), train=train)

    def filter_proposals(
        self,
        objectness: list[Array],
        deltas: list[Array],
        batch: ImageBatch,
        shapes: tuple[tuple[int, int], ...],
        *,
        train: bool = False,
    ) -> Proposals:
        """The best boxes of the RPN's outputs.

        Args:
            objectness: logits [B, hwA] of each level.
            deltas: offsets [B, hwA, 4] of each level.
            batch: the images that they belong to.
            shapes: (h, w) of each level's map.
            train: takes the training numbers of candidates and proposals.

        Returns:
            Proposals in the pixels of the resized images.
        """
        assert self.rpn_anchor_generator is not None
        return filter_proposals(
            objectness,
            deltas,
            self.rpn_anchor_generator,
            shapes,
            batch.size,
            *whole_extents(batch, shapes),
            pre_nms_top_n=self.rpn_pre_nms_top_n_train if train else self.rpn_pre_nms_top_n_test,
            post_nms_top_n=self.rpn_post_nms_top_n_train if train else self.rpn_post_nms_top_n_test,
            nms_thresh=self.rpn_nms_thresh,
            score_thresh=self.rpn_score_thresh,
        )

    def compute_loss(
        self,
        features: Features,
        objectness: list[Array],
        deltas: list[Array],
        proposals: Proposals,
        batch: ImageBatch,
        targets: Targets,
        keys: Array,
        *,
        train: bool,
    ) -> dict[str, Float[Array, ""]]:
        """The losses of the RPN and of the box head.

        Args:
            features: of the backbone.
            objectness: logits [B, hwA] of each level, of the RPN's head.
            deltas: offsets [B, hwA, 4] of each level, of the RPN's head.
            proposals: what the box head trains on is sampled from these and the ground truth.
            batch: the images.
            targets: ground truth in the pixels of the resized images.
            keys: [2, B] random keys, of the RPN's and the box head's sampling.
            train: BatchNorm's mode in the box head.

        Returns:
            {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}; all NaN, as are their gradients,
            if the label of a valid box is not one of ``target_labels`` and under jit.

        Raises:
            ValueError: for such a label outside of jit.
        """
        check_targets(targets.labels, targets.valid, self.target_labels)
        assert self.rpn_anchor_generator is not None
        anchors, admitted = batch_anchors(self.rpn_anchor_generator, batch, level_shapes(features), self.box_dtype)
        proposal_losses = rpn_losses(
            jnp.concatenate(objectness, axis=1),
            jnp.concatenate(deltas, axis=1),
            anchors,
            admitted,
            targets,
            keys[0],
            fg_iou_thresh=self.rpn_fg_iou_thresh,
            bg_iou_thresh=self.rpn_bg_iou_thresh,
            batch_size_per_image=self.rpn_batch_size_per_image,
            positive_fraction=self.rpn_positive_fraction,
        )
        sampled, labels, boxes = sample_proposals(
            proposals,
            targets,
            keys[1],
            fg_iou_thresh=self.box_fg_iou_thresh,
            bg_iou_thresh=self.box_bg_iou_thresh,
            batch_size_per_image=self.box_batch_size_per_image,
            positive_fraction=self.box_positive_fraction,
        )
        class_logits, box_regression = self.box(features, sampled, batch, train=train)
        losses = roi_losses(class_logits, box_regression, sampled, labels, boxes, self.box_coder)
        allowed = label_range(class_logits.shape[-1], background=True)
        return refuse_labels(losses | proposal_losses, targets, allowed)

    @property
    def box_coder(self) -> BoxCoder:
        """Of the box head's offsets."""
        weights = (10.0, 10.0, 5.0, 5.0) if self.bbox_reg_weights is None else self.bbox_reg_weights
        return BoxCoder(weights)  # pyright: ignore[reportArgumentType]

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
        boxes, strides = proposals.boxes.astype(self.box_dtype), getattr(self.backbone, "level_strides", None)
        pooled = call_part(self.box_roi_pool, features, boxes, batch, role="box_roi_pool", strides=strides)
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
            Detections in the pixels of the resized images.
        """
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
