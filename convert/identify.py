"""Identifies the detector of a state_dict by keys and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flaxdet import registry
from flaxdet.convert.rules import COUNTER, canonical_keys
from flaxdet.files.checkpoint import CheckpointError

# Phrases for state_dicts of other models, by keys. A larger detector has all keys of a registered detector's kind, so
# these come first.
_LARGER = (
    ({"roi_heads.mask_predictor.mask_fcn_logits.weight"}, "a Mask R-CNN"),
    ({"roi_heads.keypoint_predictor.kps_score_lowres.weight"}, "a Keypoint R-CNN"),
)
_OTHERS = (
    ({"head.regression_head.bbox_reg.weight"}, "a RetinaNet"),
    ({"head.classification_head.module_list.0.weight"}, "an SSD"),
    ({"head.classification_head.module_list.0.1.weight"}, "an SSDlite"),
    (
        {"conv1.weight", "layer1.0.conv1.weight", "fc.weight"},
        "a ResNet classifier, whose weights can only go into a backbone",
    ),
    ({"classifier.4.weight", "backbone.layer1.0.conv1.weight"}, "a segmentation model"),
)


def _state(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The values under torchvision's present names."""
    return {name: state_dict[keys[0]] for name, keys in canonical_keys(state_dict).items()}


def _architecture(state: Mapping[str, Any]) -> tuple[registry.Architecture, int] | None:
    """The registered architecture with these keys, and the number of classes."""
    for architecture in registry.architectures():
        keys = architecture.keys
        if keys is not None and keys.present <= state.keys() and not keys.absent & state.keys():
            shape = getattr(state[keys.class_key], "shape", ())
            return (architecture, int(shape[0])) if shape else None
    return None


def describe(state_dict: Mapping[str, Any]) -> str | None:
    """A phrase for error messages: "fcos_resnet50_fpn with 91 classes", "a RetinaNet".

    Args:
        state_dict: tensors by torch key, with any names that `from_torchvision` accepts.

    Returns:
        The phrase; None for an unknown model.
    """
    state = _state(state_dict)
    if (identified := _architecture(state)) is not None:
        architecture, classes = identified
        return f"{architecture.name} with {classes} classes"
    relatives = tuple(each.keys.relative for each in registry.architectures() if each.keys is not None)
    return next((phrase for present, phrase in (*_LARGER, *relatives, *_OTHERS) if present <= state.keys()), None)


def identify(state_dict: Mapping[str, Any], *, source: str = "state_dict") -> tuple[str, dict[str, Any]]:
    """Identifies the builder, and the builder's arguments, of the model of a state_dict.

    Args:
        state_dict: tensors by torch key, with any names that `from_torchvision` accepts.
        source: name of the file, for error messages.

    Returns:
        The name of the builder, such as "fcos_resnet50_fpn", and arguments: ``num_classes`` (with the background) and
        ``frozen_bn``, True for frozen BatchNorm in the backbone. BatchNorm is live if the backbone has a key
        ``num_batches_tracked``, or if torchvision never freezes BatchNorm of this detector.

    Raises:
        CheckpointError: for a state_dict of any other model; the message names the model if it is known.
    """
    state = _state(state_dict)
    identified = _architecture(state)
    if identified is None:
        content = describe(state) or "none of torchvision's detectors"
        raise CheckpointError(f"{source}: holds {content}; expected torchvision's {' or '.join(registry.names())}")
    architecture, classes = identified
    counters = any(key.startswith("backbone.body.") and key.endswith(COUNTER) for key in state)
    return architecture.name, {"num_classes": classes, "frozen_bn": architecture.freezable and not counters}
