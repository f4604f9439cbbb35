"""The code that all builders share: a model and variables from a builder's arguments, by torchvision's rules."""

from __future__ import annotations

import warnings
from typing import Any

import jax

from flaxdet import registry
from flaxdet.convert.state_dict import backbone_from_torchvision, from_torchvision
from flaxdet.models.initial import initial_variables
from flaxdet.registry import Architecture
from flaxdet.zoo.weights import WeightsEnum

MOST_LAYERS = 5


def build(
    architecture: Architecture,
    weights: Any,
    weights_backbone: WeightsEnum | None,
    *,
    progress: bool,
    num_classes: int | None,
    trainable_backbone_layers: int | None,
    key: jax.Array | None,
    **options: Any,
) -> tuple[Any, dict[str, Any]]:
    """Makes the model and the variables that a builder returns.

    As in torchvision, weights of the whole model replace weights of the backbone. In a detector that torchvision builds
    on FrozenBatchNorm2d, BatchNorm is frozen if anything is pretrained, and live otherwise.

    Args:
        architecture: the architecture of the builder.
        weights: a member of the architecture's weight enum, the name of a member, or None.
        weights_backbone: a member of the weight enum of the backbone's body, or None.
        progress: shows a progress bar while downloading.
        num_classes: number of classes, including the background; default: the number of the weights, else 91.
        trainable_backbone_layers: 0 to 5; default 3, or 5 if nothing is pretrained.
        key: random key of the initialisation; default ``jax.random.key(0)``.
        **options: options of ``registry.make_model``.

    Returns:
        The model and its variables {"params": ..., "batch_stats": ...}.

    Raises:
        TypeError, ValueError, flaxdet.files.download.DownloadError: as each builder documents.
    """
    member = None if architecture.weights is None else architecture.weights.verify(weights)
    if member is not None:
        weights_backbone = None
        expected = len(member.meta["categories"])
        if num_classes not in (None, expected):
            raise ValueError(
                f"The parameter 'num_classes' expected value {expected} but got {num_classes} instead "
                f"({member} were trained on {expected} classes)."
            )
        num_classes = expected
        options = {**member.options, **options}
    elif num_classes is None:
        num_classes = registry.NUM_COCO_CLASSES
    is_trained = member is not None or weights_backbone is not None
    layers = _validate_trainable_layers(is_trained, trainable_backbone_layers)
    model = registry.make_model(
        architecture.name,
        num_classes=num_classes,
        frozen_bn=architecture.freezable and is_trained,
        trainable_backbone_layers=layers,
        **options,
    )
    if member is not None:
        return model, from_torchvision(model, member.get_state_dict(progress=progress))
    variables = initial_variables(model, jax.random.key(0) if key is None else key)
    if weights_backbone is not None:
        state_dict = weights_backbone.get_state_dict(progress=progress)
        variables = backbone_from_torchvision(model, variables, state_dict)
    return model, variables


def _validate_trainable_layers(is_trained: bool, layers: int | None, default: int = 3) -> int:
    """The number of trainable backbone layers. Reproduces torchvision's ``_validate_trainable_layers``."""
    if not is_trained:
        if layers is not None:
            warnings.warn(
                "Changing trainable_backbone_layers has no effect if neither weights nor weights_backbone are "
                f"given: all {MOST_LAYERS} layers are trainable",
                stacklevel=4,
            )
        return MOST_LAYERS
    if layers is None:
        return default
    if not 0 <= layers <= MOST_LAYERS:
        raise ValueError(f"Trainable backbone layers should be in the range [0, {MOST_LAYERS}], got {layers}")
    return layers
