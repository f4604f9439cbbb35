"""torch's initialisers, under torch's names."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer, normal, uniform, variance_scaling

kaiming_normal_fan_out = variance_scaling(2.0, "fan_out", "normal")  # nonlinearity="relu"
kaiming_uniform_a1 = variance_scaling(1.0, "fan_in", "uniform")  # a=1: bound sqrt(3 / fan_in)
torch_default = variance_scaling(1 / 3, "fan_in", "uniform")  # a=sqrt(5): bound 1 / sqrt(fan_in)
normal_001 = normal(0.01)


def symmetric_uniform(bound: float) -> Initializer:
    """Initialiser of U(-bound, bound), which torch uses for biases by default."""

    def init(key: jax.Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> jax.Array:
        del out_sharding
        return uniform(2 * bound)(key, shape, dtype) - jnp.asarray(bound, dtype)

    return init
