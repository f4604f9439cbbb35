"""FCOS, after torchvision.models.detection.fcos.

Tian et al., "FCOS: A simple and strong anchor-free object detector" (arXiv 2006.09214).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from flaxdet.models.backbones import check_backbone
from flaxdet.models.detector import (
    Detector,
    batch_anchors,
    call_part,
    feature_extents,
    gather_detections,
    level_shapes,
    whole_extents,
)
from flaxdet.models.fcos_head import GROUPS, FCOSHead, HeadOutputs, check_groups
from flaxdet.models.labels import check_targets, label_range, refuse_labels
from flaxdet.models.losses import fcos_losses
from flaxdet.nn.layers import Array
from flaxdet.nn.options import check_counts, check_numbers
from flaxdet.nn.typed import SHARED_OPTIONS
from flaxdet.ops import AnchorGenerator, BoxLinearCoder, clip_boxes_to_image
from flaxdet.ops.nms import batched_nms
from flaxdet.structures import Detections, ImageBatch, Targets
from flaxdet.xla.barriers import materialise
from flaxdet.xla.mesh import per_image


def default_anchor_generator() -> AnchorGenerator:
    """One square anchor a location: sizes 8 to 128, one a level."""
    sizes = ((8,), (16,), (32,), (64,), (128,))
    return AnchorGenerator(sizes, ((1.0,),) * len(sizes))


class FCOS(Detector):
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

    anchor_generator: AnchorGenerator | None = None
    head: nn.Module | None = None
    center_sampling_radius: float = 1.5
    score_thresh: float = 0.2
    nms_thresh: float = 0.6
    detections_per_img: int = 100
    topk_candidates: int = 1000

    _own_stages = frozenset(("cls_logits", "bbox_regression", "bbox_ctrness"))
    class_part = "head"
    torch_parts = MappingProxyType({"backbone": "backbone", "head": "head"})
    loss_names = ("classification", "bbox_regression", "bbox_ctrness")
    score_field = "score_thresh"

    def __post_init__(self) -> None:
        check_counts(self, 1, "num_classes", "topk_candidates")
        check_counts(self, 0, "detections_per_img", "trainable_backbone_layers")
        check_numbers(self, "score_thresh", "nms_thresh")
        check_numbers(self, "center_sampling_radius", low=0)
        if not isinstance(self.anchor_generator, (AnchorGenerator, type(None))):
            raise TypeError(
                f"anchor_generator should be of type AnchorGenerator or None, instead got {type(self.anchor_generator)}"
            )
        check_backbone(self)
        if self.head is None:
            owner = f"backbone {type(self.backbone).__name__}: out_channels of a backbone for FCOS's default head"
            check_groups(owner, self.backbone.out_channels)
        self._fill_in_parts()
        for level, anchors in enumerate(self.anchor_generator.num_anchors_per_location()):  # pyright: ignore[reportOptionalMemberAccess]
            if anchors != 1:
                raise ValueError(
                    f"anchor_generator.num_anchors_per_location()[{level}] should be 1 instead of {anchors}"
                )
        classes, anchors = getattr(self.head, "num_classes", self.num_classes), getattr(self.head, "num_anchors", 1)
        if classes != self.num_classes:
            raise ValueError(f"head has {classes} classes, num_classes is {self.num_classes}: they should agree")
        if anchors != 1:
            raise ValueError(f"head has num_anchors={anchors}, and FCOS has one anchor a location")
        super().__post_init__()

    @property
    def target_labels(self) -> range:
        """The labels that a ground-truth box may have, 0..k-1: each is a channel of the head."""
        return label_range(self.num_classes, background=False)

    def _default_parts(self) -> dict[str, Callable[[], Any]]:
        channels, classes = self.backbone.out_channels, self.num_classes
        options = {name: getattr(self, name) for name in SHARED_OPTIONS}
        parts: dict[str, Callable[[], Any]] = {"anchor_generator": default_anchor_generator}
        if channels % GROUPS == 0:  # the head of another backbone is its user's
            parts["head"] = lambda: FCOSHead(channels, 1, classes or 0, **options, parent=None)
        return parts

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
            targets: ground truth in the pixels of the resized images.
            train: BatchNorm's mode (``mutable=["batch_stats"]`` then keeps its statistics). Targets with
                ``train=False`` give validation losses.
            with_detections: with targets, return the detections too.

        Returns:
            Without targets: ``Detections`` in the pixels of the resized images. With targets: torchvision's losses
            {"classification", "bbox_regression", "bbox_ctrness"}, or the pair (losses, detections). Under jit, all
            losses and their gradients are NaN if the label of a valid box is not one of ``target_labels``.

        Raises:
            ValueError: for such a label outside of jit.
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
        self, outputs: HeadOutputs, batch: ImageBatch, targets: Targets, shapes: tuple[tuple[int, int], ...]
    ) -> dict[str, Float[Array, ""]]:
        """The losses of the head's outputs (torchvision's FCOS.compute_loss).

        Args:
            outputs: of the head.
            batch: the images that they belong to.
            targets: ground truth in the pixels of the resized images.
            shapes: (h, w) of each level's map.

        Returns:
            {"classification", "bbox_regression", "bbox_ctrness"}; all NaN, as are their gradients, if the label of a
            valid box is not one of ``target_labels`` and under jit.

        Raises:
            ValueError: for such a label outside of jit.
        """
        check_targets(targets.labels, targets.valid, self.target_labels)
        assert self.anchor_generator is not None
        anchors, admitted = batch_anchors(self.anchor_generator, batch, shapes, self.box_dtype)
        losses = fcos_losses(
            {name: x.astype(self.box_dtype) for name, x in outputs.items()},
            anchors,
            admitted,
            targets,
            tuple(h * w for h, w in shapes),
            center_sampling_radius=self.center_sampling_radius,
        )
        return refuse_labels(losses, targets, label_range(outputs["cls_logits"].shape[-1], background=False))

    def postprocess(self, outputs: HeadOutputs, batch: ImageBatch, shapes: tuple[tuple[int, int], ...]) -> Detections:
        """Scores, decodes and suppresses (torchvision's FCOS.postprocess_detections).

        Args:
            outputs: of the head.
            batch: the images that they belong to (sizes and canvases are read).
            shapes: (h, w) of each level's map.

        Returns:
            Detections in the pixels of the resized images.
        """
        canvas, extents = whole_extents(batch, shapes)
        outputs = {name: x.astype(self.box_dtype) for name, x in outputs.items()}
        return per_image(functools.partial(self._postprocess_image, shapes))(outputs, batch.size, canvas, extents)

    def _postprocess_image(
        self,
        shapes: tuple[tuple[int, int], ...],
        outputs: dict[str, Array],
        size: Array,
        canvas: Array,
        extents: Array,
    ) -> Detections:
        assert self.anchor_generator is not None
        anchors = self.anchor_generator(canvas, extents, shapes, self.box_dtype)
        admitted = self.anchor_generator.valid(extents, shapes)
        coder = BoxLinearCoder(normalize_by_size=True)
        num_classes = outputs["cls_logits"].shape[-1]
        threshold = jnp.asarray(self.score_thresh, self.box_dtype)

        candidates: list[tuple[Array, Array, Array]] = []
        start = 0
        for level_anchors, level_admitted in zip(anchors, admitted, strict=True):
            level = slice(start, start + len(level_anchors))
            start = level.stop
            scores = jnp.sqrt(nn.sigmoid(outputs["cls_logits"][level]) * nn.sigmoid(outputs["bbox_ctrness"][level]))
            kept = (scores > threshold) & level_admitted[:, None]
            scores = jnp.where(kept, scores, -1).reshape(-1)
            # without the barrier XLA:CPU may fuse a slice into the top-k and sort everything
            best, index = materialise(lax.top_k(scores, min(self.topk_candidates, scores.shape[0])))
            cell = index // num_classes
            boxes = coder.decode(outputs["bbox_regression"][level][cell], level_anchors[cell])
            candidates.append((clip_boxes_to_image(boxes, size), best, index % num_classes))

        boxes, scores, labels = (jnp.concatenate(parts) for parts in zip(*candidates, strict=True))
        keep = batched_nms(
            boxes,
            scores,
            labels,
            self.nms_thresh,
            max_output=self.detections_per_img,
            valid=scores >= 0,
        )
        return gather_detections(boxes, scores, labels, keep)
