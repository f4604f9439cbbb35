"""``clone``: options that reach every part, parts that are made again, and parts that are not."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from flaxdet import registry
from flaxdet.models import FCOS, FasterRCNN, FastRCNNPredictor, FCOSHead, RPNHead, TwoMLPHead
from flaxdet.models.detector import example_batch
from flaxdet.nn import BackboneWithFPN, FeaturePyramidNetwork, LastLevelP6P7, ResNet
from flaxdet.ops import AnchorGenerator
from tests.models.small import CLASSES, DETECTORS, WIDTH, OwnPredictor, Plain, TwoConvHead, batch_of, faster_rcnn, fcos
from tests.parity.sides import FCOS_NAME, V2_NAME

OPTIONS = {"dtype": jnp.bfloat16, "param_dtype": jnp.float16, "precision": jax.lax.Precision.HIGHEST}


@pytest.mark.parametrize("name", [FCOS_NAME, V2_NAME])
def test_options_reach_every_part_of_a_builders_model(name):
    model = registry.make_model(name, num_classes=3)
    kept = hash(model)
    cloned = model.clone(**OPTIONS)
    expected = registry.make_model(name, num_classes=3, **OPTIONS)
    assert cloned == expected
    assert hash(cloned) == hash(expected)
    assert cloned.backbone.body.dtype == cloned.backbone.fpn.dtype == jnp.bfloat16  # readable, unbound
    back = cloned.clone(dtype="float32", param_dtype=None, precision=None)
    assert back == model
    assert hash(back) == hash(model) == kept
    # one option alone leaves the other two
    assert model.clone(param_dtype=jnp.float16) == registry.make_model(name, num_classes=3, param_dtype=jnp.float16)


@pytest.mark.parametrize("detector", [fcos, faster_rcnn])
def test_the_parts_compute_and_store_as_the_clone_says(detector):
    backbone = BackboneWithFPN(ResNet(18), FeaturePyramidNetwork(WIDTH, LastLevelP6P7(WIDTH, WIDTH)), ("c5",))
    model = detector(backbone).clone(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    variables = jax.eval_shape(model.init, jax.random.key(0), example_batch())
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.bfloat16)}
    _, state = jax.eval_shape(lambda v, b: model.apply(v, b, mutable=["intermediates"]), variables, batch_of())
    stages = state["intermediates"]
    network = {"c2", "c5", "p5", "p6", "p7"} | ({"cls_logits"} if detector is fcos else {"roi_features"})
    assert {stages[name][0].dtype for name in network} == {jnp.dtype(jnp.bfloat16)}


class Twice(nn.Module):
    """Flax's own layers as fields, of which one stands in two places."""

    layers: tuple[nn.Module, ...]
    last: nn.Module
    out_channels: int = WIDTH

    @nn.compact
    def __call__(self, x):
        for layer in (*self.layers, self.last):
            x = layer(x)
        return x


def test_parts_of_parts_and_shared_parts():
    shared = nn.Conv(3, (3, 3), padding=1)
    nested = nn.Sequential([nn.Conv(3, (8, 8), strides=8, padding=0), nn.relu])
    model = fcos(
        Twice((nested, shared, shared), nn.Conv(WIDTH, (1, 1))), anchor_generator=AnchorGenerator((8,), (1.0,))
    )
    for option, value, default in (
        ("dtype", jnp.bfloat16, None),
        ("param_dtype", jnp.bfloat16, jnp.float32),
        ("precision", jax.lax.Precision.HIGH, None),
    ):
        updates: dict[str, Any] = {option: value}
        backbone = model.clone(**updates).backbone
        layers = [backbone.layers[0].layers[0], backbone.layers[1], backbone.last]
        assert [getattr(layer, option) for layer in layers] == [value] * 3
        assert backbone.layers[1] is backbone.layers[2]
        assert getattr(model.backbone.last, option) == default  # the original stays
    # None is the default of a flaxdet module; a Flax layer takes what it stands for
    assert model.clone(param_dtype=None).backbone.last.param_dtype == jnp.float32
    cloned = model.clone(dtype=jnp.bfloat16)
    paths = [
        jax.tree.structure(jax.eval_shape(each.init, jax.random.key(0), example_batch())) for each in (model, cloned)
    ]
    assert paths[0] == paths[1]


def test_a_module_takes_its_own_parts_along():
    fpn = FeaturePyramidNetwork(WIDTH, LastLevelP6P7(WIDTH, WIDTH)).clone(dtype=jnp.bfloat16)
    assert fpn == FeaturePyramidNetwork(WIDTH, LastLevelP6P7(WIDTH, WIDTH, dtype=jnp.bfloat16), dtype=jnp.bfloat16)


def test_given_parts_stay_as_given():
    head = FCOSHead(WIDTH, 1, CLASSES, num_convs=2)
    model = fcos(Plain(), head=head, anchor_generator=AnchorGenerator((8, 16), (1.0,)))
    other = model.clone(score_thresh=0.5, detections_per_img=3)
    assert other.head is head
    assert other.anchor_generator is model.anchor_generator
    given = FCOSHead(WIDTH, 1, 3, dtype=jnp.bfloat16, precision="high")
    assert model.clone(dtype=jnp.bfloat16, num_classes=3, head=given).head is given


@DETECTORS
def test_another_number_of_classes(detector):
    if detector is fcos:
        model = FCOS(Plain(), CLASSES, dtype=jnp.bfloat16)
        assert model.clone(num_classes=3) == FCOS(Plain(), 3, dtype=jnp.bfloat16)
        part = {"head": TwoConvHead()}
        own, expected = fcos(Plain(), **part), FCOSHead(WIDTH, 1, 3)
    else:
        model = FasterRCNN(Plain(), CLASSES, dtype=jnp.bfloat16)
        assert model.clone(num_classes=3) == FasterRCNN(Plain(), 3, dtype=jnp.bfloat16)
        part = {"box_predictor": OwnPredictor()}
        own, expected = faster_rcnn(Plain(), **part), FastRCNNPredictor(1024, 3)
    name, given = part.popitem()
    with pytest.raises(ValueError, match=rf"clone\(num_classes=3\): the {name} {type(given).__name__} was given"):
        own.clone(num_classes=3)
    updates: dict[str, Any] = {"num_classes": 3, name: None}
    assert getattr(own.clone(**updates), name) == expected
    assert own.clone(num_classes=own.num_classes) == own


def test_a_known_predictor_that_was_given_is_not_made_again():
    """torchvision's rule: with a predictor there is no number of classes, and the predictor decides."""
    model = FasterRCNN(Plain(), box_predictor=FastRCNNPredictor(1024, CLASSES))
    with pytest.raises(ValueError, match="the box_predictor FastRCNNPredictor was given to FasterRCNN"):
        model.clone(num_classes=3)
    assert model.clone(num_classes=3, box_predictor=None) == FasterRCNN(Plain(), 3)


def test_parts_follow_what_they_are_made_of():
    class Narrow(Plain):
        out_channels: int = 64

    model = FasterRCNN(Plain(), 3)
    cloned = model.clone(backbone=Narrow(), rpn_anchor_generator=AnchorGenerator((16, 32, 64), (1.0,)))
    assert cloned.rpn_head == RPNHead(64, 1)
    assert cloned.box_head == TwoMLPHead(64 * 49, 1024)
    kept = model.clone(backbone=Narrow(), box_head=model.box_head)
    assert kept.box_head == model.box_head
    assert FCOS(Plain(), 3).clone(backbone=Narrow()).head == FCOSHead(64, 1, 3)


@DETECTORS
def test_a_bound_model_knows_the_parts_that_it_made(detector):
    """Binding names the parts."""
    model = FCOS(Plain(), CLASSES) if detector is fcos else FasterRCNN(Plain(), CLASSES)
    cloned = model.bind({"params": {}}).clone(num_classes=3, dtype=jnp.bfloat16)
    if detector is fcos:
        assert cloned.head == FCOSHead(WIDTH, 1, 3, dtype=jnp.bfloat16)
    else:
        assert cloned.rpn_head == RPNHead(WIDTH, 3, dtype=jnp.bfloat16)
        assert cloned.box_predictor == FastRCNNPredictor(1024, 3, dtype=jnp.bfloat16)
