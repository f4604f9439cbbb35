"""Checks the labels of batches against the classes of the model, on the host, where an error can be raised."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from flaxdet.models.labels import check_labels, check_targets


class CheckedStep:
    """A jitted step of the model that checks the labels of the first batch.

    Later batches are not checked, since a step would have to wait for the batch: wrong labels give NaN losses. ``fit``
    checks every batch before it goes to the device.

    Attributes:
        jitted: the step without the check.
        target_labels: labels that the model allows; None for a custom model without ``target_labels``, for which no
            batch is checked.
    """

    def __init__(self, function: Callable[..., Any], jitted: Any, model: Any):
        """Wraps a step.

        Args:
            function: ``(state or variables, batch) -> ...``.
            jitted: ``function``, jitted.
            model: the detector.
        """
        self.target_labels: range | None = getattr(model, "target_labels", None)
        self.jitted, self._checked = jitted, False
        self._parameters = inspect.signature(function)
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the step.

        Args:
            *args: state or variables, and the batch.
            **kwargs: state or variables, and the batch, by name.

        Raises:
            ValueError: for a label that the model doesn't allow, in the first batch.
        """
        if kwargs:
            args = self._parameters.bind(*args, **kwargs).args  # jit with shardings takes no keyword arguments
        if not self._checked and self.target_labels is not None and len(args) == 2:
            self._checked = look_at_labels(args[1], self.target_labels)
        return self.jitted(*args)

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """As ``lower`` of ``jax.jit``.

        Args:
            *args: state or variables, and the batch; arrays or ``jax.ShapeDtypeStruct``.
        """
        return self.jitted.lower(*args)


def look_at_labels(batch: Mapping[str, Any], allowed: range) -> bool:
    """Checks that the model allows the labels of a batch's boxes.

    Args:
        batch: dict of arrays, of numpy or on devices. Errors name images by "image_id", if the batch has it.
        allowed: ``target_labels`` of the model.

    Returns:
        True if the labels were checked; False if the batch is traced or has no labels.

    Raises:
        TypeError: for labels that are not integers.
        ValueError: for a label outside ``allowed``. Either message names image and box.
    """
    labels, valid, ids = (batch.get(name) for name in ("labels", "valid", "image_id"))
    if labels is None or valid is None or isinstance(labels, Tracer) or isinstance(valid, Tracer):
        return False
    if ids is None:
        check_targets(labels, valid, allowed)
    else:
        name = lambda row, slot: f"image_id {int(ids[row])}, box {slot}"  # noqa: E731
        check_labels(np.asarray(labels), np.asarray(valid), allowed, name)
    return True
