"""Rematerialisation: what is computed again for the gradient instead of being saved for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from flaxdet.xla import routes


def rematerialise(function: Callable[..., Any], lift: Callable[..., Any] = jax.checkpoint) -> Callable[..., Any]:
    """``lift(function)`` where CPUs' routes are taken; elsewhere, where it wasn't measured, the function itself.

    For cheap work whose result is as large as the input, such as the way from a norm to the next convolution. The
    gradient of the convolution needs that result, which XLA:CPU would save beside the norm's input; fetching the memory
    of a second map takes longer than computing it again. A jit of one's own needs ``flaxdet.compiler_options()``, else
    XLA:CPU merges the two computations.

    Args:
        function: of arrays; ``(module, ...)`` for ``flax.linen.remat``.
        lift: ``jax.checkpoint``, or ``flax.linen.remat`` for a function that calls a Linen module.

    Returns:
        A function of the same arguments.
    """
    return lift(function) if routes.platform() == "cpu" else function
