"""The two branches of FCOS's head, after torchvision.models.detection.fcos."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.nn.initializers import constant

from flaxdet.models.dense import DenseOutputs
from flaxdet.models.levels import Extents
from flaxdet.nn.chain import Layer, chain
from flaxdet.nn.fpn import Features
from flaxdet.nn.initializers import normal_001
from flaxdet.nn.layers import Array, Conv, Dtype, Precision, TypedModule
from flaxdet.nn.names import TorchName
from flaxdet.nn.norm import GroupNorm
from flaxdet.nn.options import check_counts, check_numbers

GROUPS = 32  # number of groups of neighbouring channels in each GroupNorm


def check_groups(owner: str, channels: int) -> None:
    """Raises ValueError unless the groups divide the channels; the message names the option ``owner``."""
    if channels % GROUPS:
        raise ValueError(
            f"{owner} should be a multiple of {GROUPS}, the groups of FCOSHead's GroupNorm, got {channels}"
        )


class _Tower(TypedModule):
    """num_convs x (conv3x3 + GroupNorm(32) + ReLU), then the named 3x3 prediction layers."""

    channels: int
    num_convs: int
    outputs: tuple[tuple[str, int, float], ...]  # (name, channels, bias)
    dtype: Dtype
    param_dtype: Dtype | None
    precision: Precision

    @nn.compact
    def __call__(self, features: Features, extents: Extents) -> dict[str, list[Array]]:
        options: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv3x3 = functools.partial(Conv, kernel_size=3, kernel_init=normal_001, precision=self.precision, **options)
        layers: list[Layer] = []
        for i in range(self.num_convs):
            layers += [
                conv3x3(self.channels, name=f"conv_{i}"),
                GroupNorm(GROUPS, name=f"norm_{i}", **options),
                nn.relu,
            ]
        predictions = {
            name: conv3x3(channels, bias_init=constant(bias), name=name) for name, channels, bias in self.outputs
        }
        links = [chain(layers, x, None if extents is None else extents[name]) for name, x in features.items()]
        return {name: [chain([layer], link).value for link in links] for name, layer in predictions.items()}


class FCOSHead(TypedModule):
    """The classification and the regression branch (torchvision's FCOSHead).

    Attributes:
        in_channels: channels of the features, and of the branches' convolutions; a multiple of 32.
        num_anchors: A, anchors per location; 1 in FCOS.
        num_classes: k, number of classes, including the background.
        num_convs: convolutions in each branch.
        prior_probability: probability of a positive according to the initial bias of the classification.
        dtype: dtype of the computation.
        param_dtype: dtype of the parameters; default float64 if ``dtype`` is float64, else float32.
        precision: ``jax.lax.Precision`` of every convolution and matrix product.

    Raises:
        ValueError: for an option out of range, or in_channels that GroupNorm's 32 groups don't divide.
        TypeError: for an option of another kind.
    """

    in_channels: int
    num_anchors: int
    num_classes: int
    num_convs: int = 4
    prior_probability: float = 0.01
    dtype: Dtype = jnp.float32
    param_dtype: Dtype | None = None
    precision: Precision = None

    def __post_init__(self) -> None:
        check_counts(self, 1, "in_channels", "num_anchors", "num_classes")
        check_counts(self, 0, "num_convs")
        check_numbers(self, "prior_probability")
        if not 0 < self.prior_probability < 1:  # so that the bias is finite
            raise ValueError(f"FCOSHead: prior_probability should lie between 0 and 1, got {self.prior_probability}")
        if self.num_convs:
            check_groups("FCOSHead: in_channels", self.in_channels)
        super().__post_init__()

    @property
    def class_layers(self) -> dict[tuple[str, ...], int]:
        """{path of a layer with outputs for each class: number of outputs per class}."""
        return {("classification_head", "cls_logits"): self.num_anchors}

    def class_inputs(self, channels: int) -> Features:
        """An input for initialisation, which gives the head's parameters their shapes.

        Args:
            channels: C of the features.

        Returns:
            {"level": [1, 1, 1, C]}, zeros.
        """
        return {"level": jnp.zeros((1, 1, 1, channels), self.dtype)}

    def torch_names(self) -> Iterator[TorchName]:
        """Names of the modules in torchvision's FCOSHead, in the order of its state_dict."""
        outputs = {"classification_head": ("cls_logits",), "regression_head": ("bbox_reg", "bbox_ctrness")}
        for branch, predictions in outputs.items():
            for i in range(self.num_convs):  # torch numbers conv, norm and ReLU
                yield TorchName(f"{branch}/conv_{i}", f"{branch}.conv.{3 * i}")
                yield TorchName(f"{branch}/norm_{i}", f"{branch}.conv.{3 * i + 1}")
            for prediction in predictions:
                yield TorchName(f"{branch}/{prediction}", f"{branch}.{prediction}")

    @nn.compact
    def __call__(self, features: Features, extents: Extents = None) -> DenseOutputs:
        """Applies both branches to every level.

        Args:
            features: {name: [B, h, w, C]}, finest first.
            extents: {name: [B, 2] int32} (rows, columns) of each map inside the canvas; ``None`` for the whole maps.

        Returns:
            {"cls_logits": [B, hwA, k], "bbox_regression": [B, hwA, 4], "bbox_ctrness": [B, hwA, 1]}, by
            level, row, column and anchor. "bbox_regression" has the distances (l, t, r, b) >= 0 in anchor sizes.
        """
        tower = functools.partial(
            _Tower,
            self.in_channels,
            self.num_convs,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
        )
        prior = -math.log((1 - self.prior_probability) / self.prior_probability)
        maps = tower(outputs=(("cls_logits", self.num_anchors * self.num_classes, prior),), name="classification_head")(
            features, extents
        )
        maps |= tower(
            outputs=(("bbox_reg", self.num_anchors * 4, 0.0), ("bbox_ctrness", self.num_anchors, 0.0)),
            name="regression_head",
        )(features, extents)

        def flat(levels: list[Array], width: int) -> Array:
            return jnp.concatenate([x.reshape(x.shape[0], -1, width) for x in levels], axis=1)

        return {
            "cls_logits": flat(maps["cls_logits"], self.num_classes),
            "bbox_regression": nn.relu(flat(maps["bbox_reg"], 4)),
            "bbox_ctrness": flat(maps["bbox_ctrness"], 1),
        }
