"""Other classes for trained weights: new class layers, with rows copied by the names of the classes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxdet.models.detector import Detector
from flaxdet.models.labels import num_classes as classes_of

Variables = dict[str, Any]
Path = tuple[str, ...]


def replace_classes(
    model: Detector,
    variables: Mapping[str, Any],
    num_classes: int,
    *,
    copy: Mapping[int, int] | None = None,
    key: jax.Array | None = None,
) -> tuple[Any, Variables]:
    """Makes new class layers for trained weights, and keeps all other variables.

    The class layers are ``head/classification_head/cls_logits`` in FCOS, and ``box_predictor/cls_score`` and
    ``box_predictor/bbox_pred`` (four numbers per class) in Faster R-CNN. The new layers are initialised as in
    torchvision's detectors. All other variables, and the options of the model, are unchanged, bit for bit.

    Args:
        model: a detector with torchvision's head or predictor.
        variables: {"params": ..., "batch_stats": ...} of the model; they are not changed.
        num_classes: number of classes of the new layers, including the background; at least 2.
        copy: {new label: old label}, the rows of the class layers to copy; ``match_classes`` makes it from names.
        key: random key of the initialisation; default ``jax.random.key(0)``.

    Returns:
        The model for ``num_classes`` classes, and the variables of that model. All arrays but the class layers are the
        arrays of ``variables``.

    Raises:
        TypeError: if the model is no detector, or has a head or predictor of another kind.
        ValueError: for fewer than two classes, a label out of range, or variables that don't fit the model.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes counts the background, so it should be at least 2, got {num_classes}")
    part, layers = _class_layers(model)
    head: Any = getattr(model, part).clone(num_classes=num_classes)
    # None if the model was made with a predictor instead of a number of classes
    option = None if model.num_classes is None else num_classes
    replaced = model.clone(num_classes=option, **{part: head})
    old_classes: Any = classes_of(model)  # torchvision's head and predictor have the attribute
    new_labels, old_labels = _labels(copy or {}, num_classes, old_classes)
    params = variables["params"]
    old_leaves = {
        (part, *layer, leaf): _leaf(params, (part, *layer, leaf), old_classes * width)
        for layer, width in layers.items()
        for leaf in ("kernel", "bias")
    }
    # The model does not fix the number of inputs of a dense layer; the variables do.
    inputs = next(iter(old_leaves.values())).shape[-2]

    def initial(key: jax.Array) -> list[Any]:
        fresh = {part: head.init(key, head.class_inputs(inputs))["params"]}
        # only the class layers: jit drops the random draws of other layers
        return [_at(fresh, path) for path in old_leaves]

    fresh = jax.jit(initial)(jax.random.key(0) if key is None else key)
    for (path, old), new in zip(old_leaves.items(), fresh, strict=True):
        width = layers[path[1:-1]]
        params = _put(params, path, _with_rows(new.astype(old.dtype), old, new_labels, old_labels, width))
    return replaced, {**variables, "params": params}


def match_classes(old: Sequence[str], new: Sequence[str], names: Sequence[str] | None = None) -> dict[int, int]:
    """Maps new labels to the old labels of the same name, for ``copy`` of ``replace_classes``.

    Args:
        old: names of the labels of the trained weights, label 0 ("__background__") first.
        new: names of the new labels, label 0 ("__background__") first.
        names: the names to match; default all names that occur once in ``old`` and once in ``new``, including the
            background. So a name of several labels ("N/A" in torchvision's list for COCO) is left out by default.

    Returns:
        {new label: old label}.

    Raises:
        ValueError: for a name in ``names`` that ``old`` or ``new`` lacks, or has twice.
    """
    if names is None:
        names = [name for name in new if list(old).count(name) == 1 == list(new).count(name)]
    return {_label(new, name, "new classes"): _label(old, name, "classes of the weights") for name in names}


def _label(labels: Sequence[str], name: str, kind: str) -> int:
    matches = [label for label, other in enumerate(labels) if other == name]
    if len(matches) > 1:
        raise ValueError(f"{name!r} should name one of the {kind}, and names labels {matches}")
    if not matches:
        near = difflib.get_close_matches(name.lower(), [other.lower() for other in labels], n=1, cutoff=0.5)
        hint = next((f"; did you mean {other!r}?" for other in labels if [other.lower()] == near), "")
        raise ValueError(f"{name!r} is none of the {len(labels)} {kind}{hint}")
    return matches[0]


def _class_layers(model: Any) -> tuple[str, dict[Path, int]]:
    """The field of the model that holds the class layers, and {path of a layer in it: number of outputs per class}."""
    if not isinstance(model, Detector):
        raise TypeError(f"expected a detector, got {type(model).__name__}")
    part = getattr(model, model.class_part)
    if not hasattr(part, "class_layers"):
        raise TypeError(
            f"replace_classes knows the class layers of torchvision's parts, and the {model.class_part} of this "
            f"{type(model).__name__} is {type(part).__name__}: build the model for the new classes, and put the other "
            "variables in by hand"
        )
    return model.class_part, part.class_layers


def _leaf(params: Any, path: Path, width: int) -> Any:
    leaf = _at(params, path)
    if leaf is None or leaf.shape[-1:] != (width,):
        raise ValueError(
            f"the variables do not fit the model: expected params/{'/'.join(path)} of shape [..., {width}], "
            f"found {'nothing' if leaf is None else list(leaf.shape)}"
        )
    return leaf


def _labels(copy: Mapping[int, int], new_classes: int, old_classes: int) -> tuple[np.ndarray, np.ndarray]:
    for new, old in copy.items():
        for label, kind, count in ((new, "new", new_classes), (old, "old", old_classes)):
            if isinstance(label, bool) or not isinstance(label, (int, np.integer)) or not 0 <= label < count:
                raise ValueError(
                    f"copy should map new labels to old ones: expected {kind} labels from 0 to {count - 1}, "
                    f"got {label!r}"
                )
    return np.asarray(list(copy.keys()), np.int32), np.asarray(list(copy.values()), np.int32)


def _with_rows(layer: Any, old: Any, new_labels: np.ndarray, old_labels: np.ndarray, width: int) -> Any:
    """``layer`` [..., classes * width], in which ``new_labels`` have the rows of ``old_labels`` in ``old``."""
    if not len(new_labels):
        return layer

    def by_class(leaf: Any) -> Any:
        return jnp.asarray(leaf).reshape(*leaf.shape[:-1], -1, width)

    return by_class(layer).at[..., new_labels, :].set(by_class(old)[..., old_labels, :]).reshape(layer.shape)


def _at(tree: Any, path: Path) -> Any:
    for name in path:
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree


def _put(tree: Any, path: Path, value: Any) -> Any:
    return {**tree, path[0]: _put(tree[path[0]], path[1:], value)} if path else value
