"""One-stage detectors: a head with an output at every anchor. FCOS is one, and RetinaNet would be another."""

from __future__ import annotations

import functools
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from flaxdet.models.backbones import check_backbone
from flaxdet.models.detector import Detector, call_part, gather_detections, no_detections
from flaxdet.models.labels import check_targets, label_range, refuse_labels
from flaxdet.models.levels import Shapes, batch_anchors, feature_extents, filled_extents, level_shapes
from flaxdet.nn.layers import Array
from flaxdet.nn.options import check_counts, check_numbers
from flaxdet.ops import AnchorGenerator, BoxCoder, BoxLinearCoder, clip_boxes_to_image
from flaxdet.ops.nms import batched_nms
from flaxdet.ops.top_k import top_k
from flaxdet.structures import Detections, ImageBatch, Targets
from flaxdet.xla.mesh import per_image

DenseOutputs = dict[str, Float[Array, "B N _"]]


class DenseDetector(Detector):
    """Base of the one-stage detectors: backbone, head, then losses or detections.

    A subclass defines ``box_coder``, ``scores``, ``match`` and ``matched_losses``, and lists the losses in
    ``loss_names``. The outputs of the head include "cls_logits" [B, N, k], where channel c belongs to label c, and
    "bbox_regression" [B, N, 4].

    Attributes:
        anchor_generator: generator of the anchors.
        head: module ``(features, extents) -> {name: [B, N, C]}``, with the N anchors by level, row and column.
        score_thresh: detections have scores above this threshold.
        nms_thresh: IoU above which NMS, within each class, suppresses a box.
        detections_per_img: K, detection slots per image.
        topk_candidates: candidates kept per level before NMS.
    """

    anchor_generator: AnchorGenerator | None = None
    head: nn.Module | None = None
    score_thresh: float = 0.05
    nms_thresh: float = 0.5
    detections_per_img: int = 300
    topk_candidates: int = 1000

    class_part = "head"
    torch_parts = MappingProxyType({"backbone": "backbone", "head": "head"})
    score_field = "score_thresh"

    def __post_init__(self) -> None:
        check_counts(self, 1, "num_classes", "topk_candidates")
        check_counts(self, 0, "detections_per_img", "trainable_backbone_layers")
        check_numbers(self, "score_thresh", "nms_thresh")
        if not isinstance(self.anchor_generator, (AnchorGenerator, type(None))):
            raise TypeError(
                f"anchor_generator should be of type AnchorGenerator or None, instead got {type(self.anchor_generator)}"
            )
        check_backbone(self)
        self._fill_in_parts()
        classes = getattr(self.head, "num_classes", self.num_classes)
        if classes != self.num_classes:
            raise ValueError(f"head has {classes} classes, num_classes is {self.num_classes}: they should agree")
        super().__post_init__()

    def _anchors(self) -> AnchorGenerator:
        assert self.anchor_generator is not None  # the constructor fills it in
        return self.anchor_generator

    @property
    def target_labels(self) -> range:
        """The labels that a ground-truth box may have, 0..k-1: each is a channel of the head."""
        return label_range(self.num_classes, background=False)

    @property
    def box_coder(self) -> BoxCoder | BoxLinearCoder:
        """The coder that decodes "bbox_regression" from the anchors; NotImplementedError in this base class."""
        raise NotImplementedError(f"{type(self).__name__} should define box_coder")

    def scores(self, outputs: DenseOutputs) -> Float[Array, "n k"]:
        """Scores of the classes.

        Args:
            outputs: outputs of the head at n anchors of one image.

        Returns:
            [n, k], in 0..1.

        Raises:
            NotImplementedError: in this base class.
        """
        raise NotImplementedError(f"{type(self).__name__} should define scores")

    def match(
        self,
        anchors: Float[Array, "N 4"],
        admitted: Bool[Array, " N"],
        boxes: Float[Array, "G 4"],
        valid: Bool[Array, " G"],
        counts: tuple[int, ...],
    ) -> Int[Array, " N"]:
        """Assigns ground truth to the anchors of one image.

        Args:
            anchors: xyxy in pixels, all levels.
            admitted: True for anchors inside the canvas.
            boxes: ground truth, xyxy in the pixels of the resized image.
            valid: True for slots with a box.
            counts: number of anchors of each level.

        Returns:
            [N] index of each anchor's box; negative for an anchor without one.

        Raises:
            NotImplementedError: in this base class.
        """
        raise NotImplementedError(f"{type(self).__name__} should define match")

    def matched_losses(
        self,
        outputs: DenseOutputs,
        anchors: Float[Array, "B N 4"],
        admitted: Bool[Array, "B N"],
        matched: Int[Array, "B N"],
        targets: Targets,
    ) -> dict[str, Float[Array, ""]]:
        """The losses of the outputs of the head, given the box that each anchor is matched to.

        Args:
            outputs: outputs of the head.
            anchors: of all levels, xyxy in pixels of each canvas.
            admitted: True for anchors inside the canvas.
            matched: for each image the result of ``match``.
            targets: ground truth in the pixels of the resized images.

        Returns:
            The losses by name, over the whole batch.

        Raises:
            NotImplementedError: in this base class.
        """
        raise NotImplementedError(f"{type(self).__name__} should define matched_losses")

    def __call__(
        self, batch: ImageBatch, targets: Targets | None = None, *, train: bool = False, with_detections: bool = False
    ) -> Any:
        """Detects, or computes the losses.

        Args:
            batch: images from ``flaxdet.transform``.
            targets: ground truth in the pixels of the resized images.
            train: whether BatchNorm is in training mode (``mutable=["batch_stats"]`` then returns the new statistics).
                Targets with ``train=False`` give validation losses.
            with_detections: with targets, also returns the detections.

        Returns:
            Without targets: ``Detections`` in the pixels of the resized images. With targets: torchvision's losses by
            name (``loss_names``), or the pair (losses, detections). Under jit, all losses and their gradients are NaN
            if the label of a valid box is not one of ``target_labels``.

        Raises:
            ValueError: for such a label, outside of jit.
        """
        features = self.features(batch, train=train)
        outputs = call_part(self.head, features, role="head", extents=feature_extents(features, batch))
        self.sow_all(outputs)
        shapes = level_shapes(features)
        if targets is None:
            return self.postprocess(outputs, batch, shapes)
        losses = self.compute_loss(outputs, batch, targets, shapes)
        return (losses, self.postprocess(outputs, batch, shapes)) if with_detections else losses

    def compute_loss(
        self, outputs: DenseOutputs, batch: ImageBatch, targets: Targets, shapes: Shapes
    ) -> dict[str, Float[Array, ""]]:
        """The losses of the head's outputs (torchvision's FCOS.compute_loss).

        Args:
            outputs: outputs of the head.
            batch: the images of the outputs.
            targets: ground truth in the pixels of the resized images.
            shapes: (h, w) of each level's map.

        Returns:
            The losses by name (``loss_names``). Under jit, all losses and their gradients are NaN if the label of a
            valid box is not one of ``target_labels``.

        Raises:
            ValueError: for such a label, outside of jit.
        """
        check_targets(targets.labels, targets.valid, self.target_labels)
        by_level, admitted = batch_anchors(self._anchors(), batch, shapes, self.box_dtype)
        counts = tuple(anchors.shape[1] for anchors in by_level)
        anchors, admitted = jnp.concatenate(by_level, axis=1), jnp.concatenate(admitted, axis=1)
        match = per_image(functools.partial(self.match, counts=counts))
        matched = match(anchors, admitted, targets.boxes, targets.valid)
        outputs = {name: x.astype(self.box_dtype) for name, x in outputs.items()}
        losses = self.matched_losses(outputs, anchors, admitted, matched, targets)
        return refuse_labels(losses, targets, label_range(outputs["cls_logits"].shape[-1], background=False))

    def postprocess(self, outputs: DenseOutputs, batch: ImageBatch, shapes: Shapes) -> Detections:
        """Computes scores, decodes boxes and runs NMS (torchvision's FCOS.postprocess_detections).

        Args:
            outputs: outputs of the head.
            batch: the images of the outputs, whose sizes and canvases are read.
            shapes: (h, w) of each level's map.

        Returns:
            Detections in the pixels of the resized images.
        """
        canvas, extents = filled_extents(self._anchors(), batch, shapes)
        if self.is_initializing():
            return no_detections(len(batch.size), self.detections_per_img, self.box_dtype)
        outputs = {name: x.astype(self.box_dtype) for name, x in outputs.items()}
        image = functools.partial(self._postprocess_image, shapes=shapes)
        return per_image(image)(outputs, canvas, extents, batch.size)

    def _postprocess_image(
        self, outputs: dict[str, Array], canvas: Array, extents: Array, size: Array, *, shapes: Shapes
    ) -> Detections:
        num_classes = outputs["cls_logits"].shape[-1]
        threshold = jnp.asarray(self.score_thresh, self.box_dtype)
        candidates: list[tuple[Array, ...]] = []
        start = 0
        for level, admitted in enumerate(self._anchors().valid(extents, shapes)):
            rows = slice(start, start + len(admitted))
            start = rows.stop
            scores = self.scores({name: x[rows] for name, x in outputs.items()})
            passes = (scores > threshold) & admitted[:, None]
            scores = jnp.where(passes, scores, -1).reshape(-1)
            best, index = top_k(scores, min(self.topk_candidates, scores.shape[0]))
            anchor = index // num_classes
            boxes = self._anchors().at(level, anchor, canvas, extents[level], shapes[level], self.box_dtype)
            candidates.append((outputs["bbox_regression"][rows][anchor], boxes, best, index))

        regression, chosen, scores, index = (jnp.concatenate(parts) for parts in zip(*candidates, strict=True))
        boxes = clip_boxes_to_image(self.box_coder.decode(regression, chosen), size)
        labels = index % num_classes
        keep = batched_nms(
            boxes,
            scores,
            labels,
            self.nms_thresh,
            max_output=self.detections_per_img,
            valid=scores >= 0,
        )
        return gather_detections(boxes, scores, labels, keep)
