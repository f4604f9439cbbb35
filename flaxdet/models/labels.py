"""Checks of the labels of ground-truth boxes: an error if labels can be read, NaN losses in a compiled program."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Bool, Float, Int

from flaxdet.nn.layers import Array
from flaxdet.structures import Targets

_UNKNOWN = np.iinfo(np.int32).max  # `stop` of the range of labels if a model's number of classes is unknown


def num_classes(model: Any) -> int | None:
    """``num_classes`` of a model or of its box predictor, background included; ``None`` if neither has it."""
    count = getattr(model, "num_classes", None)
    return getattr(getattr(model, "box_predictor", None), "num_classes", None) if count is None else count


def label_range(num_classes: int | None, *, background: bool) -> range:
    """The labels that a ground-truth box may have.

    Args:
        num_classes: k, the background included; None if it is unknown, so that labels have no upper bound.
        background: True if label 0 is the background, which no box may have; False if label 0 is a class.

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
    """Checks that the model allows the labels of boxes.

    Args:
        labels: [*S] label of each box.
        valid: [*S], False for padding, which may hold any label.
        allowed: ``target_labels`` of the model.
        name: a function from the indices of a box in [*S] to the name of the box in an error.

    Raises:
        TypeError: for labels that are not integers.
        ValueError: for a label outside ``allowed``. Either message names the box.
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
    """``check_labels`` of a batch, if the labels are concrete; of traced labels only the dtype is checked.

    Args:
        labels: [B, G] labels of the targets.
        valid: [B, G] mask of the targets, False for padding.
        allowed: ``target_labels`` of the model.

    Raises:
        TypeError: for labels that are not integers, even if they are traced.
        ValueError: for a label outside ``allowed``, naming image and box by number.
    """
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels should be integers, got {labels.dtype}")
    if isinstance(labels, Tracer) or isinstance(valid, Tracer):
        return
    for (first, rows), (_, valid_rows) in zip(_on_host(labels), _on_host(valid), strict=True):
        check_labels(rows, valid_rows, allowed, lambda row, slot, first=first: f"image {first + row}, box {slot}")


def _on_host(array: Any) -> Iterator[tuple[int, np.ndarray]]:
    """The parts of an array that this process can read, each with the number of its first row."""
    if getattr(array, "is_fully_addressable", True):
        yield 0, np.asarray(array)
        return
    for shard in array.addressable_shards:
        yield shard.index[0].start or 0, np.asarray(shard.data)


def refuse_labels(losses: dict[str, Float[Array, ""]], targets: Targets, allowed: range) -> dict[str, Float[Array, ""]]:
    """Makes losses and their gradients NaN if a box has a label outside the classes.

    A compiled program can't raise errors. The losses are multiplied by NaN, since selecting or adding NaN would leave
    the gradients finite, and training would go on with them.

    Args:
        losses: scalars of a batch by name.
        targets: ground truth of the batch; padding may hold any label.
        allowed: ``target_labels`` of the model.

    Returns:
        The losses, unchanged to the bit, if every label is allowed; else NaN.
    """
    outside = targets.valid & ((targets.labels < allowed.start) | (targets.labels >= allowed.stop))
    refused = jnp.any(outside)
    return {name: loss * jnp.where(refused, jnp.nan, 1).astype(loss.dtype) for name, loss in losses.items()}
