"""ReLU with a gradient that is computed from the output instead of the input."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxdet.nn.layers import Array
from flaxdet.xla import routes
from flaxdet.xla.barriers import materialise


@jax.custom_jvp
def relu(x: Array) -> Array:
    """``nn.relu``, for an ``x`` that nothing else saves for the backward pass.

    The next layer saves the result anyway, so off CPUs the gradient reads the result. If another layer saves ``x``, as
    BatchNorm with parameters does, ``nn.relu`` is better: its gradient then reads one array less.

    Args:
        x: any array.

    Returns:
        max(x, 0).
    """
    return nn.relu(x)


@relu.defjvp
def _relu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (tangent,) = primals, tangents
    result = relu(x)
    if routes.platform() != "cpu":
        result = x = materialise(result)  # without the barrier, XLA replaces max(x, 0) > 0 by x > 0
    return result, jnp.where(x > 0, tangent, jnp.zeros_like(tangent))
