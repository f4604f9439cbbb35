"""Box heads, predictor and postprocessing of Faster R-CNN, after torchvision's roi_heads."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from flaxdet.models.detector import freeze_lists, gather_detections
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
from flaxdet.nn.options import check_counts, check_sizes
from flaxdet.ops import BoxCoder, clip_boxes_to_image, remove_small_boxes
from flaxdet.ops.nms import batched_nms
from flaxdet.structures import Detections, Proposals
from flaxdet.xla.mesh import per_image

MIN_SIZE = 1e-2  # pixels; smaller detections are dropped


class TwoMLPHead(TypedModule):
    """Two dense layers with ReLU on the flattened pooled maps (torchvision's TwoMLPHead).

    Attributes:
        in_channels: C * h * w of the pooled maps.
        representation_size: width of both layers.
        dtype: computes.
        param_dtype: stores; default float64 if ``dtype`` is, else float32.
        precision: of every convolution and product.

    Raises:
        ValueError: for an option out of range.
        TypeError: for an option of another kind.
    """

    in_channels: int
    representation_size: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype | None = None
    precision: Precision = None

    def __post_init__(self) -> None:
        check_counts(self, 1, "in_channels", "representation_size")
        super().__post_init__()

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

    Raises:
        ValueError: for an option out of range.
        TypeError: for an option of another kind.
    """

    input_size: tuple[int, int, int]
    conv_layers: tuple[int, ...]
    fc_layers: tuple[int, ...]
    use_norm: bool = False
    freeze_bn: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype | None = None
    precision: Precision = None

    def __post_init__(self) -> None:
        for name, count in (("input_size", 3), ("conv_layers", None), ("fc_layers", None)):
            object.__setattr__(self, name, freeze_lists(getattr(self, name)))
            check_sizes(self, name, count)
        super().__post_init__()

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

    Raises:
        ValueError: for an option out of range.
        TypeError: for an option of another kind.
    """

    in_channels: int
    num_classes: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype | None = None
    precision: Precision = None

    def __post_init__(self) -> None:
        check_counts(self, 1, "in_channels")
        check_counts(self, 2, "num_classes")  # the background is one
        super().__post_init__()

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
        Detections in the pixels of the resized images.
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
        return gather_detections(decoded, scores, labels, keep)

    return per_image(image)(class_logits, box_regression, proposals.boxes, proposals.valid, size)
