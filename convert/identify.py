"""Identifies the detector of a state_dict by keys and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from flaxdet import registry
from flaxdet.convert.rules import COUNTER, canonical_keys, prefixes_of
from flaxdet.files.checkpoint import CheckpointError
from flaxdet.files.messages import one_line

_SHOWN = 8
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


class Identified(NamedTuple):
    """The detector in a state_dict.

    Attributes:
        architecture: the registered architecture.
        num_classes: number of classes, including the background.
        state_dict: the tensors of the detector, by torchvision's names.
        prefix: the prefix of the names in the given state_dict.
    """

    architecture: registry.Architecture
    num_classes: int
    state_dict: dict[str, Any]
    prefix: str


def find(state_dict: Mapping[str, Any], *, source: str = "state_dict") -> Identified | None:
    """Finds a registered detector, alone or as a part of another module (Lightning; a teacher beside its student).

    Args:
        state_dict: tensors by torch key, with any names that `from_torchvision` accepts.
        source: name of the file, for error messages.

    Returns:
        The detector; None if there is none.

    Raises:
        CheckpointError: if there are several detectors.
    """
    state = _state(state_dict)
    found: list[Identified] = []
    for architecture in registry.architectures():
        keys = architecture.keys
        if keys is None:
            continue
        for prefix, count in prefixes_of(state, keys.present).items():
            if count == len(keys.present) and not any(prefix + key in state for key in keys.absent):
                inner = _under(state, prefix)
                if shape := getattr(inner.get(keys.class_key), "shape", ()):
                    found.append(Identified(architecture, int(shape[0]), inner, prefix))
    whole = [each for each in found if not each.prefix]
    if len(whole or found) > 1:
        prefixes = " and ".join(sorted(each.prefix.removesuffix(".")[:80] for each in found)[:_SHOWN])
        raise CheckpointError(
            one_line(
                f"{source}: holds {len(found)} detectors, {prefixes}: choose one by key= (flaxdet convert --key NAME)"
            )
        )
    return next(iter(whole or found), None)


def _state(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The values under torchvision's present names."""
    return {name: state_dict[keys[0]] for name, keys in canonical_keys(state_dict).items()}


def _under(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def describe(state_dict: Mapping[str, Any]) -> str | None:
    """A phrase for error messages: "fcos_resnet50_fpn with 91 classes", "a RetinaNet".

    Args:
        state_dict: tensors by torch key, with any names that `from_torchvision` accepts.

    Returns:
        The phrase; None for an unknown model.
    """
    if (found := find(state_dict)) is not None:
        return f"{found.architecture.name} with {found.num_classes} classes"
    state = _state(state_dict)
    relatives = tuple(each.keys.relative for each in registry.architectures() if each.keys is not None)
    for present, phrase in (*_LARGER, *relatives, *_OTHERS):
        if len(present) in prefixes_of(state, present).values():
            return phrase
    return None


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
        CheckpointError: for a state_dict of any other model, or of several; the message names the models if they are
            known.
    """
    return arguments(find_or_raise(state_dict, source=source))


def find_or_raise(state_dict: Mapping[str, Any], *, source: str) -> Identified:
    """As ``find``; if there is no detector, raises CheckpointError, which describes the content of the state_dict."""
    if (found := find(state_dict, source=source)) is not None:
        return found
    content = describe(state_dict) or "none of torchvision's detectors"
    raise CheckpointError(f"{source}: holds {content}; expected torchvision's {' or '.join(registry.names())}")


def arguments(found: Identified) -> tuple[str, dict[str, Any]]:
    """The name of the builder, and the arguments, as ``identify`` gives them."""
    counters = any(key.startswith("backbone.body.") and key.endswith(COUNTER) for key in found.state_dict)
    frozen = found.architecture.freezable and not counters
    return found.architecture.name, {"num_classes": found.num_classes, "frozen_bn": frozen}
