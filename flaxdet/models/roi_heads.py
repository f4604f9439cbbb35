"""Pooling, box heads, predictor and postprocessing of Faster R-CNN, after torchvision's roi_heads."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from flaxdet.models.detector import feature_extents, gather_detections, per_image
from flaxdet.nn.fpn import Features
from flaxdet.nn.layers import (
    Array,
    Dtype,
    Precision,
    TypedModule,
    at_least_float32,
    conv,
    kaiming_normal_fan_out,
    linear,
    recomputed,
)
from flaxdet.nn.norm import BatchNorm, activated_conv, apply_affine
from flaxdet.ops import BoxCoder, clip_boxes_to_image, remove_small_boxes
from flaxdet.ops.nms import batched_nms
from flaxdet.ops.roi_align import multiscale_roi_align
from flaxdet.structures import Detections, ImageBatch, Proposals

MIN_SIZE = 1e-2  # pixels; smaller detections are dropped


@dataclass(frozen=True)
class MultiScaleRoIAlign:
    """Pools each box from the level that fits its size (torchvision.ops.MultiScaleRoIAlign).

    Each level's scale is inferred as torchvision infers it, 2**round(log2(map height / image height)), but
    for every image anew: torchvision keeps those of the first batch that it sees.

    Attributes:
        featmap_names: the levels to pool from. The default names those of torchvision ("0".."3") and of this
            library ("p2".."p5").
        output_size: (rows, columns) of a pooled map; one number for both.
        sampling_ratio: samples a bin and side, at least 1.
        canonical_scale: pixels of a box that is pooled from ``canonical_level``.
        canonical_level: log2 of that level's stride.
    """

    featmap_names: tuple[str, ...] = ("0", "1", "2", "3", "p2", "p3", "p4", "p5")
    output_size: int | tuple[int, int] = 7
    sampling_ratio: int = 2
    canonical_scale: int = 224
    canonical_level: int = 4

    def __post_init__(self) -> None:
        size = self.output_size
        object.__setattr__(self, "featmap_names", tuple(self.featmap_names))
        object.__setattr__(self, "output_size", (size, size) if isinstance(size, int) else tuple(size))

    def __call__(
        self,
        features: Features,
        boxes: Float[Array, "B R 4"],
        batch: ImageBatch,
        *,
        strides: Mapping[str, int] | None = None,
    ) -> Float[Array, "B R h w C"]:
        """Pools boxes.

        A level's scale is 1 / its stride, always. torchvision infers it from the height of the first image that a model
        ever sees, and keeps it: the same after any ordinary photo, another one for good after a very elongated image.

        Args:
            features: {name: [B, h, w, C]}, finest first.
            boxes: [B, R, 4] xyxy in the pixels of the resized images.
            batch: the images (canvases are read).
            strides: pixels from cell to cell of each level, by name. Of a level that is not named, the power of two
                nearest to the pixels' longer side over the level's.

        Returns:
            [B, R, h, w, C] in the features' dtype.

        Raises:
            ValueError: if no feature map has one of ``featmap_names``.
        """
        levels = {name: x for name, x in features.items() if name in self.featmap_names}
        if not levels:
            raise ValueError(
                f"none of featmap_names {list(self.featmap_names)} is among the backbone's feature maps "
                f"{list(features)}"
            )
        extents = feature_extents(levels, batch)
        strides, longest = strides or {}, max(batch.pixels.shape[1:3])
        scales = tuple(
            1 / strides[name] if name in strides else 2.0 ** round(math.log2(max(x.shape[1:3]) / longest))
            for name, x in levels.items()
        )

        align = functools.partial(
            multiscale_roi_align,
            output_size=self.output_size,
            sampling_ratio=self.sampling_ratio,
            canonical_scale=self.canonical_scale,
            canonical_level=self.canonical_level,
        )

        def pool(maps: tuple[Array, ...], boxes: Array, extents: Any) -> Array:
            return align(maps, boxes, scales=scales, extents=extents)

        pooled = per_image(pool)(tuple(levels.values()), boxes, None if extents is None else tuple(extents.values()))
        # XLA:CPU would compute all samples again, cell by cell, where the gradient reads this transposed
        return lax.optimization_barrier(pooled)


class TwoMLPHead(TypedModule):
    """Two dense layers with ReLU on the flattened pooled maps (torchvision's TwoMLPHead).

    Attributes:
        in_channels: C * h * w of the pooled maps.
        representation_size: width of both layers.
        dtype: computes.
        param_dtype: stores; default float64 if ``dtype`` is, else float32.
        precision: of every convolution and product.
    """

    in_channels: int
    representation_size: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype | None = None
    precision: Precision = None

    @nn.compact
    def __call__(self, x: Float[Array, "R h w C"]) -> Float[Array, "R D"]:
        """Computes one vector a pooled map.

        Args:
            x: [R, h, w, C], the pooled maps of all images.

        Returns:
            [R, representation_size].
        """
        options: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "precision": self.precision,
        }
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(linear(self.representation_size, self.in_channels, name="fc6", **options)(x))
        return nn.relu(linear(self.representation_size, self.representation_size, name="fc7", **options)(x))


class FastRCNNConvFCHead(TypedModule):
    """3x3 convolutions with ReLU, then dense layers with ReLU (torchvision's FastRCNNConvFCHead).

    Attributes:
        input_size: (C, h, w) of a pooled map, as torchvision gives it.
        conv_layers: width of each convolution.
        fc_layers: width of each dense layer.
        use_norm: live BatchNorm after each convolution, which then has no bias.
        freeze_bn: as in ``ResNet``.
        dtype: computes.
        param_dtype: stores; default float64 if ``dtype`` is, else float32.
        precision: of every convolution and product.
    """

    input_size: tuple[int, int, int]
    conv_layers: tuple[int, ...]
    fc_layers: tuple[int, ...]
    use_norm: bool = False
    freeze_bn: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype | None = None
    precision: Precision = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "R h w C"], *, train: bool = False, mask: Bool[Array, " R"] | None = None
    ) -> Float[Array, "R D"]:
        """Computes one vector a pooled map.

        Args:
            x: [R, h, w, C], the pooled maps of all images.
            train: BatchNorm's mode.
            mask: [R], True where a slot holds a box; BatchNorm's statistics see no others.

        Returns:
            [R, fc_layers[-1]].
        """
        options: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        affine = None  # of the last norm, which the next layer applies
        for i, features in enumerate(self.conv_layers):
            layer = conv(
                features,
                3,
                use_bias=not self.use_norm,
                kernel_init=kaiming_normal_fan_out,
                precision=self.precision,
                name=f"conv_{i}",
                **options,
            )
            x = layer(x) if i == 0 else recomputed(activated_conv)(layer, x, affine, None)
            if self.use_norm:
                cells = None if mask is None else jnp.broadcast_to(mask[:, None, None], x.shape[:3])
                norm = BatchNorm(name=f"norm_{i}", **options)
                x = x.astype(at_least_float32(self.dtype))
                affine = norm.affine(x, train=train and not self.freeze_bn, mask=cells)
        if self.conv_layers:
            x = nn.relu(apply_affine(x, affine, self.dtype))
        x = x.reshape(x.shape[0], -1)
        for i, features in enumerate(self.fc_layers):
            x = linear(features, x.shape[-1], precision=self.precision, name=f"fc_{i}", **options)(x)
            x = nn.relu(x)
        return x


class FastRCNNPredictor(TypedModule):
    """Class logits and one box a class (torchvision's FastRCNNPredictor).

    Attributes:
        in_channels: width of the box head's vectors.
        num_classes: k, including the background.
        dtype: computes.
        param_dtype: stores; default float64 if ``dtype`` is, else float32.
        precision: of every convolution and product.
    """

    in_channels: int
    num_classes: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype | None = None
    precision: Precision = None

    @nn.compact
    def __call__(self, x: Float[Array, "R D"]) -> tuple[Float[Array, "R k"], Float[Array, "R k*4"]]:
        """Predicts from the box head's vectors.

        Args:
            x: [R, D].

        Returns:
            Logits [R, k] and offsets [R, k * 4], class by class.
        """
        options: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "precision": self.precision,
        }
        scores = linear(self.num_classes, self.in_channels, name="cls_score", **options)(x)
        deltas = linear(self.num_classes * 4, self.in_channels, name="bbox_pred", **options)(x)
        return scores, deltas


def postprocess_detections(
    class_logits: Float[Array, "B R k"],
    box_regression: Float[Array, "B R k*4"],
    proposals: Proposals,
    size: Int[Array, "B 2"],
    *,
    coder: BoxCoder,
    score_thresh: float,
    nms_thresh: float,
    detections_per_img: int,
) -> Detections:
    """Scores, decodes and suppresses (torchvision's RoIHeads.postprocess_detections).

    Args:
        class_logits: of each proposal; class 0, the background, is dropped after the softmax.
        box_regression: offsets from the proposal, of each class.
        proposals: the boxes that the offsets refer to.
        size: [B, 2] (rows, columns) of the resized images, to which boxes are clipped.
        coder: of the offsets.
        score_thresh: keeps scores above it.
        nms_thresh: IoU above which NMS, a class at a time, suppresses.
        detections_per_img: K.

    Returns:
        Detections in the pixels of the resized images; ``overflow`` is never set.
    """

    def image(logits: Array, deltas: Array, boxes: Array, valid: Array, size: Array) -> Detections:
        slots, classes = logits.shape
        scores = nn.softmax(logits, axis=-1)[:, 1:]
        decoded = coder.decode(deltas.reshape(slots, classes, 4), boxes)[:, 1:]
        decoded = clip_boxes_to_image(decoded, size).reshape(-1, 4)
        labels = jnp.broadcast_to(jnp.arange(1, classes, dtype=jnp.int32)[None], scores.shape).reshape(-1)
        kept = (scores > jnp.asarray(score_thresh, scores.dtype)) & valid[:, None]
        kept = kept.reshape(-1) & remove_small_boxes(decoded, MIN_SIZE)
        scores = scores.reshape(-1)
        keep = batched_nms(decoded, scores, labels, nms_thresh, max_output=detections_per_img, valid=kept)
        return gather_detections(decoded, scores, labels, keep, jnp.zeros((), bool))

    return per_image(image)(class_logits, box_regression, proposals.boxes, proposals.valid, size)


def pooled_channels(out_channels: int, output_size: int | tuple[int, int]) -> int:
    """Inputs of a dense layer on pooled maps: C * h * w."""
    return out_channels * (output_size**2 if isinstance(output_size, int) else math.prod(output_size))
