"""Which parameters train and which decay, and the parameters divided accordingly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flax import traverse_util

from flaxdet.nn.backbone import trainable_groups_of

Params = Mapping[str, Any]
Tree = dict[str, Any]

ALL_LAYERS = 5  # of a ResNet: layer4, layer3, layer2, layer1, and the stem


def trainable_mask(model: Any, params: Params, *, layers: int | None = None) -> Tree:
    """Says which parameters train, by torchvision's ``trainable_backbone_layers``.

    Of the groups that the backbone declares (``trainable_groups``, see ``flaxdet.nn.backbone``) the first ``layers``
    train. A ResNet's are layer4, layer3, layer2, layer1, and the stem (conv1 and bn1). Everything outside the groups
    always trains. BatchNorm's statistics are no parameters: they move in frozen
    layers too, as torchvision's do (``freeze_bn=True`` keeps them still).

    Args:
        model: the detector.
        params: its ``params``, or their shapes.
        layers: 0 (none of the groups) to 5 (all of a ResNet's; more where a backbone declares more groups); default
            ``model.trainable_backbone_layers``.

    Returns:
        A tree of bools like ``params``.

    Raises:
        ValueError: for layers out of range, or below 5 with a backbone that declares no groups: make a mask of your
            own for it.
    """
    count = model.trainable_backbone_layers if layers is None else layers
    groups = trainable_groups_of(model.backbone)
    most = max(ALL_LAYERS, len(groups))
    if count not in range(most + 1):
        raise ValueError(f"Trainable layers should be in the range [0, {most}], got {count}")
    if count < ALL_LAYERS and not groups:
        name = type(getattr(model.backbone, "body", model.backbone)).__name__
        raise ValueError(
            f"trainable_backbone_layers={count} counts the layers of a ResNet, and the backbone's body is "
            f"{name}: train all of it (trainable_backbone_layers={ALL_LAYERS}), or pass a mask of your own as "
            "`trainable` to create_state and make_train_step"
        )
    frozen = [("backbone", *prefix) for group in groups[count:] for prefix in group]
    return _map_paths(lambda path: all(path[: len(prefix)] != prefix for prefix in frozen), params)


def norm_mask(params: Params) -> Tree:
    """Says which parameters belong to normalisation layers: every leaf beside a leaf named "scale".

    With what ``trainable_mask`` keeps, these are torchvision.ops._utils.split_normalization_params. It depends on the
    tree alone, so it is also what ``optax.masked`` takes for a mask.

    Args:
        params: any tree of Linen parameters.

    Returns:
        A tree of bools like ``params``.
    """
    norms = {path[:-1] for path in traverse_util.flatten_dict(dict(params)) if path[-1] == "scale"}
    return _map_paths(lambda path: path[:-1] in norms, params)


def decay_mask(params: Params, *, norms: bool = False, biases: bool = True) -> Tree:
    """Says which parameters weight decay applies to, for the ``mask`` of ``optax.adamw`` and the like.

    Args:
        params: any tree of Linen parameters.
        norms: decays the scales and biases of normalisation layers.
        biases: decays the biases of other layers.

    Returns:
        A tree of bools like ``params``.
    """
    of_norm = traverse_util.flatten_dict(norm_mask(params))

    def decays(path: tuple[str, ...]) -> bool:
        return norms if of_norm[path] else biases or path[-1] != "bias"

    return _map_paths(decays, params)


def split(params: Params, mask: Params) -> tuple[Tree, Tree]:
    """Divides parameters into those that train and the rest.

    Args:
        params: nested dicts of arrays.
        mask: bools of the same structure.

    Returns:
        (trainable, frozen), nested dicts that lack the other's leaves, so that an optimiser keeps no state and
        autodiff computes no gradient for frozen leaves. ``merge`` is the inverse.

    Raises:
        ValueError: if the mask is of another structure.
    """
    leaves, chosen = (traverse_util.flatten_dict(dict(tree)) for tree in (params, mask))
    if leaves.keys() != chosen.keys():
        odd = "/".join(min(leaves.keys() ^ chosen.keys()))
        raise ValueError(f"the mask should have the structure of the parameters; only one of the two has {odd}")
    trainable = {path: leaf for path, leaf in leaves.items() if chosen[path]}
    frozen = {path: leaf for path, leaf in leaves.items() if not chosen[path]}
    return traverse_util.unflatten_dict(trainable), traverse_util.unflatten_dict(frozen)


def merge(trainable: Params, frozen: Params) -> Tree:
    """Puts the two trees of ``split`` together.

    Args:
        trainable: nested dicts of arrays.
        frozen: nested dicts of others.

    Returns:
        One tree.

    Raises:
        ValueError: if a leaf is in both.
    """
    first, second = (traverse_util.flatten_dict(dict(tree)) for tree in (trainable, frozen))
    if both := first.keys() & second.keys():
        raise ValueError(f"{'/'.join(min(both))} is both trainable and frozen")
    return traverse_util.unflatten_dict({**first, **second})


def _map_paths(function: Callable[[tuple[str, ...]], bool], params: Params) -> Tree:
    leaves = traverse_util.flatten_dict(dict(params))
    return traverse_util.unflatten_dict({path: function(path) for path in leaves})
