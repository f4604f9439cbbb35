"""The table of names: one row for every tensor of torchvision's state_dict.

`rules` walks torchvision's module names in torchvision's order, by small loops, and keeps those that the
model's variables have; so depth, number of convolutions and kind of normalisation follow from the model. The
loops are all there is to know: a new part of the architecture is a new pair yielded here.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Set
from typing import Any, NamedTuple

from flax import traverse_util

from flaxdet.convert import layouts
from flaxdet.files.checkpoint import PREFIXES

Path = tuple[str, ...]

COLLECTIONS = ("params", "batch_stats")
COUNTER = "num_batches_tracked"
# Flax's leaf -> torch's, in torch's order.
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}

# What torchvision renames on loading, as we do: (old, new).
_OLD_NAMES = (
    (re.compile(r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)"), r"\1.0.\2"),
    (re.compile(r"rpn\.head\.conv\.(weight|bias)"), r"rpn.head.conv.0.0.\1"),
)


class Rule(NamedTuple):
    """One tensor.

    Attributes:
        key: torch's name.
        collection: "params" or "batch_stats"; None for a ``num_batches_tracked``, which Flax has no use for.
        path: the leaf inside the collection; empty with None.
        layout: how the two arrays correspond.
        shape: torch's shape.
    """

    key: str
    collection: str | None
    path: Path
    layout: layouts.Layout
    shape: tuple[int, ...]


def _count(modules: Set[str], stem: str) -> int:
    """How many of stem0, stem1, ... there are."""
    tops = {"/".join(name.split("/")[: stem.count("/") + 1]) for name in modules}
    return next(i for i in itertools.count() if f"{stem}{i}" not in tops)


def _backbone(modules: Set[str]) -> Iterator[tuple[str, str]]:
    body, fpn = "backbone/body", "backbone/fpn"
    yield f"{body}/conv1", "backbone.body.conv1"
    yield f"{body}/bn1", "backbone.body.bn1"
    for stage in range(1, 5):
        for i in range(_count(modules, f"{body}/layer{stage}_")):
            flax, torch = f"{body}/layer{stage}_{i}", f"backbone.body.layer{stage}.{i}"
            for j in (1, 2, 3):
                yield f"{flax}/conv{j}", f"{torch}.conv{j}"
                yield f"{flax}/bn{j}", f"{torch}.bn{j}"
            yield f"{flax}/downsample_conv", f"{torch}.downsample.0"
            yield f"{flax}/downsample_bn", f"{torch}.downsample.1"
    for blocks in ("inner_blocks", "layer_blocks"):
        for i in range(_count(modules, f"{fpn}/{blocks}_")):
            yield f"{fpn}/{blocks}_{i}/conv", f"backbone.fpn.{blocks}.{i}.0"
            yield f"{fpn}/{blocks}_{i}/norm", f"backbone.fpn.{blocks}.{i}.1"
    for level in ("p6", "p7"):
        yield f"{fpn}/extra_blocks/{level}", f"backbone.fpn.extra_blocks.{level}"


def _fcos_head(modules: Set[str]) -> Iterator[tuple[str, str]]:
    for branch, outputs in (
        ("classification_head", ["cls_logits"]),
        ("regression_head", ["bbox_reg", "bbox_ctrness"]),
    ):
        for i in range(_count(modules, f"head/{branch}/conv_")):  # torch counts conv, norm, ReLU
            yield f"head/{branch}/conv_{i}", f"head.{branch}.conv.{3 * i}"
            yield f"head/{branch}/norm_{i}", f"head.{branch}.conv.{3 * i + 1}"
        for output in outputs:
            yield f"head/{branch}/{output}", f"head.{branch}.{output}"


def _faster_rcnn_heads(modules: Set[str]) -> Iterator[tuple[str, str]]:
    for i in range(_count(modules, "rpn_head/conv_")):
        yield f"rpn_head/conv_{i}", f"rpn.head.conv.{i}.0"
    for output in ("cls_logits", "bbox_pred"):
        yield f"rpn_head/{output}", f"rpn.head.{output}"
    convs = _count(modules, "box_head/conv_")
    for i in range(convs):
        yield f"box_head/conv_{i}", f"roi_heads.box_head.{i}.0"
        yield f"box_head/norm_{i}", f"roi_heads.box_head.{i}.1"
    for i in range(_count(modules, "box_head/fc_")):  # torch counts the convolutions, Flatten, Linear, ReLU
        yield f"box_head/fc_{i}", f"roi_heads.box_head.{convs + 1 + 2 * i}"
    for name in ("fc6", "fc7"):
        yield f"box_head/{name}", f"roi_heads.box_head.{name}"
    for output in ("cls_score", "bbox_pred"):
        yield f"box_predictor/{output}", f"roi_heads.box_predictor.{output}"


def rules(variables: Mapping[str, Any], *, pooled: tuple[int, int] = (7, 7)) -> list[Rule]:
    """The rows for a model, in the order of torchvision's own state_dict.

    Args:
        variables: the model's variables, or their shapes as `jax.eval_shape` gives them.
        pooled: (height, width) of the RoI features that the box head flattens.

    Returns:
        One row a tensor of torchvision's state_dict. Every leaf of ``params`` and ``batch_stats`` is in one
        row, no key is twice.

    Raises:
        ValueError: if the model has a leaf that torchvision's architecture has no name for.
    """
    leaves: dict[str, dict[str, tuple[str, Path, tuple[int, ...]]]] = {}
    for collection, path, leaf in leaves_of(variables):
        module = leaves.setdefault("/".join(path[:-1]), {})
        module[path[-1]] = (collection, path, tuple(leaf.shape))

    rows: list[Rule] = []
    named: set[str] = set()
    for part in (_backbone, _fcos_head, _faster_rcnn_heads):
        for module, torch in part(leaves.keys()):
            if module in leaves:
                named.add(module)
                rows += _module_rows(module, torch, leaves[module], pooled)
    unnamed = [f"{module}/{leaf}" for module in leaves.keys() - named for leaf in leaves[module]]
    unnamed += [f"{module}/{leaf}" for module in named for leaf in leaves[module].keys() - _LEAVES.keys()]
    if unnamed:
        raise ValueError(
            "only torchvision's architecture can be converted (flaxdet.save_variables stores any other's variables); "
            "it has no name for " + ", ".join(sorted(unnamed))
        )
    keys = [row.key for row in rows]
    if len(set(keys)) != len(keys):
        raise ValueError(f"two leaves share a key: {sorted({key for key in keys if keys.count(key) > 1})}")
    return rows


def leaves_of(variables: Mapping[str, Any]) -> Iterator[tuple[str, Path, Any]]:
    """(collection, path, leaf) of everything that is converted."""
    for collection in COLLECTIONS:
        for path, leaf in traverse_util.flatten_dict(dict(variables.get(collection, {}))).items():
            yield collection, path, leaf


def _module_rows(
    module: str, torch: str, leaves: Mapping[str, tuple[str, Path, tuple[int, ...]]], pooled: tuple[int, int]
) -> Iterator[Rule]:
    for leaf, torch_leaf in _LEAVES.items():
        if leaf in leaves:
            collection, path, shape = leaves[leaf]
            layout = layouts.IDENTITY
            if leaf == "kernel" and len(shape) == 4:
                layout = layouts.CONV
            elif leaf == "kernel" and module in ("box_head/fc_0", "box_head/fc6"):
                if not layouts.fits(shape, *pooled):
                    raise ValueError(
                        f"{module}/kernel has {shape[0]} rows, expected a multiple of {pooled[0]}x{pooled[1]}"
                    )
                layout = layouts.flattened(*pooled)
            elif leaf == "kernel":
                layout = layouts.DENSE
            yield Rule(f"{torch}.{torch_leaf}", collection, path, layout, layout.torch_shape(shape))
    if leaves.keys() >= {"scale", "mean"} and leaves["scale"][0] == "params":  # live BatchNorm
        yield Rule(f"{torch}.{COUNTER}", None, (), layouts.IDENTITY, ())


def canonical_keys(state_dict: Mapping[str, Any]) -> dict[str, list[str]]:
    """Every key under its present name: "module." gone, torchvision's older names brought up to date.

    Args:
        state_dict: anything by key.

    Returns:
        The given keys by present name; more than one where two mean the same tensor.
    """
    names: dict[str, list[str]] = {}
    for key in state_dict:
        name = key
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
        for pattern, new in _OLD_NAMES:
            if pattern.fullmatch(name):
                name = pattern.sub(new, name)
        names.setdefault(name, []).append(key)
    return names
