"""What a backbone of one's own may return, in which dtype, and what is said of the rest."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze

from flaxdet.models import FCOS, FCOSHead
from flaxdet.models.detector import example_batch
from flaxdet.nn import BackboneWithFPN, FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7
from flaxdet.ops import AnchorGenerator
from tests.models.small import (
    CLASSES,
    DETECTORS,
    WIDTH,
    Plain,
    TwoConvHead,
    batch_of,
    faster_rcnn,
    fcos,
    levels,
    run,
    variables_of,
)
from tests.tiny import TinyBackbone


class Returning(nn.Module):
    """Three maps at strides 8, 16 and 32, returned as one says."""

    how: Any
    out_channels: int = WIDTH

    @nn.compact
    def __call__(self, x):
        return self.how(levels(self, x))


def shapes_of(model, batch=None):
    """What initialising and applying would give."""
    variables = jax.eval_shape(model.init, jax.random.key(0), example_batch())
    return jax.eval_shape(lambda v, b: run(model, v, b), variables, batch_of() if batch is None else batch)


# What is returned


@DETECTORS
def test_any_mapping_is_taken(detector):
    _, stages = shapes_of(detector(Returning(freeze)))
    assert {name: stages[name].shape for name in "012"} == {
        "0": (2, 8, 12, WIDTH),
        "1": (2, 4, 6, WIDTH),
        "2": (2, 2, 3, WIDTH),
    }


ANSWERS = {
    "a tuple": (lambda maps: tuple(maps.values()), TypeError, "a mapping of names to maps.* it returned tuple"),
    "a list": (lambda maps: list(maps.values()), TypeError, "a mapping of names to maps.* it returned list"),
    "nothing": (lambda maps: None, TypeError, "it returned NoneType"),
    "lists of maps": (lambda maps: {"0": list(maps.values())}, TypeError, "it returned a map '0' of type list"),
    "numbers as names": (lambda maps: dict(enumerate(maps.values())), TypeError, "it returned a map 0 of type"),
    "an empty dict": (lambda maps: {}, ValueError, "should return at least one map"),
    "NCHW": (
        lambda maps: {name: x.transpose(0, 3, 1, 2) for name, x in maps.items()},
        ValueError,
        r"\[1, h, w, 32\] .*map '0' has shape \[1, 32, 8, 8\]",
    ),
    "one image": (lambda maps: {name: x[0] for name, x in maps.items()}, ValueError, r"map '0' has shape \[8, 8, 32\]"),
    "other channels": (
        lambda maps: maps | {"1": maps["1"][..., :8]},
        ValueError,
        r"out_channels\); map '1' has shape \[1, 4, 4, 8\]",
    ),
    "coarsest first": (lambda maps: dict(reversed(maps.items())), ValueError, "finest first"),
    "a field's name": (lambda maps: {"backbone": maps["0"]}, ValueError, "map named 'backbone', a name .* uses itself"),
}


@pytest.mark.parametrize("answer", ANSWERS)
@DETECTORS
def test_other_answers_are_refused_at_once(detector, answer):
    how, error, message = ANSWERS[answer]
    with pytest.raises(error, match=f"backbone Returning .*{message}"):
        shapes_of(detector(Returning(how)))


@pytest.mark.parametrize(("detector", "name"), [(fcos, "cls_logits"), (faster_rcnn, "proposals")])
def test_maps_of_the_name_of_a_stage(detector, name):
    with pytest.raises(ValueError, match=f"a map named '{name}'"):
        shapes_of(detector(Returning(lambda maps: {name: maps["0"]})))


# Bodies under a pyramid


class Body(nn.Module):
    """Named stages of 8 channels that count up, so that none is mistaken for another."""

    names: tuple[str, ...]

    @nn.compact
    def __call__(self, x, *, canvas=None, train=False):
        side = [x[:, :: 8 * 2**i, :: 8 * 2**i, :1] * 0 + i + 1 for i in range(3)]
        return {name: jnp.tile(y, (1, 1, 1, 8)) for name, y in zip(self.names, side, strict=True)}


def with_fpn(names, returned=None, extra=None):
    return BackboneWithFPN(Body(names), FeaturePyramidNetwork(WIDTH, extra), returned or names)


@pytest.mark.parametrize("names", [("0", "1", "2"), ("p3", "p4", "p5")])
def test_a_stage_and_a_level_of_one_name(names):
    """Each is sown once: the level under the name that both have, the body's stage under another."""
    model = fcos(with_fpn(names))
    features = functools.partial(model.apply, method="features", mutable=["intermediates"])
    returned, state = jax.jit(features)(variables_of(model), batch_of())
    stages = state["intermediates"]
    assert set(stages) == {*names, *(f"body_{name}" for name in names)}
    assert all(len(values) == 1 for values in stages.values())
    for i, name in enumerate(names):
        np.testing.assert_array_equal(stages[f"body_{name}"][0], np.full((2, 8 >> i, 12 >> i, 8), i + 1, np.float32))
        np.testing.assert_array_equal(stages[name][0], returned[name])
        assert returned[name].shape == (2, 8 >> i, 12 >> i, WIDTH)


def test_pyramids_that_do_not_fit_their_body():
    with pytest.raises(
        ValueError, match=r"returned_stages asks for \['c9'\], and body Body returned \['a', 'b', 'c'\]"
    ):
        shapes_of(fcos(with_fpn(("a", "b", "c"), ("a", "c9"))))
    with pytest.raises(TypeError, match="body OneMap should return a mapping of names to maps, it returned"):
        shapes_of(fcos(BackboneWithFPN(OneMap(), FeaturePyramidNetwork(WIDTH))))
    with pytest.raises(ValueError, match=r"stages \['c3', 'p3', 'c5'\] would make levels \['p3', 'p3', 'p5'\]"):
        shapes_of(fcos(with_fpn(("c3", "p3", "c5"))))
    with pytest.raises(ValueError, match=r"extra_blocks makes levels \['p6', 'p7'\], and the stages make .*'p6'"):
        shapes_of(fcos(with_fpn(("c4", "c5", "c6"), extra=LastLevelP6P7(WIDTH, WIDTH))))
    with pytest.raises(ValueError, match=r"extra_blocks makes levels \['pool'\]"):
        shapes_of(fcos(with_fpn(("c4", "c5", "pool"), extra=LastLevelMaxPool())))


class OneMap(nn.Module):
    @nn.compact
    def __call__(self, x, *, canvas=None, train=False):
        return x


# Channels


def test_channels_that_the_default_head_can_not_take():
    with pytest.raises(ValueError, match=r"backbone Plain: out_channels .* multiple of 32, .*GroupNorm.* 16"):
        FCOS(Plain(16), CLASSES)
    with pytest.raises(ValueError, match=r"FCOSHead: in_channels should be a multiple of 32, .*got 48"):
        FCOSHead(48, 1, CLASSES)
    assert FCOSHead(48, 1, CLASSES, num_convs=0).in_channels == 48  # without a GroupNorm
    own = fcos(Plain(16), head=TwoConvHead())
    assert own.clone(score_thresh=0.5).head == own.head
    assert faster_rcnn(Plain(16)).rpn_head.in_channels == 16


# Dtypes


def test_bfloat16_that_does_not_reach_a_part_is_said():
    anchors = AnchorGenerator((8, 16), (1.0,))
    backbone = BackboneWithFPN(TinyBackbone(), FeaturePyramidNetwork(WIDTH), ("0", "1"))
    message = "FCOS: dtype=bfloat16 does not reach backbone.body TinyBackbone, backbone.fpn FeaturePyramidNetwork: make"
    with pytest.warns(UserWarning, match=message) as caught:
        model = FCOS(backbone, CLASSES, anchor_generator=anchors, dtype=jnp.bfloat16)
    assert caught[0].filename == __file__

    class Subclass(FCOS):
        pass

    with pytest.warns(UserWarning, match="Subclass: dtype=bfloat16 does not reach") as caught:
        Subclass(backbone, CLASSES, anchor_generator=anchors, dtype=jnp.bfloat16)
    assert [warning.filename for warning in caught] == [__file__]
    reached = model.clone(dtype=jnp.bfloat16)  # says nothing: warnings are errors here
    assert reached.backbone.body.dtype == jnp.bfloat16
    shapes_of(reached)
    with pytest.warns(UserWarning, match="FCOS: param_dtype=bfloat16 does not reach backbone TinyBackbone: make"):
        FCOS(TinyBackbone(), CLASSES, anchor_generator=anchors, param_dtype=jnp.bfloat16)
    with pytest.warns(UserWarning, match="FCOS: precision=highest does not reach backbone.fpn FeaturePyramid.*: make"):
        FCOS(backbone, CLASSES, anchor_generator=anchors, precision="highest")
    with pytest.warns(UserWarning, match="FasterRCNN: dtype=bfloat16 does not reach box_head .*, box_predictor "):
        faster_rcnn(Plain(), dtype=jnp.bfloat16)


def test_a_model_of_several_dtypes_can_be_meant():
    """A part's own dtype in a model of the default one, and the filter that the warning names."""
    anchors = AnchorGenerator((8, 16), (1.0,))
    FCOS(TinyBackbone(dtype=jnp.bfloat16), CLASSES, anchor_generator=anchors)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FCOS: dtype=bfloat16 does not reach head ")
        model = FCOS(
            TinyBackbone(dtype=jnp.bfloat16),
            CLASSES,
            head=FCOSHead(WIDTH, 1, CLASSES),
            anchor_generator=anchors,
            dtype=jnp.bfloat16,
        )
    _, stages = shapes_of(model)  # Flax's copies say nothing more
    assert stages["0"].dtype == jnp.bfloat16
    assert stages["cls_logits"].dtype == jnp.float32


def test_bfloat16_that_a_backbone_without_a_dtype_does_not_keep():
    """Flax's layers widen to their parameters' dtype."""
    model = fcos(Plain(), dtype=jnp.bfloat16)
    message = r"the backbone Plain: given pixels in bfloat16, it returned maps in \{'0': 'float32', .*dtype=bfloat16"
    with jax.numpy_dtype_promotion("standard"), pytest.warns(UserWarning, match=message):
        shapes_of(model)
