"""The region proposal network, after torchvision.models.detection.rpn."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

from flaxdet.models.levels import Extents, Shapes
from flaxdet.nn.canvas import mask_beyond
from flaxdet.nn.fpn import Features
from flaxdet.nn.initializers import normal_001
from flaxdet.nn.layers import Array, Conv, Dtype, Precision, TypedModule, together
from flaxdet.nn.names import TorchName
from flaxdet.nn.options import check_counts
from flaxdet.nn.relu import relu
from flaxdet.ops import AnchorGenerator, BoxCoder, clip_boxes_to_image, remove_small_boxes
from flaxdet.ops.anchors import select_anchor
from flaxdet.ops.nms import batched_nms
from flaxdet.ops.top_k import top_k
from flaxdet.structures import Proposals
from flaxdet.xla.mesh import per_image

MIN_SIZE = 1e-3  # pixels; smaller proposals are dropped


class RPNHead(TypedModule):
    """Objectness and box offsets at every location (torchvision's RPNHead).

    Attributes:
        in_channels: channels of the features and of the convolutions.
        num_anchors: A, anchors per location.
        conv_depth: 3x3 convolutions before the two predictions.
        dtype: dtype of the computation.
        param_dtype: dtype of the parameters; default float64 if ``dtype`` is float64, else float32.
        precision: ``jax.lax.Precision`` of every convolution and matrix product.

    Raises:
        ValueError: for an option out of range.
        TypeError: for an option that is no whole number.
    """

    in_channels: int
    num_anchors: int
    conv_depth: int = 1
    dtype: Dtype = jnp.float32
    param_dtype: Dtype | None = None
    precision: Precision = None

    def __post_init__(self) -> None:
        check_counts(self, 1, "in_channels", "num_anchors")
        check_counts(self, 0, "conv_depth")
        super().__post_init__()

    def torch_names(self) -> Iterator[TorchName]:
        """Names of the modules in torchvision's RPNHead, in the order of its state_dict."""
        for i in range(self.conv_depth):
            yield TorchName(f"conv_{i}", f"conv.{i}.0")
        for output in ("cls_logits", "bbox_pred"):
            yield TorchName(output, output)

    @nn.compact
    def __call__(
        self, features: Features, extents: Extents = None
    ) -> tuple[list[Float[Array, "B hwA"]], list[Float[Array, "B hwA 4"]]]:
        """Applies the head to every level.

        Args:
            features: {name: [B, h, w, C]}, finest first.
            extents: {name: [B, 2] int32} (rows, columns) of each map inside the canvas.

        Returns:
            For each level the objectness logits [B, hwA] and the offsets [B, hwA, 4], by row, column and anchor.
        """
        options: dict[str, Any] = {
            "kernel_init": normal_001,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "precision": self.precision,
        }
        convs = [Conv(self.in_channels, 3, name=f"conv_{i}", **options) for i in range(self.conv_depth)]
        cls_logits = Conv(self.num_anchors, 1, name="cls_logits", **options)
        bbox_pred = Conv(self.num_anchors * 4, 1, name="bbox_pred", **options)
        objectness, deltas = [], []
        for name, x in features.items():
            for layer in convs:
                x = relu(layer(mask_beyond(x, None if extents is None else extents[name])))
            logits, offsets = together((cls_logits, bbox_pred), x)
            objectness.append(logits.reshape(x.shape[0], -1))
            deltas.append(offsets.reshape(x.shape[0], -1, 4))
        return objectness, deltas


def filter_proposals(
    objectness: list[Float[Array, "B hwA"]],
    deltas: list[Float[Array, "B hwA 4"]],
    canvas: Int[Array, "B 2"],
    extents: Int[Array, "B L 2"],
    size: Int[Array, "B 2"],
    *,
    generator: AnchorGenerator,
    shapes: Shapes,
    dtype: Dtype,
    pre_nms_top_n: int,
    post_nms_top_n: int,
    nms_thresh: float,
    score_thresh: float,
) -> Proposals:
    """The best boxes of every image (torchvision's RegionProposalNetwork.filter_proposals).

    Args:
        objectness: logits of each level.
        deltas: offsets from the anchors, of each level.
        canvas: (rows, columns) of each canvas.
        extents: (rows, columns) of each of the L maps that each canvas fills.
        size: (rows, columns) of the resized images, to which boxes are clipped.
        generator: generator of the anchors.
        shapes: (h, w) of each level's map.
        dtype: dtype of scores and boxes.
        pre_nms_top_n: largest number of candidates per level.
        post_nms_top_n: largest number of proposals per image.
        nms_thresh: IoU above which NMS, within each level, suppresses a box.
        score_thresh: lowest objectness score (sigmoid) of a proposal.

    Returns:
        Proposals in R = min(post_nms_top_n, all candidates) slots, in the pixels of the resized images, without
        gradients.
    """
    select = functools.partial(
        _filter_image,
        generator=generator,
        shapes=shapes,
        dtype=dtype,
        pre_nms_top_n=pre_nms_top_n,
        post_nms_top_n=post_nms_top_n,
        nms_thresh=nms_thresh,
        score_thresh=score_thresh,
    )
    return per_image(select)(lax.stop_gradient((objectness, deltas)), canvas, extents, size)


def no_proposals(images: int, dtype: Dtype) -> Proposals:
    """Proposals [B, 1] without a box, for ``init``: the selection has no variables, and tracing it takes time."""
    score = jnp.zeros((images, 1), dtype)
    return Proposals(boxes=jnp.zeros((images, 1, 4), dtype), scores=score, valid=jnp.zeros(score.shape, bool))


def _filter_image(
    outputs: tuple[list[Array], list[Array]],
    canvas: Array,
    extents: Array,
    size: Array,
    *,
    generator: AnchorGenerator,
    shapes: Shapes,
    dtype: Dtype,
    pre_nms_top_n: int,
    post_nms_top_n: int,
    nms_thresh: float,
    score_thresh: float,
) -> Proposals:
    admitted, anchors = generator.valid(extents, shapes), generator.num_anchors_per_location()
    candidates: list[tuple[Array, ...]] = []
    for level, (logits, deltas, inside, anchors_per_location) in enumerate(
        zip(*outputs, admitted, anchors, strict=True)
    ):
        count = min(pre_nms_top_n, logits.shape[0])
        logits = logits.astype(dtype)
        # -inf ranks padding last, after all anchors of the canvas. A score can't mark padding later on, since
        # sigmoid(-inf) = 0 passes a threshold of 0; the mask `inside` does.
        _, index = top_k(jnp.where(inside, logits, -jnp.inf), count)
        # On TPUs an array [..., 4] takes 32 times its size in memory. So offsets are gathered as rows [A * 4] of a
        # location, and only the chosen offsets and anchors become arrays [count, 4].
        cell, anchor = jnp.divmod(index, anchors_per_location)
        offsets = deltas.reshape(-1, anchors_per_location * 4)[cell].astype(dtype)
        offsets = select_anchor(offsets.reshape(count, anchors_per_location, 4), anchor)
        boxes = generator.at(level, index, canvas, extents[level], shapes[level], dtype)
        levels = jnp.full((count,), level, jnp.int32)
        candidates.append((offsets, boxes, logits[index], levels, inside[index]))

    offsets, chosen, logits, levels, inside = (jnp.concatenate(parts) for parts in zip(*candidates, strict=True))
    boxes = clip_boxes_to_image(BoxCoder().decode(offsets, chosen), size)
    scores = nn.sigmoid(logits)
    valid = inside & remove_small_boxes(boxes, MIN_SIZE) & (scores >= jnp.asarray(score_thresh, dtype))
    keep = batched_nms(
        boxes,
        scores,
        levels,
        nms_thresh,
        max_output=min(post_nms_top_n, boxes.shape[0]),
        valid=valid,
    )
    valid = keep >= 0
    index = jnp.maximum(keep, 0)
    return Proposals(
        boxes=jnp.where(valid[:, None], boxes[index], 0), scores=jnp.where(valid, scores[index], 0), valid=valid
    )
