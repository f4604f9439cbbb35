"""Box coders: from boxes to the offsets that a head regresses, and from offsets to boxes.

Boxes are xyxy in absolute pixels. Half-precision inputs are computed, and returned, in float32. Every
function works under ``jit``, ``vmap`` and ``grad``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from flaxdet.ops.boxes import as_boxes, upcast_float


@dataclass(frozen=True)
class BoxCoder:
    """Faster R-CNN's offsets: centre shift over the anchor's size, and the log of the ratio of sizes.

    Reproduces ``torchvision.models.detection._utils.BoxCoder``.

    Attributes:
        weights: factors of (dx, dy, dw, dh); torchvision has (1, 1, 1, 1) in the RPN, (10, 10, 5, 5) in the RoI head.
        bbox_xform_clip: upper limit of dw and dh, applied after division by the weights, so that exp stays finite.

    Raises:
        ValueError: if ``weights`` are not four numbers other than 0.
    """

    weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    bbox_xform_clip: float = math.log(1000.0 / 16)

    def __post_init__(self):
        weights = tuple(float(w) for w in self.weights)
        if len(weights) != 4 or 0.0 in weights:
            raise ValueError(f"weights must be four numbers other than 0, found {self.weights!r}")
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "bbox_xform_clip", float(self.bbox_xform_clip))

    def encode(
        self, reference_boxes: Float[ArrayLike, "*N 4"], proposals: Float[ArrayLike, "*N 4"]
    ) -> Float[Array, "*N 4"]:
        """Offsets (dx, dy, dw, dh) that turn each proposal into its reference box.

        Args:
            reference_boxes: [N, 4] xyxy in pixels, the ground truth of each proposal.
            proposals: [N, 4] xyxy in pixels, proposals or anchors.

        Returns:
            [N, 4]. A reference box without area (padding) gives -inf, and a proposal without area NaN or
            infinity: replace these values with ``where`` before a loss, whose gradient would be NaN otherwise.

        Raises:
            ValueError: if boxes don't have 4 coordinates.
        """
        reference_boxes, proposals = _pair(reference_boxes, proposals)
        x, y, w, h = _centre_and_size(proposals)
        ref_x, ref_y, ref_w, ref_h = _centre_and_size(reference_boxes)
        wx, wy, ww, wh = self.weights
        return jnp.stack(
            (wx * (ref_x - x) / w, wy * (ref_y - y) / h, ww * jnp.log(ref_w / w), wh * jnp.log(ref_h / h)),
            axis=-1,
        )

    def decode(self, rel_codes: Float[ArrayLike, "*N_k 4"], boxes: Float[ArrayLike, "*N 4"]) -> Float[Array, "*N_k 4"]:
        """Applies offsets to boxes; the inverse of ``encode``.

        Args:
            rel_codes: [N, 4], or [N, k, 4] for k sets of offsets per box (one for each class).
            boxes: [N, 4] xyxy in pixels, proposals or anchors; cast to the dtype of ``rel_codes``.

        Returns:
            xyxy boxes in pixels, in the shape of ``rel_codes``. They are not clipped to the image.

        Raises:
            ValueError: if the shapes don't fit each other.
        """
        rel_codes, boxes = _aligned(rel_codes, boxes)
        x, y, w, h = _centre_and_size(boxes)
        wx, wy, ww, wh = self.weights
        # `where` rather than `minimum`: as in torch's clamp, the gradient is 1, not 0.5, exactly at the limit
        dw, dh = rel_codes[..., 2] / ww, rel_codes[..., 3] / wh
        dw = jnp.where(dw > self.bbox_xform_clip, self.bbox_xform_clip, dw)
        dh = jnp.where(dh > self.bbox_xform_clip, self.bbox_xform_clip, dh)

        x = rel_codes[..., 0] / wx * w + x
        y = rel_codes[..., 1] / wy * h + y
        half_w = 0.5 * (jnp.exp(dw) * w)
        half_h = 0.5 * (jnp.exp(dh) * h)
        return jnp.stack((x - half_w, y - half_h, x + half_w, y + half_h), axis=-1)


@dataclass(frozen=True)
class BoxLinearCoder:
    """FCOS's offsets: distances from the anchor's centre to the four sides (left, top, right, bottom).

    Reproduces ``torchvision.models.detection._utils.BoxLinearCoder``.

    Attributes:
        normalize_by_size: if True, distances are in units of the anchor's width and height, else in pixels.
    """

    normalize_by_size: bool = True

    def encode(
        self, reference_boxes: Float[ArrayLike, "*N 4"], proposals: Float[ArrayLike, "*N 4"]
    ) -> Float[Array, "*N 4"]:
        """Distances (l, t, r, b) from the centres of the reference boxes to the sides of the proposals.

        The arguments have torchvision's names, although the *reference* boxes are the anchors here.

        Args:
            reference_boxes: [N, 4] xyxy in pixels, the anchors.
            proposals: [N, 4] xyxy in pixels, the ground truth of each anchor.

        Returns:
            [N, 4]; negative where the centre lies outside the box.

        Raises:
            ValueError: if boxes don't have 4 coordinates.
        """
        reference_boxes, proposals = _pair(reference_boxes, proposals)
        x, y = _midpoint(reference_boxes)
        codes = jnp.stack(
            (x - proposals[..., 0], y - proposals[..., 1], proposals[..., 2] - x, proposals[..., 3] - y),
            axis=-1,
        )
        return codes / _size_twice(reference_boxes) if self.normalize_by_size else codes

    def decode(self, rel_codes: Float[ArrayLike, "*N_k 4"], boxes: Float[ArrayLike, "*N 4"]) -> Float[Array, "*N_k 4"]:
        """Boxes at the given distances from the centres of ``boxes``; the inverse of ``encode``.

        Args:
            rel_codes: [N, 4], or [N, k, 4] for k sets of distances per anchor.
            boxes: [N, 4] xyxy in pixels, the anchors; cast to the dtype of ``rel_codes``.

        Returns:
            xyxy boxes in pixels, in the shape of ``rel_codes``. They are not clipped to the image.

        Raises:
            ValueError: if the shapes don't fit each other.
        """
        rel_codes, boxes = _aligned(rel_codes, boxes)
        x, y = _midpoint(boxes)
        if self.normalize_by_size:
            rel_codes = rel_codes * _size_twice(boxes)
        return jnp.stack(
            (x - rel_codes[..., 0], y - rel_codes[..., 1], x + rel_codes[..., 2], y + rel_codes[..., 3]),
            axis=-1,
        )


def _pair(reference_boxes: ArrayLike, proposals: ArrayLike) -> tuple[jax.Array, jax.Array]:
    arrays = as_boxes("reference_boxes", reference_boxes), as_boxes("proposals", proposals)
    return upcast_float(arrays[0]), upcast_float(arrays[1])


def _aligned(rel_codes: ArrayLike, boxes: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """``rel_codes`` and ``boxes`` in the same float dtype and rank, so that the boxes broadcast against the codes."""
    rel_codes, boxes = jnp.asarray(rel_codes), jnp.asarray(boxes)
    leading = rel_codes.shape[:-1]
    fits = rel_codes.ndim and rel_codes.shape[-1] == 4 and boxes.shape in ((*leading, 4), (*leading[:-1], 4))
    if not fits:
        raise ValueError(
            "rel_codes must be [N, 4] or [N, k, 4] and boxes [N, 4], "
            f"found rel_codes {list(rel_codes.shape)} and boxes {list(boxes.shape)}"
        )
    rel_codes = upcast_float(rel_codes)
    boxes = boxes.astype(rel_codes.dtype)
    return rel_codes, boxes if boxes.ndim == rel_codes.ndim else boxes[..., None, :]


def _centre_and_size(boxes: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    w = boxes[..., 2] - boxes[..., 0]
    h = boxes[..., 3] - boxes[..., 1]
    return boxes[..., 0] + 0.5 * w, boxes[..., 1] + 0.5 * h, w, h


def _midpoint(boxes: jax.Array) -> tuple[jax.Array, jax.Array]:
    # unlike _centre_and_size, as in torchvision: in floating point (a + b) / 2 and a + (b - a) / 2 differ
    return 0.5 * (boxes[..., 0] + boxes[..., 2]), 0.5 * (boxes[..., 1] + boxes[..., 3])


def _size_twice(boxes: jax.Array) -> jax.Array:
    size = boxes[..., 2:] - boxes[..., :2]
    return jnp.concatenate((size, size), axis=-1)
