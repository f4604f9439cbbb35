"""The conversion table of a model: one row per tensor of torchvision's state_dict.

Each part of a model lists torchvision's names of the part's modules (``torch_names``, see ``flaxdet.nn.names``), in
torchvision's order. `rules` selects the modules with variables, and adds tensors and layouts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any, NamedTuple

from flax import traverse_util

from flaxdet.convert import layouts
from flaxdet.files.unwrap import DATA_PARALLEL, clean_key
from flaxdet.nn.names import TorchName

Path = tuple[str, ...]

COLLECTIONS = ("params", "batch_stats")
COUNTER = "num_batches_tracked"
_DEPTH = 8  # components of a prefix
# Name of a leaf in Flax -> name in torch, in torch's order.
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}

# Old names, which torchvision renames on loading: (old, new).
_OLD_NAMES = (
    (re.compile(r"((?:.*\.)?backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)"), r"\1.0.\2"),
    (re.compile(r"((?:.*\.)?rpn\.head\.conv)\.(weight|bias)"), r"\1.0.0.\2"),
)


class Rule(NamedTuple):
    """The conversion of one tensor.

    Attributes:
        key: torch's name of the tensor.
        collection: "params" or "batch_stats"; None for a ``num_batches_tracked``, which has no counterpart in Flax.
        path: path of the leaf in the collection; empty if ``collection`` is None.
        layout: the layouts of the tensor in torch and in Flax.
        shape: torch's shape.
    """

    key: str
    collection: str | None
    path: Path
    layout: layouts.Layout
    shape: tuple[int, ...]


def rules(model: Any, variables: Mapping[str, Any]) -> list[Rule]:
    """The rows for a model, in the order of torchvision's state_dict.

    Args:
        model: a detector.
        variables: the variables of the model, or the shapes of the variables (`jax.eval_shape`).

    Returns:
        One row per tensor of torchvision's state_dict. Every leaf of ``params`` and ``batch_stats`` is in exactly one
        row, and every key occurs once.

    Raises:
        ValueError: if torchvision's architecture has no name for a leaf of the model.
    """
    leaves: dict[str, dict[str, tuple[str, Path, tuple[int, ...]]]] = {}
    for collection, path, leaf in leaves_of(variables):
        module = leaves.setdefault("/".join(path[:-1]), {})
        module[path[-1]] = (collection, path, tuple(leaf.shape))

    rows: list[Rule] = []
    named: set[str] = set()
    for each in model.torch_names():
        if each.path in leaves:
            named.add(each.path)
            rows += _module_rows(each, leaves[each.path], _pooled(model))
    unnamed = [f"{module}/{leaf}" for module in leaves.keys() - named for leaf in leaves[module]]
    unnamed += [f"{module}/{leaf}" for module in named for leaf in leaves[module].keys() - _LEAVES.keys()]
    if unnamed:
        raise ValueError(
            "only torchvision's architecture can be converted (flaxdet.save_variables stores the variables of any "
            "model); it has no name for " + ", ".join(sorted(unnamed))
        )
    keys = [row.key for row in rows]
    if len(set(keys)) != len(keys):
        raise ValueError(f"two leaves share a key: {sorted({key for key in keys if keys.count(key) > 1})}")
    return rows


def leaves_of(variables: Mapping[str, Any]) -> Iterator[tuple[str, Path, Any]]:
    """Iterates over (collection, path, leaf) of all converted variables."""
    for collection in COLLECTIONS:
        for path, leaf in traverse_util.flatten_dict(dict(variables.get(collection, {}))).items():
            yield collection, path, leaf


def _pooled(model: Any) -> tuple[int, int]:
    """(height, width) of the pooled features that a box head flattens."""
    size: Any = getattr(getattr(model, "box_roi_pool", None), "output_size", (7, 7))
    return (size, size) if isinstance(size, int) else tuple(size)


def _module_rows(
    module: TorchName, leaves: Mapping[str, tuple[str, Path, tuple[int, ...]]], pooled: tuple[int, int]
) -> Iterator[Rule]:
    for leaf, torch_leaf in _LEAVES.items():
        if leaf in leaves:
            collection, path, shape = leaves[leaf]
            layout = layouts.IDENTITY
            if leaf == "kernel" and len(shape) == 4:
                layout = layouts.CONV
            elif leaf == "kernel" and module.flattened:
                if not layouts.fits(shape, *pooled):
                    raise ValueError(
                        f"{module.path}/kernel has {shape[0]} rows, expected a multiple of {pooled[0]}x{pooled[1]}"
                    )
                layout = layouts.flattened(*pooled)
            elif leaf == "kernel":
                layout = layouts.DENSE
            yield Rule(f"{module.name}.{torch_leaf}", collection, path, layout, layout.torch_shape(shape))
    if leaves.keys() >= {"scale", "mean"} and leaves["scale"][0] == "params":  # live BatchNorm
        yield Rule(f"{module.name}.{COUNTER}", None, (), layouts.IDENTITY, ())


def canonical_keys(state_dict: Mapping[str, Any]) -> dict[str, list[str]]:
    """The keys of a state_dict by torchvision's present names: without wrappers' prefixes, and with old names replaced.

    Args:
        state_dict: anything by key.

    Returns:
        {present name: keys}; several keys if these are names of the same tensor.
    """
    names: dict[str, list[str]] = {}
    for key in state_dict:
        name = clean_key(key).replace(f".{DATA_PARALLEL}", ".").removeprefix(DATA_PARALLEL)
        for pattern, new in _OLD_NAMES:
            if pattern.fullmatch(name):
                name = pattern.sub(new, name)
        names.setdefault(name, []).append(key)
    return names


def prefixes_of(names: Iterable[str], wanted: Set[str]) -> dict[str, int]:
    """The prefixes under which names lie, for a detector that is a part of another module.

    Args:
        names: names of tensors, such as "teacher.backbone.body.conv1.weight".
        wanted: names without prefix.

    Returns:
        {prefix, such as "teacher." or "": number of wanted names under it}.
    """
    counts: dict[str, int] = {}
    for name in names:
        prefix, rest = "", name
        for _ in range(_DEPTH):
            if rest in wanted:
                counts[prefix] = counts.get(prefix, 0) + 1
            component, dot, rest = rest.partition(".")
            prefix += component + dot
            if not dot:
                break
    return counts
