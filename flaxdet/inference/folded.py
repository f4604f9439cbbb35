"""BatchNorm folded for inference: once for given variables, where the model allows it."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Any

import jax

from flaxdet.models.detector import Detector
from flaxdet.models.folding import fold_batch_norm

# The folded pair by the model and the identity of the leaves of its variables. The first leaf to die of those that
# folding replaces takes the entry out, before another array can have the identity. The others the entry keeps alive.
_kept: dict[Hashable, tuple[Detector, Any]] = {}


def folded(model: Detector, variables: Any) -> tuple[Detector, Any]:
    """``fold_batch_norm`` where it applies, computed once for variables in jax arrays and kept as long as they live.

    Folding a ResNet-50 takes a quarter of a second, as long as a small image. Variables in numpy arrays, whose content
    may change, are folded at every call.

    Args:
        model: any detector.
        variables: {"params": ..., "batch_stats": ...} of the model.

    Returns:
        The folded model and its variables, on the devices of the given ones. The very arguments for a model that is
        folded already or has nothing to fold, and for variables divided over several devices.

    Raises:
        ValueError: if variables don't fit the model.
    """
    leaves, structure = jax.tree.flatten(variables)
    if not all(isinstance(leaf, jax.Array) for leaf in leaves):
        return _fold(model, variables)
    key = model, structure, tuple(id(leaf) for leaf in leaves)
    if key in _kept:
        return _kept[key]
    result = _fold(model, variables)
    remaining = {id(leaf) for leaf in jax.tree.leaves(result[1])}
    replaced = [leaf for leaf in leaves if id(leaf) not in remaining]
    if replaced:
        _kept[key] = result
    for leaf in replaced:
        weakref.finalize(leaf, _kept.pop, key, None).atexit = False
    return result


def _fold(model: Detector, variables: Any) -> tuple[Detector, Any]:
    leaves = [leaf for leaf in jax.tree.leaves(variables) if isinstance(leaf, jax.Array)]
    divided = any(not leaf.is_fully_replicated for leaf in leaves)
    body = getattr(getattr(model, "backbone", None), "body", None)
    if getattr(body, "folded", False) or divided:
        return model, variables
    made, fewer = fold_batch_norm(model, variables)
    if made == model:  # a backbone and heads of the user's own
        return model, variables
    if leaves:  # the variables lie on one device, or whole on each of several
        given = {id(leaf) for leaf in leaves}
        place = leaves[0].sharding
        fewer = jax.tree.map(lambda leaf: leaf if id(leaf) in given else jax.device_put(leaf, place), fewer)
    return made, fewer
