"""Which detector a state_dict belongs to, told from its keys and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flaxdet.convert.rules import COUNTER, canonical_keys
from flaxdet.files.checkpoint import CheckpointError

FCOS = "fcos_resnet50_fpn"
FASTER_RCNN_V2 = "fasterrcnn_resnet50_fpn_v2"

# All of these keys, none of those: what it is. The first that fits counts.
_BODY = "backbone.body.layer4.2.conv3.weight"
_KNOWN = (
    ({"roi_heads.mask_predictor.mask_fcn_logits.weight"}, set(), "a Mask R-CNN"),
    ({"roi_heads.keypoint_predictor.kps_score_lowres.weight"}, set(), "a Keypoint R-CNN"),
    (
        {
            _BODY,
            "backbone.body.layer3.5.conv3.weight",
            "backbone.fpn.layer_blocks.2.0.weight",
            "backbone.fpn.extra_blocks.p7.weight",
            "head.classification_head.cls_logits.weight",
            "head.regression_head.bbox_ctrness.weight",
        },
        {"backbone.body.layer3.6.conv3.weight", "backbone.fpn.layer_blocks.3.0.weight"},
        FCOS,
    ),
    ({"head.regression_head.bbox_ctrness.weight"}, set(), "an FCOS with another backbone than ResNet-50-FPN"),
    (
        {
            _BODY,
            "backbone.body.layer3.5.conv3.weight",
            "backbone.fpn.layer_blocks.3.1.weight",
            "rpn.head.conv.1.0.weight",
            "roi_heads.box_head.3.1.weight",
            "roi_heads.box_head.5.weight",
            "roi_heads.box_predictor.cls_score.weight",
        },
        {"backbone.body.layer3.6.conv3.weight"},
        FASTER_RCNN_V2,
    ),
    (
        {_BODY, "roi_heads.box_head.fc6.weight", "rpn.head.conv.0.0.weight"},
        {"backbone.body.layer3.6.conv3.weight"},
        "fasterrcnn_resnet50_fpn, torchvision's first version",
    ),
    (
        {"rpn.head.cls_logits.weight", "roi_heads.box_predictor.cls_score.weight"},
        set(),
        "a Faster R-CNN with other parts than version 2 of torchvision's",
    ),
    ({"head.regression_head.bbox_reg.weight"}, set(), "a RetinaNet"),
    ({"head.classification_head.module_list.0.weight"}, set(), "an SSD"),
    ({"head.classification_head.module_list.0.1.weight"}, set(), "an SSDlite"),
    (
        {"conv1.weight", "layer1.0.conv1.weight", "fc.weight"},
        set(),
        "a ResNet classifier, whose weights can only go into a backbone",
    ),
    ({"classifier.4.weight", "backbone.layer1.0.conv1.weight"}, set(), "a segmentation model"),
)


def _match(state_dict: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """What it is, None if unknown, and each value under its present name."""
    state = {name: state_dict[given[0]] for name, given in canonical_keys(state_dict).items()}
    for present, absent, name in _KNOWN:
        if present <= state.keys() and not absent & state.keys():
            return name, state
    return None, state


def describe(state_dict: Mapping[str, Any]) -> str | None:
    """A phrase for error messages: "fcos_resnet50_fpn with 91 classes", "a RetinaNet".

    Args:
        state_dict: tensors by torch key, in any spelling that `from_torchvision` takes.

    Returns:
        The phrase; None for what it does not know.
    """
    name, state = _match(state_dict)
    classes = _classes(name, state)
    return name if classes is None else f"{name} with {classes} classes"


def identify(state_dict: Mapping[str, Any], *, source: str = "state_dict") -> tuple[str, dict[str, Any]]:
    """Tells which builder's model a state_dict belongs to, and with which arguments.

    Args:
        state_dict: tensors by torch key, in any spelling that `from_torchvision` takes.
        source: the file's name, for error messages.

    Returns:
        The builder's name, "fcos_resnet50_fpn" or "fasterrcnn_resnet50_fpn_v2", and its arguments:
        ``num_classes`` (background counted) and ``frozen_bn``, whether the backbone's BatchNorm is frozen.
        A ``num_batches_tracked`` in the backbone tells live from frozen; version 2 is always live.

    Raises:
        CheckpointError: if it is something else; the message says what.
    """
    name, state = _match(state_dict)
    classes = _classes(name, state)
    if name is None or classes is None:
        held = name or "none of torchvision's detectors"
        raise CheckpointError(f"{source}: holds {held}; expected torchvision's {FCOS} or {FASTER_RCNN_V2}")
    counters = any(key.startswith("backbone.body.") and key.endswith(COUNTER) for key in state)
    return name, {"num_classes": classes, "frozen_bn": name == FCOS and not counters}


def _classes(name: str | None, state: Mapping[str, Any]) -> int | None:
    """Number of classes of a supported detector; None for anything else."""
    output = {
        FCOS: "head.classification_head.cls_logits.weight",
        FASTER_RCNN_V2: "roi_heads.box_predictor.cls_score.weight",
    }.get(name or "")
    shape = getattr(state.get(output or ""), "shape", ())
    return int(shape[0]) if shape else None
