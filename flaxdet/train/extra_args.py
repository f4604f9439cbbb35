"""Optax transforms that take more than gradients and parameters: which of them the train step can serve."""

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

# how Python says that a call lacks arguments
_LACKS = re.compile(r"missing \d+ required keyword-only arguments?: (.*)")


class MissingArgumentError(ValueError):
    """The optimiser's ``update`` requires an argument that the train step does not have."""


class _InitError(Exception):
    """The optimiser's ``init`` fails on abstract parameters."""


def with_value(tx: Any, model: Any, trainable: Trainable | None) -> optax.GradientTransformationExtraArgs:
    """An optax transform whose ``update`` can be given the loss, and is given no other extra argument.

    Args:
        tx: any optax transform, or ``optax.MultiSteps``.
        model: the detector that it is to train.
        trainable: as in ``create_state``.

    Returns:
        The same transform with ``update(gradients, state, params, value=loss)``; a ``tx`` that takes no ``value`` is
        called without it.

    Raises:
        MissingArgumentError: if ``update`` requires another argument, naming it. Where the transform depends on the
            names of the parameters and the model is no detector, the first step raises it.
        ValueError: if ``update`` fails on the detector's trainable parameters.
    """
    if isinstance(tx, optax.GradientTransformationExtraArgs) or _takes_any(tx.update):
        given = optax.GradientTransformationExtraArgs(tx.init, tx.update)
    else:
        given = optax.with_extra_args_support(tx)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        try:
            return given.update(updates, state, params, **extra_args)
        except TypeError as error:
            lacks = _LACKS.search(str(error))
            if lacks is None:
                raise
            names = lacks[1].replace("'", "")
            raise MissingArgumentError(
                f"tx.update requires {names}: expected an optax transform that takes gradients, state, parameters and "
                "value=loss, which is all that the train step has; for this one write a step of your own around "
                "flaxdet.train.loss_and_gradients"
            ) from error

    served = optax.GradientTransformationExtraArgs(given.init, update)
    layer = {"kernel": jax.ShapeDtypeStruct((2, 2), jnp.float32), "bias": jax.ShapeDtypeStruct((2,), jnp.float32)}
    error = _failure(served, {"layer": layer}, jnp.float32)
    if isinstance(error, MissingArgumentError):
        raise error
    if error is not None and isinstance(model, Detector):  # it may go by names of parameters: the model's own are tried
        trained, _ = split_trainable(model, abstract_variables(model)["params"], trainable)
        error = _failure(served, trained, model.box_dtype)
        if isinstance(error, MissingArgumentError):
            raise error
        if error is not None and not isinstance(error, _InitError):  # create_state calls init, and outside of jit
            raise ValueError(f"tx.update fails on the model's trainable parameters: {error}") from error
    return served


def _takes_any(update: Any) -> bool:
    """Whether a function takes any keyword, as ``optax.MultiSteps`` does without being an ExtraArgs transform."""
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(update).parameters.values())


def _failure(tx: optax.GradientTransformationExtraArgs, params: Any, dtype: Any) -> Exception | None:
    """The error of one update of parameters of these shapes, given a loss of this dtype, or None."""
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
