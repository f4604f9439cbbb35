"""What backbones and heads declare of themselves, and a backbone of one's own that is frozen and folded by it."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import flaxdet
from flaxdet.models import FCOS
from flaxdet.models.fcos_head import FCOSHead
from flaxdet.models.roi_heads import FastRCNNConvFCHead
from flaxdet.nn import BackboneWithFPN, BatchNorm, ConvNorm, FeaturePyramidNetwork, FrozenBatchNorm, ResNet, Stage
from flaxdet.nn.layers import Conv
from flaxdet.ops import AnchorGenerator
from flaxdet.train import trainable_mask
from tests.drawn import drawn
from tests.tolerances import INVARIANCE_F64


def paths(module, *args, **kwargs) -> set[tuple[str, ...]]:
    """Those of all layers, without the names of their arrays."""
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs))
    return {path[1:-1] for path in traverse_util.flatten_dict(variables)}


def pixels(side: int = 32):
    return jnp.zeros((1, side, side, 3), jnp.float32)


@pytest.mark.parametrize(("depth", "frozen"), [(18, False), (50, False), (50, True)])
def test_a_resnet_declares_every_layer(depth, frozen):
    body = ResNet(depth, frozen_bn=frozen)
    there = paths(body, pixels())
    pairs = body.conv_norm_pairs
    assert {pair.conv for pair in pairs} | {pair.norm for pair in pairs} == there
    assert len(there) == 2 * len(pairs)
    groups = body.trainable_groups
    assert [group[0][0].split("_")[0] for group in groups] == ["layer4", "layer3", "layer2", "layer1", "conv1"]
    prefixes = [prefix for group in groups for prefix in group]
    assert all(sum(path[: len(prefix)] == prefix for prefix in prefixes) == 1 for path in there)
    assert body.without_norms().conv_norm_pairs == ()


def test_a_backbone_passes_on_what_the_body_declares():
    fpn = FeaturePyramidNetwork(16, use_norm=True)
    backbone = BackboneWithFPN(ResNet(18, width=8), fpn, ("c4", "c5"))
    there = paths(backbone, pixels(64))
    assert {path for pair in backbone.conv_norm_pairs for path in (pair.conv, pair.norm)} == there
    assert backbone.stages == (Stage("p4", 16, 16), Stage("p5", 16, 32))
    assert backbone.level_strides == {"p4": 16, "p5": 32}
    assert backbone.trainable_groups[4] == (("body", "conv1"), ("body", "bn1"))
    plain = backbone.clone(fpn=fpn.clone(use_norm=False))
    assert len(plain.conv_norm_pairs) == len(backbone.conv_norm_pairs) - 4


def test_a_box_head_declares_its_pairs():
    head = FastRCNNConvFCHead((4, 3, 3), (4, 6), (5,), use_norm=True)
    declared = {path for pair in head.conv_norm_pairs for path in (pair.conv, pair.norm)}
    assert declared == paths(head, jnp.zeros((2, 3, 3, 4), jnp.float32)) - {("fc_0",)}
    assert head.without_norms().conv_norm_pairs == ()


@pytest.mark.parametrize("depth", [18, 50])
def test_width(depth):
    body = ResNet(depth, width=8)
    found = jax.eval_shape(lambda: body.init_with_output(jax.random.key(0), pixels(64))[0])
    expected = {stage.name: (1, 64 // stage.stride, 64 // stage.stride, stage.channels) for stage in body.stages}
    assert {name: stage.shape for name, stage in found.items()} == expected
    assert expected["c2"][3] == (8 if depth == 18 else 32)


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ({"width": 0}, ValueError, "width should be at least 1, got 0"),
        ({"width": 1.5}, TypeError, r"width should be a whole number, got 1\.5"),
        ({"norm_eps": -1.0}, ValueError, r"norm_eps should be a number of at least 0, got -1\.0"),
    ],
)
def test_options_of_a_resnet(option, error, message):
    with pytest.raises(error, match=f"ResNet: {message}"):
        ResNet(18, **option)


class Own(nn.Module):
    """Two convolutions, each with a bias before its norm, and a third without a norm; both kinds of norm."""

    with_norms: bool = True
    dtype: str = "float64"
    out_channels: int = 4
    stages = (Stage("c3", 4, 4),)
    trainable_groups = ((("last",),), (("deep", "inner"),), (("first",), ("first_norm",)))

    @property
    def conv_norm_pairs(self):
        return (ConvNorm(("first",), ("first_norm",), 0.5), ConvNorm(("deep", "inner"), ("norm",), 0.25))

    def without_norms(self):
        return self.clone(with_norms=False, parent=None)

    @nn.compact
    def __call__(self, pixels, *, canvas=None, train=False):
        x = Conv(4, 3, strides=2, dtype=self.dtype, name="first")(pixels)
        x = BatchNorm(0.5, dtype=self.dtype, name="first_norm")(x) if self.with_norms else x
        x = Deep(self.dtype, name="deep")(nn.relu(x))
        x = FrozenBatchNorm(0.25, dtype=self.dtype, name="norm")(x) if self.with_norms else x
        return {"c3": Conv(4, 1, dtype=self.dtype, name="last")(nn.relu(x))}


class Deep(nn.Module):
    dtype: str

    @nn.compact
    def __call__(self, x):
        return Conv(4, 3, strides=2, dtype=self.dtype, name="inner")(x)


def detector(backbone: BackboneWithFPN, dtype: str = "float32") -> FCOS:
    anchors = AnchorGenerator(((8,),), ((1.0,),))
    head = FCOSHead(4, 1, 3, num_convs=0, dtype=dtype)
    return FCOS(backbone, 3, anchor_generator=anchors, head=head, dtype=dtype)


def test_a_backbone_of_ones_own_is_folded(x64):
    """With the bias that a convolution has already, and with each norm's own eps."""
    fpn = FeaturePyramidNetwork(4, dtype=jnp.float64)
    backbone = BackboneWithFPN(Own(), fpn, ("c3",))
    model = detector(backbone, "float64")
    x = jax.random.normal(jax.random.key(1), (1, 16, 16, 3), jnp.float64)
    body = drawn(jax.eval_shape(lambda: backbone.init(jax.random.key(0), x)))
    variables = {kind: {"backbone": tree} for kind, tree in body.items()}
    folded, fewer = flaxdet.fold_batch_norm(model, variables)
    assert set(fewer) == {"params"}
    expected, found = backbone.apply(body, x), folded.backbone.apply({"params": fewer["params"]["backbone"]}, x)
    np.testing.assert_allclose(found["p3"], expected["p3"], rtol=0, atol=INVARIANCE_F64)
    assert np.abs(expected["p3"]).max() > 0.01


def test_a_backbone_of_ones_own_is_frozen():
    model = detector(BackboneWithFPN(Own(dtype="float32"), FeaturePyramidNetwork(4), ("c3",)))
    params = {"backbone": {"body": {name: {"bias": 0} for name in ("first", "first_norm", "last", "extra")}}, "head": 0}
    params["backbone"]["body"]["deep"] = {"inner": {"kernel": 0}, "other": {"kernel": 0}}

    def frozen(layers: int) -> set[str]:
        mask = traverse_util.flatten_dict(trainable_mask(model, params, layers=layers))
        return {"/".join(path[2:-1]) for path, trains in mask.items() if not trains}

    stem = {"first", "first_norm"}
    assert frozen(0) == {"last", "deep/inner", *stem}
    assert frozen(1) == {"deep/inner", *stem}
    assert frozen(2) == stem
    assert frozen(3) == frozen(4) == frozen(5) == set()
