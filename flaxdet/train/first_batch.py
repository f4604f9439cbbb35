"""Labels of batches against the classes of the model, on the host, where an error can be raised."""

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
    """A jitted step of the model that looks at the labels of the first batch that it is given.

    Later batches are not looked at, since a step would have to wait for its batch: their labels show as NaN. ``fit``
    looks at every batch before it goes to the device.

    Attributes:
        jitted: the step without the look.
        target_labels: labels that the model's boxes may have; None for a model of one's own that doesn't tell, whose
            batches are not looked at.
    """

    def __init__(self, function: Callable[..., Any], jitted: Any, model: Any):
        """Wraps a step.

        Args:
            function: ``(state or variables, batch) -> ...``.
            jitted: the same, jitted.
            model: the detector.
        """
        self.target_labels: range | None = getattr(model, "target_labels", None)
        self.jitted, self._looked = jitted, False
        self._parameters = inspect.signature(function)
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The step's values.

        Args:
            *args: state or variables, and the batch.
            **kwargs: the same by name.

        Raises:
            ValueError: for a label that is none of the model's, in the first batch.
        """
        if kwargs:
            args = self._parameters.bind(*args, **kwargs).args  # jit takes no names beside shardings
        if not self._looked and self.target_labels is not None and len(args) == 2:
            self._looked = look_at_labels(args[1], self.target_labels)
        return self.jitted(*args)

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """As ``lower`` of ``jax.jit``.

        Args:
            *args: state or variables, and the batch; arrays or ``jax.ShapeDtypeStruct``.
        """
        return self.jitted.lower(*args)


def look_at_labels(batch: Mapping[str, Any], allowed: range) -> bool:
    """Makes sure that the boxes of a batch have labels of the model.

    Args:
        batch: dict of arrays, of numpy or on the devices; "image_id" names the images if it is there.
        allowed: ``target_labels`` of the model.

    Returns:
        Whether the labels could be read: not in a batch that is traced, or that lacks them.

    Raises:
        TypeError: for labels that are not integers.
        ValueError: for another label; both name image and box.
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
