"""Max pooling."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from flaxdet.xla.routes import by_platform

Array = jax.Array


@jax.custom_jvp
def max_pool_3x3(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """``torch.nn.MaxPool2d(kernel_size=3, stride=2, padding=1)``.

    As in torch, the first of equal values gets the gradient, and a window with a NaN gives NaN. The three columns of a
    window are compared first, then the three rows. On CPUs this takes less than half the time of ``lax.reduce_window``,
    and the gradient takes a quarter. Elsewhere, a map of which no gradient is taken goes through ``lax.reduce_window``:
    one kernel of a GPU, and .11 GB less traffic for an image of 800x1088 in bfloat16, by a TPU v5e compiler's count.
    """
    return by_platform(x, cpu=_columns_then_rows, default=_windows)


@max_pool_3x3.defjvp
def _max_pool_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return jax.jvp(_columns_then_rows, primals, tangents)


def _larger(a: Array, b: Array) -> Array:
    return jnp.where((b > a) | jnp.isnan(b), b, a)


def _windows(x: Array) -> Array:
    lowest, border = jnp.asarray(-jnp.inf, x.dtype), ((0, 0), (1, 1), (1, 1), (0, 0))
    return lax.reduce_window(x, lowest, _larger, (1, 3, 3, 1), (1, 2, 2, 1), border)


def _columns_then_rows(x: Array) -> Array:
    for axis in (2, 1):
        middle = lax.slice_in_dim(x, 0, None, 2, axis)
        if x.shape[axis] > 1:
            odd = lax.slice_in_dim(x, 1, None, 2, axis)
            short = middle.shape[axis] - odd.shape[axis]  # 1 where the last window ends beyond the border
            x = _larger(_larger(_padded(odd, axis, 1, short - 1), middle), _padded(odd, axis, 0, short))
        else:
            x = middle
    return x


def _padded(x: Array, axis: int, low: int, high: int) -> Array:
    """Pads an axis with -inf, ``low`` cells before and ``high`` cells after it; a negative number removes cells."""
    config = [(0, 0, 0)] * x.ndim
    config[axis] = (low, high, 0)
    return lax.pad(x, jnp.asarray(-jnp.inf, x.dtype), config)
