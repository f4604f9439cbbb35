"""Folds BatchNorm into the convolutions before it, for inference."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from flaxdet.models.detector import Detector
from flaxdet.nn.backbone import ConvNorm, is_foldable
from flaxdet.nn.typed import parts_of

Variables = dict[str, Any]


def fold_batch_norm(model: Any, variables: Mapping[str, Any]) -> tuple[Any, Variables]:
    """Folds each BatchNorm, live or frozen, into the kernel and the bias of the convolution before it.

    For inference: the results are the same up to rounding (the factors are computed in float64). Each convolution is
    followed only by a bias and a ReLU, which accelerators fuse. Folded variables can't be trained as before, saved, or
    converted for torchvision: keep the original variables.

    A part is folded if it declares ``conv_norm_pairs`` and ``without_norms`` (``flaxdet.nn.backbone``), as ``ResNet``,
    ``FeaturePyramidNetwork``, ``BackboneWithFPN`` and ``FastRCNNConvFCHead`` do. Other backbones and heads are not
    changed.

    Args:
        model: from a builder or ``flaxdet.load``.
        variables: {"params": ..., "batch_stats": ...} of the model; they are not changed.

    Returns:
        A model without these BatchNorms, and the folded variables in the dtype of ``variables``: {"params": ...}, and
        "batch_stats" only if a part that is not folded has statistics.

    Raises:
        TypeError: if the model is no detector.
        ValueError: if variables don't fit the model, or the model is folded already.
    """
    if not isinstance(model, Detector):
        raise TypeError(f"expected a detector, got {type(model).__name__}")
    params, stats = _copy(variables.get("params", {})), _copy(variables.get("batch_stats", {}))
    replaced: dict[str, Any] = {}
    for name, part in parts_of(model):
        if "." in name or not is_foldable(part):  # the part that contains this part declares its pairs
            continue
        replaced[name] = part.without_norms()
        for pair in part.conv_norm_pairs:
            _fold(params, stats, pair.below(name))
    folded: Variables = {"params": _without_empty(params)}
    if rest := _without_empty(stats):
        folded["batch_stats"] = rest
    return model.clone(**replaced), folded


def _fold(params: dict[str, Any], stats: dict[str, Any], pair: ConvNorm) -> None:
    """Folds a pair to kernel * f and (bias - mean) * f + shift, with f = scale / sqrt(var + eps); removes the norm."""
    *path, name = pair.conv
    try:
        vectors = {**_taken(params, pair.norm), **_taken(stats, pair.norm)}
        scale, shift, mean, var = (np.asarray(vectors[name], np.float64) for name in ("scale", "bias", "mean", "var"))
        owner = functools.reduce(operator.getitem, path, params)
        layer = owner[name]
        kernel = layer["kernel"]
    except KeyError as error:
        conv, norm = ("/".join(each) for each in (pair.conv, pair.norm))
        raise ValueError(f"variables don't fit the model: no {error} of {conv} and {norm}") from None
    factor = scale / np.sqrt(var + pair.eps)
    bias = np.asarray(layer.get("bias", 0), np.float64)
    owner[name] = {  # not by jnp.asarray, which compiles a program for each shape
        "kernel": jax.device_put((np.asarray(kernel, np.float64) * factor).astype(kernel.dtype)),
        "bias": jax.device_put(((bias - mean) * factor + shift).astype(kernel.dtype)),
    }


def _taken(tree: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """Removes the subtree at a path from a tree and returns it; an empty dict if there is no such path."""
    *path_of_owner, name = path
    for step in path_of_owner:
        tree = tree.get(step, {})
    return tree.pop(name, {})


def _copy(tree: Any) -> Any:
    """A copy of the dicts of a tree, with the same leaves."""
    return jax.tree.map(lambda leaf: leaf, dict(tree))


def _without_empty(tree: dict[str, Any]) -> dict[str, Any]:
    pruned = {name: _without_empty(value) if isinstance(value, dict) else value for name, value in tree.items()}
    return {name: value for name, value in pruned.items() if not (isinstance(value, dict) and not value)}
