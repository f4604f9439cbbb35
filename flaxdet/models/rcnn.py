"""Two-stage detectors: a region proposal network, and branches on the regions (pool, head and predictor each).

Faster R-CNN has the branch "box". The branches "mask" of Mask R-CNN and "keypoint" of Keypoint R-CNN would be built
from the same parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from flaxdet.models.backbones import check_backbone
from flaxdet.models.detector import Detector, call_part
from flaxdet.models.labels import check_targets, refuse_labels
from flaxdet.models.levels import Shapes, batch_anchors, feature_extents, filled_extents, level_shapes
from flaxdet.models.losses import Sampling, rpn_losses
from flaxdet.models.rpn import RPNHead, filter_proposals, no_proposals
from flaxdet.nn.fpn import Features
from flaxdet.nn.layers import Array
from flaxdet.nn.options import check_counts, check_numbers
from flaxdet.nn.typed import SHARED_OPTIONS
from flaxdet.ops import AnchorGenerator
from flaxdet.structures import Detections, ImageBatch, Proposals, Targets


def default_anchor_generator() -> AnchorGenerator:
    """Sizes 32 to 512 pixels, one per level, with the aspect ratios (height / width) 0.5, 1 and 2."""
    sizes = ((32,), (64,), (128,), (256,), (512,))
    return AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))


class RCNN(Detector):
    """Base of the two-stage detectors: backbone, RPN, then branches on the proposals.

    A subclass defines ``detect`` and ``roi_losses``, which call ``roi_branch`` for each branch.

    Attributes:
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

    def __post_init__(self) -> None:
        check_counts(self, 1, "rpn_pre_nms_top_n_test", "rpn_post_nms_top_n_test")
        # without proposals the branches still train on the ground truth
        check_counts(self, 0, "rpn_pre_nms_top_n_train", "rpn_post_nms_top_n_train", "rpn_batch_size_per_image")
        check_counts(self, 0, "trainable_backbone_layers")
        check_numbers(self, "rpn_score_thresh", "rpn_nms_thresh")
        self._check_sampling("rpn")
        self._check_type("rpn_anchor_generator", AnchorGenerator)
        check_backbone(self)
        self._fill_in_parts()
        anchors = self._anchors().num_anchors_per_location()
        if isinstance(self.rpn_head, RPNHead) and set(anchors) != {self.rpn_head.num_anchors}:
            raise ValueError(
                "rpn_anchor_generator should have as many anchors per location on every level as the rpn_head predicts,"
                f" num_anchors={self.rpn_head.num_anchors}, and has {anchors}"
            )
        super().__post_init__()

    def _check_sampling(self, stage: str) -> None:
        """Checks the fraction and the two IoU thresholds of the sampling of a stage, "rpn" or "box"."""
        check_numbers(self, f"{stage}_positive_fraction", low=0, high=1)
        names = f"{stage}_bg_iou_thresh", f"{stage}_fg_iou_thresh"
        check_numbers(self, *names)
        low, high = (getattr(self, name) for name in names)
        if low > high:
            raise ValueError(f"{type(self).__name__}: {names[0]} should not exceed {names[1]}, got {low} and {high}")

    def _sampling(self, stage: str) -> Sampling:
        return Sampling(*(getattr(self, f"{stage}_{option}") for option in Sampling._fields))

    def _check_type(self, field: str, kind: type) -> None:
        value = getattr(self, field)
        if not isinstance(value, (kind, type(None))):
            raise TypeError(f"{field} should be of type {kind.__name__} or None instead of {type(value)}")

    def _default_parts(self) -> dict[str, Callable[[], Any]]:
        options: dict[str, Any] = {name: getattr(self, name) for name in SHARED_OPTIONS} | {"parent": None}
        channels = self.backbone.out_channels
        anchors = self.rpn_anchor_generator or default_anchor_generator()
        return {
            "rpn_anchor_generator": default_anchor_generator,
            "rpn_head": lambda: RPNHead(channels, anchors.num_anchors_per_location()[0], **options),
        }

    def _anchors(self) -> AnchorGenerator:
        assert self.rpn_anchor_generator is not None  # the constructor fills it in
        return self.rpn_anchor_generator

    def __call__(
        self, batch: ImageBatch, targets: Targets | None = None, *, train: bool = False, with_detections: bool = False
    ) -> Any:
        """Detects, or computes the losses.

        Args:
            batch: images from ``flaxdet.transform``.
            targets: ground truth in the pixels of the resized images; needs ``rngs={"sampling": key}``.
            train: whether BatchNorm is in training mode (``mutable=["batch_stats"]`` then returns the new statistics),
                and whether the RPN takes the training numbers of candidates and proposals. Targets with ``train=False``
                give validation losses.
            with_detections: with targets, also returns the detections, from the proposals of inference.

        Returns:
            Without targets: ``Detections`` in the pixels of the resized images. With targets: torchvision's losses by
            name (``loss_names``), or the pair (losses, detections). Under jit, all losses and their gradients are NaN
            if the label of a valid box is not one of ``target_labels``.

        Raises:
            ValueError: for such a label, outside of jit.
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
        detections = self.detect(features, proposals, batch, train=train)
        return detections if targets is None else (losses, detections)

    def rpn(self, features: Features, batch: ImageBatch) -> tuple[list[Array], list[Array]]:
        """Runs the RPN's head.

        Args:
            features: feature maps of the backbone.
            batch: the images of the feature maps.

        Returns:
            Per level the objectness logits [B, hwA] and the offsets [B, hwA, 4], in the dtype of the head.
        """
        objectness, deltas = call_part(
            self.rpn_head, features, role="rpn_head", extents=feature_extents(features, batch)
        )
        self.sow_all(
            {
                "objectness": jnp.concatenate(objectness, axis=1).astype(self.box_dtype),
                "pred_bbox_deltas": jnp.concatenate(deltas, axis=1).astype(self.box_dtype),
            }
        )
        return objectness, deltas

    def propose(self, features: Features, batch: ImageBatch, *, train: bool = False) -> Proposals:
        """Runs the region proposal network.

        Args:
            features: feature maps of the backbone.
            batch: the images of the feature maps.
            train: takes the training numbers of candidates and proposals.

        Returns:
            Proposals in the pixels of the resized images.
        """
        objectness, deltas = self.rpn(features, batch)
        return self.filter_proposals(objectness, deltas, batch, level_shapes(features), train=train)

    def filter_proposals(
        self, objectness: list[Array], deltas: list[Array], batch: ImageBatch, shapes: Shapes, *, train: bool = False
    ) -> Proposals:
        """The best boxes of the RPN's outputs.

        Args:
            objectness: logits [B, hwA] of each level.
            deltas: offsets [B, hwA, 4] of each level.
            batch: the images of the outputs.
            shapes: (h, w) of each level's map.
            train: takes the training numbers of candidates and proposals.

        Returns:
            Proposals in the pixels of the resized images.
        """
        canvas, extents = filled_extents(self._anchors(), batch, shapes)
        if self.is_initializing():
            return no_proposals(len(batch.size), self.box_dtype)
        return filter_proposals(
            objectness,
            deltas,
            canvas,
            extents,
            batch.size,
            generator=self._anchors(),
            shapes=shapes,
            dtype=self.box_dtype,
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
        """The losses of the RPN and of the branches.

        Args:
            features: feature maps of the backbone.
            objectness: logits [B, hwA] of each level, of the RPN's head.
            deltas: offsets [B, hwA, 4] of each level, of the RPN's head.
            proposals: proposals of the RPN. The branches train on samples of the proposals and of the ground truth.
            batch: the images.
            targets: ground truth in the pixels of the resized images.
            keys: [2, B] random keys of the sampling in the RPN and in the branches.
            train: whether BatchNorm is in training mode in the branches.

        Returns:
            The losses by name (``loss_names``). Under jit, all losses and their gradients are NaN if the label of a
            valid box is not one of ``target_labels``.

        Raises:
            ValueError: for such a label, outside of jit.
        """
        check_targets(targets.labels, targets.valid, self.target_labels)
        anchors, admitted = batch_anchors(self._anchors(), batch, level_shapes(features), self.box_dtype)
        proposal_losses = rpn_losses(
            jnp.concatenate(objectness, axis=1).astype(self.box_dtype),
            jnp.concatenate(deltas, axis=1).astype(self.box_dtype),
            jnp.concatenate(anchors, axis=1),
            jnp.concatenate(admitted, axis=1),
            targets,
            keys[0],
            self._sampling("rpn"),
        )
        losses, allowed = self.roi_losses(features, proposals, batch, targets, keys[1], train=train)
        return refuse_labels(losses | proposal_losses, targets, allowed)

    def roi_branch(
        self, name: str, features: Features, proposals: Proposals, batch: ImageBatch, *, train: bool
    ) -> tuple[Array, ...]:
        """Runs the parts NAME_roi_pool, NAME_head and NAME_predictor on regions.

        Args:
            name: name of the branch, such as "box".
            features: feature maps of the backbone.
            proposals: R regions per image.
            batch: the images.
            train: whether BatchNorm is in training mode.

        Returns:
            The pooled maps [B, R, h, w, C], then the arrays of the predictor, [B * R, ...] each.
        """
        pool, head, predictor = (getattr(self, f"{name}_{part}") for part in ("roi_pool", "head", "predictor"))
        boxes, strides = proposals.boxes.astype(self.box_dtype), getattr(self.backbone, "level_strides", None)
        pooled = call_part(pool, features, boxes, batch, role=f"{name}_roi_pool", strides=strides)
        outputs = call_part(
            head,
            pooled.reshape(proposals.valid.size, *pooled.shape[2:]),
            role=f"{name}_head",
            train=train,
            mask=proposals.valid.reshape(-1),
        )
        return pooled, *call_part(predictor, outputs, role=f"{name}_predictor", train=train)

    def detect(self, features: Features, proposals: Proposals, batch: ImageBatch, *, train: bool = False) -> Detections:
        """Runs the branches and keeps the best boxes.

        Args:
            features: feature maps of the backbone.
            proposals: boxes in the pixels of the resized images.
            batch: the images.
            train: whether BatchNorm is in training mode.

        Returns:
            Detections in the pixels of the resized images.

        Raises:
            NotImplementedError: in this base class.
        """
        raise NotImplementedError(f"{type(self).__name__} should define detect")

    def roi_losses(
        self, features: Features, proposals: Proposals, batch: ImageBatch, targets: Targets, keys: Array, *, train: bool
    ) -> tuple[dict[str, Float[Array, ""]], range]:
        """The losses of the branches.

        Args:
            features: feature maps of the backbone.
            proposals: proposals of the RPN.
            batch: the images.
            targets: ground truth in the pixels of the resized images.
            keys: [B] random keys of the sampling.
            train: whether BatchNorm is in training mode.

        Returns:
            The losses by name, and the labels for which the class layer has an output.

        Raises:
            NotImplementedError: in this base class.
        """
        raise NotImplementedError(f"{type(self).__name__} should define roi_losses")
