"""Which detector a state_dict belongs to, told from its keys and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flaxdet import registry
from flaxdet.convert.rules import COUNTER, canonical_keys
from flaxdet.files.checkpoint import CheckpointError

# What else a state_dict may be, by keys that it has: first what has the keys of a known kind of detector too.
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
    """Each value under its present name."""
    return {name: state_dict[given[0]] for name, given in canonical_keys(state_dict).items()}


def _architecture(state: Mapping[str, Any]) -> tuple[registry.Architecture, int] | None:
    """The registered architecture that has such keys, and the number of classes."""
    for architecture in registry.architectures():
        keys = architecture.keys
        if keys is not None and keys.present <= state.keys() and not keys.absent & state.keys():
            shape = getattr(state[keys.class_key], "shape", ())
            return (architecture, int(shape[0])) if shape else None
    return None


def describe(state_dict: Mapping[str, Any]) -> str | None:
    """A phrase for error messages: "fcos_resnet50_fpn with 91 classes", "a RetinaNet".

    Args:
        state_dict: tensors by torch key, in any spelling that `from_torchvision` takes.

    Returns:
        The phrase; None for what it does not know.
    """
    state = _state(state_dict)
    if (found := _architecture(state)) is not None:
        return f"{found[0].name} with {found[1]} classes"
    relatives = tuple(each.keys.relative for each in registry.architectures() if each.keys is not None)
    return next((phrase for present, phrase in (*_LARGER, *relatives, *_OTHERS) if present <= state.keys()), None)


def identify(state_dict: Mapping[str, Any], *, source: str = "state_dict") -> tuple[str, dict[str, Any]]:
    """Tells which builder's model a state_dict belongs to, and with which arguments.

    Args:
        state_dict: tensors by torch key, in any spelling that `from_torchvision` takes.
        source: the file's name, for error messages.

    Returns:
        The builder's name, such as "fcos_resnet50_fpn", and its arguments: ``num_classes`` (background counted) and
        ``frozen_bn``, whether the backbone's BatchNorm is frozen. A ``num_batches_tracked`` in the backbone tells live
        from frozen; a detector whose BatchNorm torchvision never freezes is live.

    Raises:
        CheckpointError: if it is something else; the message says what.
    """
    state = _state(state_dict)
    found = _architecture(state)
    if found is None:
        held = describe(state) or "none of torchvision's detectors"
        raise CheckpointError(f"{source}: holds {held}; expected torchvision's {' or '.join(registry.names())}")
    architecture, classes = found
    counters = any(key.startswith("backbone.body.") and key.endswith(COUNTER) for key in state)
    return architecture.name, {"num_classes": classes, "frozen_bn": architecture.freezable and not counters}
