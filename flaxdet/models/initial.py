"""Random variables of a detector, drawn in one compiled program."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer

from flaxdet.models.detector import Detector, example_batch
from flaxdet.xla.devices import platform_of

Variables = dict[str, Any]


def initial_variables(model: Detector, key: jax.Array) -> Variables:
    """Random variables as torchvision initialises them, module by module.

    Args:
        model: the detector.
        key: random key of the initialisation.

    Returns:
        {"params": ..., "batch_stats": ...} in the model's ``param_dtype``.
    """
    if isinstance(jax.random.key_data(key), Tracer):  # under eval_shape or jit, an inner jit is not needed
        return _init(model, key)
    return _jitted_init(platform_of(key))(model, key)


def _init(model: Detector, key: jax.Array) -> Variables:
    variables = model.init(key, example_batch())
    return {name: variables[name] for name in ("params", "batch_stats") if name in variables}


@functools.cache
def _jitted_init(backend: str) -> Callable[[Detector, jax.Array], Variables]:
    # Hundreds of small random draws: on a CPU, optimising them takes longer than running them.
    options = {"xla_backend_optimization_level": 0} if backend == "cpu" else None
    return jax.jit(_init, static_argnums=0, compiler_options=options)
