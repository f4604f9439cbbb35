"""Labels that no ground-truth box may have: an error where labels can be read, NaN in a compiled program."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Bool, Float, Int

from flaxdet.nn.layers import Array
from flaxdet.structures import Targets

_UNKNOWN = np.iinfo(np.int32).max  # `stop` of the labels of a model that doesn't tell its number of classes


def num_classes(model: Any) -> int | None:
    """Number of labels that a model or its predictor tells, the background counted; ``None`` where neither does."""
    own = getattr(model, "num_classes", None)
    return getattr(getattr(model, "box_predictor", None), "num_classes", None) if own is None else own


def label_range(num_classes: int | None, *, background: bool) -> range:
    """The labels that a ground-truth box may have.

    Args:
        num_classes: k, the background included; None where it is unknown, which leaves labels without an upper bound.
        background: whether label 0 is the background, which is no box's. False where label 0 is a class.

    Returns:
        1..k-1 with a background, 0..k-1 without.
    """
    return range(int(background), _UNKNOWN if num_classes is None else num_classes)


def check_labels(
    labels: Int[np.ndarray, "*S"],
    valid: Bool[np.ndarray, "*S"],
    allowed: range,
    name: Callable[..., str],
) -> None:
    """Makes sure that boxes have labels of the model.

    Args:
        labels: [*S] of boxes.
        valid: [*S], False for padding, which may hold any label.
        allowed: ``target_labels`` of the model.
        name: says whose box it is, given its place in [*S].

    Raises:
        TypeError: for labels that are not integers.
        ValueError: for a label outside ``allowed``; both name the box.
    """
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"{name(*(0,) * labels.ndim)}: labels should be integers, got {labels.dtype}")
    outside = valid & ((labels < allowed.start) | (labels >= allowed.stop))
    if outside.any():
        place = tuple(int(i) for i in np.argwhere(outside)[0])
        raise ValueError(f"{name(*place)}: label {labels[place]} {_expected(allowed)}")


def _expected(allowed: range) -> str:
    if allowed.stop == _UNKNOWN:
        return f"should be {allowed.start} or more"
    text = f"should be from {allowed.start} to {allowed.stop - 1}: num_classes={allowed.stop} counts the background"
    return f"{text}, which is label 0 and no box's" if allowed.start else f"{text}, which is label 0"


def check_targets(labels: Int[Array, "B G"], valid: Bool[Array, "B G"], allowed: range) -> None:
    """``check_labels`` of a batch outside of jit, or closed over by it; traced labels can't be read.

    Args:
        labels: [B, G] of the targets.
        valid: [B, G] of the targets.
        allowed: ``target_labels`` of the model.

    Raises:
        TypeError: for labels that are not integers, traced ones too.
        ValueError: for a label outside ``allowed``, naming image and box by their numbers.
    """
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels should be integers, got {labels.dtype}")
    if isinstance(labels, Tracer) or isinstance(valid, Tracer):
        return
    for (first, own), (_, own_valid) in zip(_on_host(labels), _on_host(valid), strict=True):
        check_labels(own, own_valid, allowed, lambda row, slot, first=first: f"image {first + row}, box {slot}")


def _on_host(array: Any) -> Iterator[tuple[int, np.ndarray]]:
    """The rows of an array that this process can read, and the number of the first of each part."""
    if getattr(array, "is_fully_addressable", True):
        yield 0, np.asarray(array)
        return
    for shard in array.addressable_shards:
        yield shard.index[0].start or 0, np.asarray(shard.data)


def refuse_labels(losses: dict[str, Float[Array, ""]], targets: Targets, allowed: range) -> dict[str, Float[Array, ""]]:
    """Losses that are NaN, and have NaN as gradients, where a box has a label outside the classes.

    In a compiled program nothing can raise. The losses are multiplied: NaN that were selected or added would leave the
    gradients finite, and the parameters would move.

    Args:
        losses: scalars of a batch by name.
        targets: ground truth of the batch; padding may hold any label.
        allowed: labels of boxes.

    Returns:
        The same losses, bit for bit, if every label is allowed; else NaN.
    """
    outside = targets.valid & ((targets.labels < allowed.start) | (targets.labels >= allowed.stop))
    refused = jnp.any(outside)
    return {name: loss * jnp.where(refused, jnp.nan, 1).astype(loss.dtype) for name, loss in losses.items()}
