"""BatchNorm folded into the convolutions before it, for inference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from flaxdet.models.detector import Detector
from flaxdet.models.roi_heads import FastRCNNConvFCHead
from flaxdet.nn.fpn import BackboneWithFPN
from flaxdet.nn.resnet import ResNet

Variables = dict[str, Any]

_EPSILON = 1e-5  # of every BatchNorm of torchvision's detectors, live or frozen


def fold_batch_norm(model: Any, variables: Mapping[str, Any]) -> tuple[Any, Variables]:
    """Multiplies each BatchNorm, live or frozen, into the kernel before it, and makes the rest of it a bias.

    For inference: the answers are the same but for rounding (the factors are computed in float64), and each convolution
    is left with a bias and a ReLU, which accelerators fuse. Folded variables can't be trained as before, saved, or
    handed to torchvision: keep those that were given.

    What is folded are torchvision's parts: ``ResNet``, ``FeaturePyramidNetwork`` and ``FastRCNNConvFCHead``. Other
    backbones and heads stay as they are.

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
    backbone = model.backbone
    if isinstance(backbone, BackboneWithFPN):
        body, fpn = backbone.body, backbone.fpn
        if isinstance(body, ResNet):
            if body.folded:
                raise ValueError("the model's BatchNorm is folded already")
            _fold_resnet(*(_at(tree, "backbone", "body") for tree in (params, stats)))
            body = body.clone(folded=True, frozen_bn=False, freeze_bn=False, parent=None)
        if fpn.use_norm:
            pyramid, pyramid_stats = (_at(tree, "backbone", "fpn") for tree in (params, stats))
            for name in [name for name, block in pyramid.items() if "norm" in block]:
                _fold(pyramid[name], "conv", "norm", _at(pyramid_stats, name))
            fpn = fpn.clone(use_norm=False, freeze_bn=False, parent=None)
        replaced["backbone"] = backbone.clone(body=body, fpn=fpn, parent=None)
    head = getattr(model, "box_head", None)
    if isinstance(head, FastRCNNConvFCHead) and head.use_norm:
        for i in range(len(head.conv_layers)):
            _fold(_at(params, "box_head"), f"conv_{i}", f"norm_{i}", _at(stats, "box_head"))
        replaced["box_head"] = head.clone(use_norm=False, freeze_bn=False, parent=None)
    folded: Variables = {"params": _without_empty(params)}
    if rest := _without_empty(stats):
        folded["batch_stats"] = rest
    return model.clone(**replaced), folded


def _fold_resnet(params: dict[str, Any], stats: dict[str, Any]) -> None:
    _fold(params, "conv1", "bn1", stats)
    for name, block in params.items():
        if name.startswith("layer"):
            for conv in [key for key in block if "conv" in key]:
                _fold(block, conv, conv.replace("conv", "bn"), _at(stats, name))


def _fold(params: dict[str, Any], conv: str, norm: str, stats: dict[str, Any]) -> None:
    """kernel * f and bias = shift - mean * f, with f = scale / sqrt(var + eps); the norm's vectors are taken out."""
    try:
        vectors = {**params.pop(norm, {}), **stats.pop(norm)}
        scale, bias, mean, var = (np.asarray(vectors[name], np.float64) for name in ("scale", "bias", "mean", "var"))
        kernel = params[conv]["kernel"]
    except KeyError as error:
        raise ValueError(f"variables don't fit the model: no {error} beside {conv} and {norm}") from None
    factor = scale / np.sqrt(var + _EPSILON)
    params[conv] = {  # not by jnp.asarray, which compiles a program for each shape
        "kernel": jax.device_put((np.asarray(kernel, np.float64) * factor).astype(kernel.dtype)),
        "bias": jax.device_put((bias - mean * factor).astype(kernel.dtype)),
    }


def _at(tree: dict[str, Any], *path: str) -> dict[str, Any]:
    for name in path:
        if name not in tree:
            raise ValueError(f"variables don't fit the model: no {name!r} among {', '.join(tree) or 'nothing'}")
        tree = tree[name]
    return tree


def _copy(tree: Any) -> Any:
    """The same leaves in dicts of its own."""
    return jax.tree.map(lambda leaf: leaf, dict(tree))


def _without_empty(tree: dict[str, Any]) -> dict[str, Any]:
    pruned = {name: _without_empty(value) if isinstance(value, dict) else value for name, value in tree.items()}
    return {name: value for name, value in pruned.items() if not (isinstance(value, dict) and not value)}
