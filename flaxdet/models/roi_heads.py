"""Box heads, predictor and postprocessing of Faster R-CNN, after torchvision's roi_heads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from flaxdet.models.detector import freeze_lists, gather_detections
from flaxdet.nn.backbone import ConvNorm
from flaxdet.nn.chain import Layer, chain
from flaxdet.nn.initializers import kaiming_normal_fan_out
from flaxdet.nn.layers import Array, Conv, Dense, Dtype, Precision, TypedModule
from flaxdet.nn.names import TorchName
from flaxdet.nn.norm import BatchNorm
from flaxdet.nn.options import check_counts, check_sizes
from flaxdet.nn.relu import relu
from flaxdet.ops import BoxCoder, clip_boxes_to_image, remove_small_boxes
from flaxdet.ops.nms import batched_nms
from flaxdet.structures import Detections, Proposals
from flaxdet.xla.mesh import per_image

MIN_SIZE = 1e-2  # pixels; smaller detections are dropped


class TwoMLPHead(TypedModule):
    """Two dense layers with ReLU on the flattened pooled maps (torchvision's TwoMLPHead).

    Attributes:
        in_channels: C * h * w of the pooled maps.
        representation_size: width of each layer.
        dtype: dtype of the computation.
        param_dtype: dtype of the parameters; default float64 if ``dtype`` is float64, else float32.
        precision: ``jax.lax.Precision`` of every convolution and matrix product.

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

    def torch_names(self) -> Iterator[TorchName]:
        """Names of the modules in torchvision's TwoMLPHead."""
        yield TorchName("fc6", "fc6", flattened=True)
        yield TorchName("fc7", "fc7")

    @nn.compact
    def __call__(self, x: Float[Array, "R h w C"]) -> Float[Array, "R D"]:
        """Computes one vector per pooled map.

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
        x = relu(Dense(self.representation_size, name="fc6", **options)(x))
        return relu(Dense(self.representation_size, name="fc7", **options)(x))


class FastRCNNConvFCHead(TypedModule):
    """3x3 convolutions with ReLU, then dense layers with ReLU (torchvision's FastRCNNConvFCHead).

    Attributes:
        input_size: (C, h, w) of a pooled map, in torchvision's order.
        conv_layers: width of each convolution.
        fc_layers: width of each dense layer.
        use_norm: live BatchNorm after each convolution, which then has no bias.
        freeze_bn: as in ``ResNet``.
        dtype: dtype of the computation.
        param_dtype: dtype of the parameters; default float64 if ``dtype`` is float64, else float32.
        precision: ``jax.lax.Precision`` of every convolution and matrix product.

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

    def torch_names(self) -> Iterator[TorchName]:
        """Names of the modules in torchvision's FastRCNNConvFCHead, in the order of its state_dict."""
        convs = len(self.conv_layers)
        for i in range(convs):
            yield TorchName(f"conv_{i}", f"{i}.0")
            yield TorchName(f"norm_{i}", f"{i}.1")
        for i in range(len(self.fc_layers)):  # torch numbers the convolutions, Flatten, Linear and ReLU
            yield TorchName(f"fc_{i}", str(convs + 1 + 2 * i), flattened=i == 0)

    @property
    def conv_norm_pairs(self) -> tuple[ConvNorm, ...]:
        """Every convolution with its norm; none without ``use_norm``."""
        return tuple(ConvNorm((f"conv_{i}",), (f"norm_{i}",)) for i in range(len(self.conv_layers)) if self.use_norm)

    def without_norms(self) -> FastRCNNConvFCHead:
        """The head for folded variables: a bias in each convolution, no norms.

        Returns:
            The same head with ``use_norm=False``.
        """
        return self.clone(use_norm=False, freeze_bn=False, parent=None)

    @nn.compact
    def __call__(
        self, x: Float[Array, "R h w C"], *, train: bool = False, mask: Bool[Array, " R"] | None = None
    ) -> Float[Array, "R D"]:
        """Computes one vector per pooled map.

        Args:
            x: [R, h, w, C], the pooled maps of all images.
            train: whether BatchNorm is in training mode.
            mask: [R], True for the slots that hold a box; other slots do not count for BatchNorm's statistics.

        Returns:
            [R, fc_layers[-1]].
        """
        options: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        layers: list[Layer] = []
        for i, features in enumerate(self.conv_layers):
            layers += [
                Conv(
                    features,
                    3,
                    use_bias=not self.use_norm,
                    kernel_init=kaiming_normal_fan_out,
                    precision=self.precision,
                    name=f"conv_{i}",
                    **options,
                ),
                BatchNorm(name=f"norm_{i}", **options) if self.use_norm else None,
                nn.relu,
            ]
        x = chain(layers, x, train=train and not self.freeze_bn, rows=mask).value
        x = x.reshape(x.shape[0], -1)
        for i, features in enumerate(self.fc_layers):
            x = relu(Dense(features, precision=self.precision, name=f"fc_{i}", **options)(x))
        return x


class FastRCNNPredictor(TypedModule):
    """Class logits, and one box per class (torchvision's FastRCNNPredictor).

    Attributes:
        in_channels: width of the box head's vectors.
        num_classes: k, number of classes, including the background.
        dtype: dtype of the computation.
        param_dtype: dtype of the parameters; default float64 if ``dtype`` is float64, else float32.
        precision: ``jax.lax.Precision`` of every convolution and matrix product.

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

    @property
    def class_layers(self) -> dict[tuple[str, ...], int]:
        """{path of a layer with outputs for each class: number of outputs per class}."""
        return {("cls_score",): 1, ("bbox_pred",): 4}

    def class_inputs(self, channels: int) -> Float[Array, "1 D"]:
        """An input for initialisation, which gives the predictor's parameters their shapes.

        Args:
            channels: D, width of the box head's vectors.

        Returns:
            [1, D], zeros.
        """
        return jnp.zeros((1, channels), self.dtype)

    def torch_names(self) -> Iterator[TorchName]:
        """Names of the modules in torchvision's FastRCNNPredictor."""
        for output in ("cls_score", "bbox_pred"):
            yield TorchName(output, output)

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
        scores = Dense(self.num_classes, name="cls_score", **options)(x)
        deltas = Dense(self.num_classes * 4, name="bbox_pred", **options)(x)
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
    """Computes scores, decodes boxes and runs NMS (torchvision's RoIHeads.postprocess_detections).

    Args:
        class_logits: logits of each proposal; class 0, the background, is dropped after the softmax.
        box_regression: offsets from each proposal, for each class.
        proposals: the boxes that the offsets refer to.
        size: [B, 2] (rows, columns) of the resized images, to which boxes are clipped.
        coder: the coder of the offsets.
        score_thresh: detections have scores above this threshold.
        nms_thresh: IoU above which NMS, within each class, suppresses a box.
        detections_per_img: K, detection slots per image.

    Returns:
        Detections in the pixels of the resized images.
    """

    def image(logits: Array, deltas: Array, boxes: Array, valid: Array, size: Array) -> Detections:
        slots, classes = logits.shape
        scores = nn.softmax(logits, axis=-1)[:, 1:]
        decoded = coder.decode(deltas.reshape(slots, classes, 4), boxes)[:, 1:]
        decoded = clip_boxes_to_image(decoded, size).reshape(-1, 4)
        labels = jnp.broadcast_to(jnp.arange(1, classes, dtype=jnp.int32)[None], scores.shape).reshape(-1)
        valid_scores = (scores > jnp.asarray(score_thresh, scores.dtype)) & valid[:, None]
        candidates = valid_scores.reshape(-1) & remove_small_boxes(decoded, MIN_SIZE)
        scores = scores.reshape(-1)
        keep = batched_nms(decoded, scores, labels, nms_thresh, max_output=detections_per_img, valid=candidates)
        return gather_detections(decoded, scores, labels, keep)

    return per_image(image)(class_logits, box_regression, proposals.boxes, proposals.valid, size)
