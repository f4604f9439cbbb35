"""Replaceable parts: heads, predictors, pools and anchors of one's own, and what does not fit together."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from flaxdet.models import FCOS, FasterRCNN, FastRCNNPredictor, FCOSHead, MultiScaleRoIAlign, RPNHead, TwoMLPHead
from flaxdet.models.detector import example_batch
from flaxdet.ops import AnchorGenerator
from tests.models.small import (
    CLASSES,
    WIDTH,
    OwnPredictor,
    OwnRPNHead,
    Plain,
    TwoConvHead,
    WithBoth,
    batch_of,
    faster_rcnn,
    fcos,
    run,
    variables_of,
)


def test_fcos_with_a_head_of_ones_own():
    model = fcos(WithBoth(), head=TwoConvHead())
    variables = variables_of(model)
    assert set(variables["params"]["head"]) == {"cls_logits", "bbox_regression", "bbox_ctrness"}
    assert run(model, variables, batch_of())[0].valid.any()
    with pytest.raises(ValueError, match="head TwoConvHead takes no `extents` argument"):
        jax.eval_shape(model.apply, variables, batch_of(bucket=(128, 128)))
    deeper = fcos(WithBoth(), head=FCOSHead(WIDTH, 1, CLASSES, num_convs=2))
    assert "conv_2" not in variables_of(deeper)["params"]["head"]["regression_head"]


class OwnBoxHead(nn.Module):
    """Averages the pooled map; like TwoMLPHead it needs to know neither the mode nor the valid slots."""

    @nn.compact
    def __call__(self, x):
        return jnp.mean(x, (1, 2))


@pytest.mark.parametrize(
    "parts",
    [
        {"rpn_head": OwnRPNHead()},
        {
            "box_roi_pool": MultiScaleRoIAlign(("0", "2"), (3, 5), 1),
            "box_head": OwnBoxHead(),
            "box_predictor": FastRCNNPredictor(WIDTH, CLASSES),
        },
        {"box_head": OwnBoxHead(), "box_predictor": OwnPredictor()},
        {"box_roi_pool": MultiScaleRoIAlign(["1"], 3), "box_head": None, "box_predictor": FastRCNNPredictor(1024, 5)},
    ],
    ids=["rpn_head", "pool and head", "head and predictor", "default box_head of another pool"],
)
def test_faster_rcnn_with_parts_of_ones_own(parts):
    model = faster_rcnn(WithBoth(), **parts)
    variables = jax.eval_shape(model.init, jax.random.key(0), example_batch())
    detections, stages = jax.eval_shape(functools.partial(run, model), variables, batch_of())
    assert detections.boxes.shape == (2, 20, 4)
    pool = parts.get("box_roi_pool", MultiScaleRoIAlign())
    assert stages["roi_features"].shape == (2, 12, *pool.output_size, WIDTH)
    assert stages["class_logits"].shape == (2, 12, CLASSES)
    if "rpn_head" in parts:
        assert set(variables["params"]["rpn_head"]) == {"logits", "deltas"}
        with pytest.raises(ValueError, match="rpn_head OwnRPNHead takes no `extents` argument"):
            jax.eval_shape(model.apply, variables, batch_of(bucket=(128, 128)))


def test_defaults_are_torchvisions_parts():
    model = FasterRCNN(Plain(), CLASSES)
    assert model.rpn_head == RPNHead(WIDTH, 3)
    assert model.box_head == TwoMLPHead(WIDTH * 49, 1024)
    assert model.box_predictor == FastRCNNPredictor(1024, CLASSES)
    assert model.box_roi_pool == MultiScaleRoIAlign(output_size=7, sampling_ratio=2)
    assert model.rpn_anchor_generator == AnchorGenerator((32, 64, 128, 256, 512), (0.5, 1.0, 2.0))
    detector = FCOS(Plain(), CLASSES)
    assert detector.head == FCOSHead(WIDTH, 1, CLASSES)
    assert detector.anchor_generator == AnchorGenerator((8, 16, 32, 64, 128), (1.0,))


def test_num_classes_and_box_predictor():
    with pytest.raises(ValueError, match="num_classes should not be None when box_predictor is not specified"):
        FasterRCNN(Plain())
    with pytest.raises(ValueError, match="num_classes should be None when box_predictor is specified"):
        FasterRCNN(Plain(), 3, box_predictor=FastRCNNPredictor(1024, CLASSES))
    with pytest.raises(ValueError, match="num_classes should be None when box_predictor is specified"):
        FasterRCNN(Plain(), 3, box_predictor=OwnPredictor())


def test_parts_of_the_wrong_kind():
    with pytest.raises(TypeError, match="rpn_anchor_generator should be of type AnchorGenerator or None"):
        FasterRCNN(Plain(), 3, rpn_anchor_generator=((32,),))
    with pytest.raises(TypeError, match="box_roi_pool should be of type MultiScaleRoIAlign or None"):
        FasterRCNN(Plain(), 3, box_roi_pool=lambda *_: None)
    with pytest.raises(TypeError, match="anchor_generator should be of type AnchorGenerator or None"):
        FCOS(Plain(), 3, anchor_generator="anchors")
    with pytest.raises(ValueError, match=r"num_anchors_per_location\(\)\[0\] should be 1 instead of 3"):
        FCOS(Plain(), 3, anchor_generator=AnchorGenerator((8, 16, 32), (0.5, 1.0, 2.0)))


def test_featmap_names_that_match_nothing():
    model = faster_rcnn(Plain(), box_roi_pool=MultiScaleRoIAlign(("p2", "p3")))
    with pytest.raises(ValueError, match=r"none of featmap_names \['p2', 'p3'\] is among .*\['0', '1', '2'\]"):
        jax.eval_shape(model.init, jax.random.key(0), example_batch())
