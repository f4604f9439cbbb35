"""Prepares variables for inference, once: folds BatchNorm, and stores the weights in the dtype of the computation."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Any

import jax

from flaxdet.models.detector import Detector
from flaxdet.models.folding import fold_batch_norm, store_in_compute_dtype
from flaxdet.xla.layouts import put_weights

# The folded model and variables, by the model and the ids of the leaves of the variables. An entry has references to
# the leaves that folding does not replace, so these ids stay valid. When the first of the replaced leaves is deleted,
# the entry is removed, before another array can get the same id.
_cache: dict[Hashable, tuple[Detector, Any]] = {}


def folded(model: Detector, variables: Any) -> tuple[Detector, Any]:
    """``fold_batch_norm`` and ``store_in_compute_dtype``, if there is something to do. Caches the result.

    Folding a ResNet-50 takes a quarter of a second, as long as detection in a small image. The cache keeps the result
    for variables in jax arrays, as long as the variables live. Variables in numpy arrays, whose content may change, are
    folded at every call.

    Args:
        model: any detector.
        variables: {"params": ..., "batch_stats": ...} of the model.

    Returns:
        The folded model and the prepared variables, on the devices of ``variables``. The arguments themselves if there
        is nothing to do, or the variables are divided over several devices.

    Raises:
        ValueError: if variables don't fit the model.
    """
    leaves, structure = jax.tree.flatten(variables)
    if not all(isinstance(leaf, jax.Array) for leaf in leaves):
        return _fold(model, variables)
    key = model, structure, tuple(id(leaf) for leaf in leaves)
    if key in _cache:
        return _cache[key]
    result = _fold(model, variables)
    remaining = {id(leaf) for leaf in jax.tree.leaves(result[1])}
    replaced = [leaf for leaf in leaves if id(leaf) not in remaining]
    if replaced:
        _cache[key] = result
    for leaf in replaced:
        weakref.finalize(leaf, _cache.pop, key, None).atexit = False
    return result


def _fold(model: Detector, variables: Any) -> tuple[Detector, Any]:
    leaves = [leaf for leaf in jax.tree.leaves(variables) if isinstance(leaf, jax.Array)]
    if any(not leaf.is_fully_replicated for leaf in leaves):
        return model, variables
    body = getattr(getattr(model, "backbone", None), "body", None)
    folded_model, prepared = model, variables
    if not getattr(body, "folded", False):
        folded_model, prepared = fold_batch_norm(model, variables)
    if folded_model == model:  # folded already, or a custom backbone and custom heads, with nothing to fold
        folded_model, prepared = model, variables
    prepared = store_in_compute_dtype(folded_model, prepared)
    original = {id(leaf) for leaf in jax.tree.leaves(variables)}
    if folded_model is model and all(id(leaf) in original for leaf in jax.tree.leaves(prepared)):
        return model, variables
    if leaves:  # the variables are on one device, or replicated over several devices
        prepared = put_weights(prepared, leaves[0].sharding)
    return folded_model, prepared
