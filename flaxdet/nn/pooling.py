"""Max pooling."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

Array = jax.Array


def max_pool_3x3(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """``torch.nn.MaxPool2d(kernel_size=3, stride=2, padding=1)``.

    Like torch's, the first of equal values takes the gradient, and NaN wins. Comparing the three columns of a window,
    and then its three rows, takes less than half of ``lax.reduce_window``'s time on CPUs, its gradient a quarter.
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
    """With as many cells of -inf (negative: fewer) before and after the axis."""
    config = [(0, 0, 0)] * x.ndim
    config[axis] = (low, high, 0)
    return lax.pad(x, jnp.asarray(-jnp.inf, x.dtype), config)
