"""Which of torchvision's models a state_dict is of, told from its keys; others are named and refused."""

from __future__ import annotations

import numpy as np
import pytest

from flaxdet import registry
from flaxdet.convert import CheckpointError, identify
from flaxdet.convert.reference import torchvision
from tests.convert.states import renamed


def shapes_of(name: str, group: str = "detection", **options) -> dict[str, np.ndarray]:
    torch = pytest.importorskip("torch")
    models = torchvision().models
    with torch.device("meta"):
        model = getattr(getattr(models, group) if group else models, name)(**options)
    return {key: np.broadcast_to(np.float32(0), tensor.shape) for key, tensor in model.state_dict().items()}


NOTHING = {"weights": None, "weights_backbone": None}


@pytest.mark.parametrize("name", registry.names())
def test_older_names(name):
    state = shapes_of(name, **NOTHING)
    old = renamed(renamed(state, "inner_blocks.0.0.", "inner_blocks.0."), "layer_blocks.2.0.", "layer_blocks.2.")
    assert identify(old) == identify(state)


@pytest.mark.parametrize(
    ("name", "group", "options", "expected"),
    [
        ("fasterrcnn_mobilenet_v3_large_fpn", "detection", NOTHING, "a Faster R-CNN with other parts"),
        ("maskrcnn_resnet50_fpn", "detection", NOTHING, "a Mask R-CNN"),
        ("maskrcnn_resnet50_fpn_v2", "detection", NOTHING, "a Mask R-CNN"),
        ("keypointrcnn_resnet50_fpn", "detection", NOTHING, "a Keypoint R-CNN"),
        ("retinanet_resnet50_fpn", "detection", NOTHING, "a RetinaNet"),
        ("retinanet_resnet50_fpn_v2", "detection", NOTHING, "a RetinaNet"),
        ("ssd300_vgg16", "detection", NOTHING, "an SSD"),
        ("ssdlite320_mobilenet_v3_large", "detection", NOTHING, "an SSDlite"),
        ("fcn_resnet50", "segmentation", NOTHING, "a segmentation model"),
        ("deeplabv3_resnet50", "segmentation", NOTHING, "a segmentation model"),
        ("resnet50", "", {"weights": None}, "a ResNet classifier"),
        ("vgg11", "", {"weights": None}, "none of torchvision's detectors"),
    ],
)
def test_identify_names_what_it_cannot_take(name, group, options, expected):
    with pytest.raises(CheckpointError, match=rf"my file: holds {expected}.* expected .*fcos_resnet50_fpn or") as info:
        identify(shapes_of(name, group, **options), source="my file")
    assert "\n" not in str(info.value)


def test_identify_other_backbones():
    state = shapes_of("fcos_resnet50_fpn", **NOTHING)
    deeper = state | {"backbone.body.layer3.6.conv3.weight": np.zeros(1)}
    with pytest.raises(CheckpointError, match="an FCOS with another backbone"):
        identify(deeper)
    state["head.classification_head.cls_logits.weight"] = "text"
    with pytest.raises(CheckpointError):
        identify(state)
