"""Rematerialisation: the backward pass computes values again, instead of saving them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from flaxdet.xla import routes


def rematerialise(function: Callable[..., Any], lift: Callable[..., Any] = jax.checkpoint) -> Callable[..., Any]:
    """``lift(function)`` if the program takes the routes of CPUs; otherwise the function itself.

    For cheap work whose result is as large as the input, such as the norm, ReLU and mask before a convolution. The
    gradient of the convolution needs the result of that work, and XLA:CPU would save the result beside the input of the
    norm. Getting memory for a second map takes longer than computing it again. Other platforms were not measured. A
    custom jit needs ``flaxdet.compiler_options()``; without these options XLA:CPU merges the two computations.

    Args:
        function: a function of arrays; for ``flax.linen.remat`` a function ``(module, ...)``.
        lift: ``jax.checkpoint``, or ``flax.linen.remat`` for a function that calls a Linen module.

    Returns:
        A function of the same arguments.
    """
    return lift(function) if routes.platform() == "cpu" else function
