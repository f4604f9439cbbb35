"""The detectors' training losses on padded batches, after torchvision.models.detection.{fcos,rpn,roi_heads}.

Losses are summed over the whole batch and then divided by a count. Under ``jit`` with a sharded batch, the sums and the
counts are over the global batch. Anchors beyond an image's canvas and padded slots are masked with ``where``
before they could reach a sum or a gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from flaxdet.nn.layers import Array
from flaxdet.ops.coders import BoxCoder, BoxLinearCoder
from flaxdet.ops.losses import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    generalized_box_iou_loss,
    sigmoid_focal_loss,
    smooth_l1_loss,
)
from flaxdet.ops.matching import BELOW_LOW_THRESHOLD, match_boxes
from flaxdet.ops.sampling import balanced_sample
from flaxdet.structures import Proposals, Targets
from flaxdet.xla.mesh import per_image

SMOOTH_L1_BETA = 1 / 9
IGNORED = -1  # label of an anchor or proposal that takes no part in a loss


class Sampling(NamedTuple):
    """How anchors or proposals are labelled and sampled in training.

    Attributes:
        fg_iou_thresh: IoU from which a box is positive.
        bg_iou_thresh: IoU below which a box is negative; a box between the two thresholds is ignored.
        batch_size_per_image: number of boxes sampled.
        positive_fraction: largest fraction of positives among the sampled boxes.
    """

    fg_iou_thresh: float
    bg_iou_thresh: float
    batch_size_per_image: int
    positive_fraction: float

    def match(self, boxes: Array, valid: Array, gt: Array, gt_valid: Array, **options: Any) -> Int[Array, " N"]:
        """``ops.match`` by the two thresholds.

        Args:
            boxes: [N, 4] xyxy in pixels of one image, the anchors or proposals.
            valid: [N], False for boxes that are not matched.
            gt: [G, 4] xyxy in pixels of the same image, the ground truth.
            gt_valid: [G], False for padding.
            **options: of ``ops.match``.

        Returns:
            [N], as ``ops.match``.
        """
        thresholds = {"high_threshold": self.fg_iou_thresh, "low_threshold": self.bg_iou_thresh}
        return match_boxes(gt, boxes, **thresholds, valid_gt=gt_valid, valid=valid, **options)


def fcos_losses(
    outputs: dict[str, Float[Array, "B N _"]],
    anchors: Float[Array, "B N 4"],
    admitted: Bool[Array, "B N"],
    matched: Int[Array, "B N"],
    targets: Targets,
    coder: BoxLinearCoder,
) -> dict[str, Float[Array, ""]]:
    """FCOS's three losses (torchvision's FCOS.compute_loss and FCOSHead.compute_loss).

    Args:
        outputs: outputs of the head, in the boxes' dtype.
        anchors: xyxy in pixels of each canvas.
        admitted: True for anchors inside the canvas.
        matched: index of each anchor's ground-truth box, or -1; see ``ops.fcos_match``.
        targets: ground truth in the pixels of the resized images.
        coder: the coder of the distances.

    Returns:
        {"classification", "bbox_regression", "bbox_ctrness"}, each a sum over the batch divided by the number of
        matched anchors in the batch (at least 1).
    """
    foreground = matched >= 0
    labels, boxes = _of_match(targets, matched)
    count = jnp.maximum(jnp.sum(foreground, dtype=jnp.int32), 1).astype(anchors.dtype)

    logits = outputs["cls_logits"]
    one_hot = jax.nn.one_hot(jnp.where(foreground, labels, -1), logits.shape[-1], dtype=logits.dtype)  # -1: all zero
    focal = sigmoid_focal_loss(logits, one_hot, reduction="none")

    # An anchor without a match replaces target and prediction by itself: the loss is 0 and the gradient finite.
    mask = foreground[..., None]
    boxes = jnp.where(mask, boxes, anchors)
    predicted = jnp.where(mask, coder.decode(outputs["bbox_regression"], anchors), anchors)
    giou = generalized_box_iou_loss(predicted, boxes, reduction="none")

    sides = coder.encode(anchors, boxes)
    across, down = sides[..., 0::2], sides[..., 1::2]
    centerness = jnp.sqrt(
        (across.min(-1) / across.max(-1)) * (down.min(-1) / down.max(-1)),
    )
    ctrness = binary_cross_entropy_with_logits(outputs["bbox_ctrness"][..., 0], centerness, reduction="none")
    return {
        "classification": _masked_sum(focal, admitted[..., None]) / count,
        "bbox_regression": _masked_sum(giou, foreground) / count,
        "bbox_ctrness": _masked_sum(ctrness, foreground) / count,
    }


def rpn_losses(
    objectness: Float[Array, "B N"],
    deltas: Float[Array, "B N 4"],
    anchors: Float[Array, "B N 4"],
    admitted: Bool[Array, "B N"],
    targets: Targets,
    keys: Array,
    sampling: Sampling,
) -> dict[str, Float[Array, ""]]:
    """The region proposal network's two losses (torchvision's RegionProposalNetwork.compute_loss).

    Args:
        objectness: logits of all levels.
        deltas: offsets from the anchors.
        anchors: xyxy in pixels of each canvas.
        admitted: True for anchors inside the canvas; other anchors are neither matched nor sampled.
        targets: ground truth in the pixels of the resized images.
        keys: [B] random keys of the sampling.
        sampling: of the anchors. The best anchors of each ground truth are positive whatever their IoU.

    Returns:
        {"loss_objectness", "loss_rpn_box_reg"}, over the sampled anchors of the batch.
    """

    def assign(anchors: Array, admitted: Array, boxes: Array, valid: Array, key: Array) -> tuple[Array, ...]:
        matched = sampling.match(anchors, admitted, boxes, valid, allow_low_quality_matches=True)
        labels = jnp.where(matched >= 0, 1, jnp.where(matched == BELOW_LOW_THRESHOLD, 0, IGNORED))
        return matched, *balanced_sample(key, labels, sampling.batch_size_per_image, sampling.positive_fraction)

    matched, positive, negative = per_image(assign)(anchors, admitted, targets.boxes, targets.valid, keys)
    sampled = positive | negative
    count = jnp.maximum(jnp.sum(sampled, dtype=jnp.int32), 1).astype(objectness.dtype)
    _, boxes = _of_match(targets, matched)
    codes = BoxCoder().encode(jnp.where(positive[..., None], boxes, anchors), anchors)
    box_loss = smooth_l1_loss(deltas, codes, beta=SMOOTH_L1_BETA, reduction="none")
    loss = binary_cross_entropy_with_logits(objectness, positive.astype(objectness.dtype), reduction="none")
    return {
        "loss_objectness": _masked_sum(loss, sampled) / count,
        "loss_rpn_box_reg": _masked_sum(box_loss, positive[..., None]) / count,
    }


def sample_proposals(
    proposals: Proposals,
    targets: Targets,
    keys: Array,
    sampling: Sampling,
) -> tuple[Proposals, Int[Array, "B S"], Float[Array, "B S 4"]]:
    """Samples the proposals that the box head trains on (torchvision's RoIHeads.select_training_samples).

    Args:
        proposals: proposals of the RPN, to which the ground truth is added.
        targets: ground truth in the pixels of the resized images.
        keys: [B] random keys of the sampling.
        sampling: of the proposals, of which the negative are background.

    Returns:
        The sampled proposals in S = min(sampling.batch_size_per_image, R + G) slots; the label of each (0 for
        background); and the matched ground-truth box of each (for background, the proposal itself).
    """
    boxes = jnp.concatenate((proposals.boxes, targets.boxes.astype(proposals.boxes.dtype)), axis=1)
    valid = jnp.concatenate((proposals.valid, targets.valid), axis=1)
    slots = min(sampling.batch_size_per_image, boxes.shape[1])

    def choose(
        boxes: Array, valid: Array, gt: Array, gt_labels: Array, gt_valid: Array, key: Array
    ) -> tuple[Array, ...]:
        matched = sampling.match(boxes, valid, gt, gt_valid)
        index = jnp.maximum(matched, 0)
        labels = jnp.where(matched >= 0, gt_labels[index], jnp.where(matched == BELOW_LOW_THRESHOLD, 0, IGNORED))
        positive, negative = balanced_sample(key, labels, sampling.batch_size_per_image, sampling.positive_fraction)
        sampled = positive | negative
        (slot,) = jnp.nonzero(sampled, size=slots, fill_value=0)
        used = jnp.arange(slots, dtype=jnp.int32) < jnp.sum(sampled, dtype=jnp.int32)
        matched_boxes = jnp.where((labels > 0)[:, None], gt[index], boxes)
        return (
            jnp.where(used[:, None], boxes[slot], 0),
            used,
            jnp.where(used, labels[slot], IGNORED),
            jnp.where(used[:, None], matched_boxes[slot], 0),
        )

    boxes, used, labels, matched_boxes = per_image(choose)(
        boxes, valid, targets.boxes.astype(boxes.dtype), targets.labels, targets.valid, keys
    )
    sampled = Proposals(boxes=boxes, scores=jnp.zeros(used.shape, boxes.dtype), valid=used)
    return jax.lax.stop_gradient((sampled, labels, matched_boxes))


def roi_losses(
    class_logits: Float[Array, "B S k"],
    box_regression: Float[Array, "B S k*4"],
    proposals: Proposals,
    labels: Int[Array, "B S"],
    boxes: Float[Array, "B S 4"],
    coder: BoxCoder,
) -> dict[str, Float[Array, ""]]:
    """The box head's two losses (torchvision's fastrcnn_loss).

    Args:
        class_logits: logits of each sampled proposal.
        box_regression: offsets from each sampled proposal, for each class.
        proposals: the sampled proposals, of ``sample_proposals``.
        labels: 0 for background, -1 for empty slots.
        boxes: matched ground-truth box of each positive, xyxy in the pixels of the resized images.
        coder: the coder of the offsets.

    Returns:
        {"loss_classifier", "loss_box_reg"}, over the sampled proposals of the batch.
    """
    count = jnp.maximum(jnp.sum(proposals.valid, dtype=jnp.int32), 1).astype(class_logits.dtype)
    positive = proposals.valid & (labels > 0)
    label = jnp.maximum(labels, 0)
    classification = cross_entropy(class_logits, label, reduction="none")
    deltas = box_regression.reshape(*labels.shape, -1, 4)
    deltas = jnp.take_along_axis(deltas, label[..., None, None], axis=2)[:, :, 0]
    # For background and empty slots, a unit box replaces proposal and target, so that encode gives finite offsets.
    unit = jnp.asarray([0, 0, 1, 1], boxes.dtype)
    mask = positive[..., None]
    codes = coder.encode(jnp.where(mask, boxes, unit), jnp.where(mask, proposals.boxes, unit))
    box_loss = smooth_l1_loss(deltas, codes, beta=SMOOTH_L1_BETA, reduction="none")
    return {
        "loss_classifier": _masked_sum(classification, proposals.valid) / count,
        "loss_box_reg": _masked_sum(box_loss, mask) / count,
    }


def _of_match(targets: Targets, matched: Int[Array, "B N"]) -> tuple[Int[Array, "B N"], Float[Array, "B N 4"]]:
    """Label and box of the ground truth that each anchor is matched to; undefined for anchors without a match."""
    index = jnp.maximum(matched, 0)
    labels = jnp.take_along_axis(targets.labels, index, axis=1)
    return labels, jnp.take_along_axis(targets.boxes, index[..., None], axis=1)


def _masked_sum(x: Array, mask: Array) -> Array:
    return jnp.sum(jnp.where(mask, x, 0))
