"""Max pooling."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

Array = jax.Array


def max_pool_3x3(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """``torch.nn.MaxPool2d(kernel_size=3, stride=2, padding=1)``.

    As in torch, the first of equal values gets the gradient, and a window with a NaN gives NaN. The three columns of a
    window are compared first, then the three rows. On CPUs this takes less than half the time of ``lax.reduce_window``,
    and the gradient takes a quarter.
    """

    def larger(a: Array, b: Array) -> Array:
        return jnp.where((b > a) | jnp.isnan(b), b, a)

    for axis in (2, 1):
        middle = lax.slice_in_dim(x, 0, None, 2, axis)
        if x.shape[axis] > 1:
            odd = lax.slice_in_dim(x, 1, None, 2, axis)
            short = middle.shape[axis] - odd.shape[axis]  # 1 where the last window ends beyond the border
            x = larger(larger(_padded(odd, axis, 1, short - 1), middle), _padded(odd, axis, 0, short))
        else:
            x = middle
    return x


def _padded(x: Array, axis: int, low: int, high: int) -> Array:
    """Pads an axis with -inf, ``low`` cells before and ``high`` cells after it; a negative number removes cells."""
    config = [(0, 0, 0)] * x.ndim
    config[axis] = (low, high, 0)
    return lax.pad(x, jnp.asarray(-jnp.inf, x.dtype), config)
