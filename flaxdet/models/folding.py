"""BatchNorm folded into the convolutions before it, for inference."""

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
    """Multiplies each BatchNorm, live or frozen, into the kernel before it, and makes the rest of it a bias.

    For inference: the answers are the same but for rounding (the factors are computed in float64), and each convolution
    is left with a bias and a ReLU, which accelerators fuse. Folded variables can't be trained as before, saved, or
    handed to torchvision: keep those that were given.

    Folded are the parts that declare ``conv_norm_pairs`` and ``without_norms`` (``flaxdet.nn.backbone``), as
    torchvision's parts do: ``ResNet``, ``FeaturePyramidNetwork`` and ``FastRCNNConvFCHead``. Other backbones and heads
    stay as they are.

    Args:
        model: from a builder or ``flaxdet.load``.
        variables: {"params": ..., "batch_stats": ...} of the model; they are not changed.

    Returns:
        A model without these BatchNorms, and its variables, in the dtype that the given ones have; {"params": ...},
        and "batch_stats" only where a part of another kind has some.

    Raises:
        TypeError: if the model is no detector.
        ValueError: if variables don't fit the model, or the model is folded already.
    """
    if not isinstance(model, Detector):
        raise TypeError(f"expected a detector, got {type(model).__name__}")
    params, stats = _copy(variables.get("params", {})), _copy(variables.get("batch_stats", {}))
    replaced: dict[str, Any] = {}
    for name, part in parts_of(model):
        if "." in name or not is_foldable(part):  # a part of a part is its owner's to declare
            continue
        replaced[name] = part.without_norms()
        for pair in part.conv_norm_pairs:
            _fold(params, stats, pair.below(name))
    folded: Variables = {"params": _without_empty(params)}
    if rest := _without_empty(stats):
        folded["batch_stats"] = rest
    return model.clone(**replaced), folded


def _fold(params: dict[str, Any], stats: dict[str, Any], pair: ConvNorm) -> None:
    """kernel * f and bias * f + shift - mean * f, with f = scale / sqrt(var + eps); the norm is taken out."""
    *path, name = pair.conv
    try:
        vectors = {**_taken(params, pair.norm), **_taken(stats, pair.norm)}
        scale, bias, mean, var = (np.asarray(vectors[name], np.float64) for name in ("scale", "bias", "mean", "var"))
        owner = functools.reduce(operator.getitem, path, params)
        layer = owner[name]
        kernel = layer["kernel"]
    except KeyError as error:
        conv, norm = ("/".join(each) for each in (pair.conv, pair.norm))
        raise ValueError(f"variables don't fit the model: no {error} of {conv} and {norm}") from None
    factor = scale / np.sqrt(var + pair.eps)
    own_bias = np.asarray(layer.get("bias", 0), np.float64)
    owner[name] = {  # not by jnp.asarray, which compiles a program for each shape
        "kernel": jax.device_put((np.asarray(kernel, np.float64) * factor).astype(kernel.dtype)),
        "bias": jax.device_put(((own_bias - mean) * factor + bias).astype(kernel.dtype)),
    }


def _taken(tree: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """Takes what lies at a path out of a tree; nothing where there is no such path."""
    *path_of_owner, name = path
    for step in path_of_owner:
        tree = tree.get(step, {})
    return tree.pop(name, {})


def _copy(tree: Any) -> Any:
    """The same leaves in dicts of its own."""
    return jax.tree.map(lambda leaf: leaf, dict(tree))


def _without_empty(tree: dict[str, Any]) -> dict[str, Any]:
    pruned = {name: _without_empty(value) if isinstance(value, dict) else value for name, value in tree.items()}
    return {name: value for name, value in pruned.items() if not (isinstance(value, dict) and not value)}
