"""Prepares variables for inference, once: folds BatchNorm into the convolutions, casts weights to the compute dtype."""

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


def store_in_compute_dtype(model: Detector, variables: Mapping[str, Any]) -> Variables:
    """Casts kernels and biases of convolutions and dense layers to the dtype in which the model computes.

    A model with ``dtype=jnp.bfloat16`` casts its float32 weights at each call. Weights that are stored in bfloat16 give
    the same bits, take half of the memory, and need no cast. Only weights of flaxdet's layers are cast, and only to a
    narrower dtype: ``flaxdet.nn.layers`` casts a kernel and a bias to ``dtype`` before anything else, while a norm uses
    its scale and shift in float32, and a layer of another library may not cast at all.

    Args:
        model: any detector.
        variables: {"params": ..., "batch_stats": ...} of the model; they are not changed.

    Returns:
        The variables, with these weights in the dtype of the model, as numpy arrays; other leaves are the same objects.
    """
    dtype = np.dtype(model.dtype)
    params = dict(variables.get("params", {}))
    for field in params:
        part = getattr(model, field, None)
        parts = [] if part is None else [part, *(inner for _, inner in parts_of(part))]
        if parts and all(_computes_in(dtype, inner) for inner in parts):
            params[field] = _cast_layers(params[field], dtype)
    return {**variables, "params": params}


def _computes_in(dtype: np.dtype, part: Any) -> bool:
    """Whether a part is one of flaxdet's, and the part's layers compute in ``dtype``."""
    return type(part).__module__.startswith("flaxdet.") and getattr(part, "dtype", dtype) == dtype


def _cast_layers(tree: Any, dtype: np.dtype) -> Any:
    """The tree with kernels, and the biases beside kernels, in ``dtype`` if that is narrower."""

    def cast(leaf: Any) -> Any:  # by numpy: jax would compile a program for each shape
        return np.asarray(leaf).astype(dtype) if leaf.dtype.itemsize > dtype.itemsize else leaf

    if not isinstance(tree, Mapping):
        return tree
    if "kernel" not in tree:
        return {name: _cast_layers(value, dtype) for name, value in tree.items()}
    return {name: cast(leaf) for name, leaf in tree.items()}


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
