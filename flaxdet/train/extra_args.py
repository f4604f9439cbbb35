"""Optax transforms whose ``update`` takes extra arguments: the train step can give them the loss, as ``value``."""

from __future__ import annotations

import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flaxdet.convert.state_dict import abstract_variables
from flaxdet.models.detector import Detector
from flaxdet.train.state import Trainable, split_trainable

# Python's message for a call without required keyword-only arguments
_MISSING = re.compile(r"missing \d+ required keyword-only arguments?: (.*)")


class MissingArgumentError(ValueError):
    """The optimiser's ``update`` requires an argument that the train step does not have."""


class _InitError(Exception):
    """The optimiser's ``init`` fails on abstract parameters."""


def with_value(tx: Any, model: Any, trainable: Trainable | None) -> optax.GradientTransformationExtraArgs:
    """The optax transform with an ``update`` that accepts the loss as ``value``, its only extra argument.

    Args:
        tx: any optax transform, or ``optax.MultiSteps``.
        model: the detector to train.
        trainable: as in ``create_state``.

    Returns:
        The transform with ``update(gradients, state, params, value=loss)``; a ``tx`` that takes no ``value`` is
        called without it.

    Raises:
        MissingArgumentError: if ``update`` requires another argument, which the message names. If the transform
            depends on the names of the parameters and the model is no detector, the first step raises this error.
        ValueError: if ``update`` fails on the detector's trainable parameters.
    """
    if isinstance(tx, optax.GradientTransformationExtraArgs) or _takes_any_keyword(tx.update):
        extended = optax.GradientTransformationExtraArgs(tx.init, tx.update)
    else:
        extended = optax.with_extra_args_support(tx)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        try:
            return extended.update(updates, state, params, **extra_args)
        except TypeError as error:
            missing = _MISSING.search(str(error))
            if missing is None:
                raise
            names = missing[1].replace("'", "")
            raise MissingArgumentError(
                f"tx.update requires {names}: expected an optax transform that takes gradients, state, parameters and "
                "value=loss, which is all that the train step has; for this one write a step of your own around "
                "flaxdet.train.loss_and_gradients"
            ) from error

    transform = optax.GradientTransformationExtraArgs(extended.init, update)
    layer = {"kernel": jax.ShapeDtypeStruct((2, 2), jnp.float32), "bias": jax.ShapeDtypeStruct((2,), jnp.float32)}
    error = _failure(transform, {"layer": layer}, jnp.float32)
    if isinstance(error, MissingArgumentError):
        raise error
    if error is not None and isinstance(model, Detector):  # tx may depend on parameter names: try the model's
        trained, _ = split_trainable(model, abstract_variables(model)["params"], trainable)
        error = _failure(transform, trained, model.box_dtype)
        if isinstance(error, MissingArgumentError):
            raise error
        # create_state calls init outside of jit, where it may succeed
        if error is not None and not isinstance(error, _InitError):
            raise ValueError(f"tx.update fails on the model's trainable parameters: {error}") from error
    return transform


def _takes_any_keyword(update: Any) -> bool:
    """Whether a function takes any keyword: ``optax.MultiSteps`` does, but is no ExtraArgs transform."""
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(update).parameters.values())


def _failure(tx: optax.GradientTransformationExtraArgs, params: Any, dtype: Any) -> Exception | None:
    """The error of an update of parameters of these shapes with a loss of this dtype; None if it succeeds."""
    value = jax.ShapeDtypeStruct((), dtype)
    with jax.numpy_dtype_promotion("standard"):
        try:
            state = jax.eval_shape(tx.init, params)
        except Exception as error:
            return _InitError(error)
        try:
            jax.eval_shape(lambda *args, value: tx.update(*args, value=value), params, state, params, value=value)
        except Exception as error:
            return error
    return None
