"""``lax.dot_general`` with gradients in the forms that XLA:CPU computes quickly."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from flaxdet.xla import routes
from flaxdet.xla.barriers import materialise

Array = jax.Array

# Elements of the largest matrix whose gradient is computed in transposed form. For a larger matrix, transposing the
# gradient back takes longer than the transposed form saves.
_SMALL = 1 << 22


def dot_general(lhs: Array, rhs: Array, dimension_numbers: Any, precision: Any = None, **kwargs: Any) -> Array:
    """``lax.dot_general``, as ``flaxdet.nn.layers.Dense`` calls it.

    If the program takes the routes of CPUs, the gradients of a plain matrix product take the forms that XLA:CPU
    computes quickly. For the gradient of lhs, the transposed rhs is written to memory. The gradient of rhs is computed
    with the smaller number of features first. Each form saves up to half of the time. The results are the same up to
    the order of sums.

    Args:
        lhs: [..., K].
        rhs: [K, N].
        dimension_numbers: as ``lax.dot_general``.
        precision: as ``lax.dot_general``.
        **kwargs: options of ``lax.dot_general``.

    Returns:
        [..., N].
    """
    if rhs.ndim != 2 or tuple(map(tuple, dimension_numbers[0])) != ((lhs.ndim - 1,), (0,)) or any(kwargs.values()):
        return lax.dot_general(lhs, rhs, dimension_numbers, precision, **kwargs)
    return product(lhs.reshape(-1, lhs.shape[-1]), rhs, precision).reshape(*lhs.shape[:-1], -1)


def product(lhs: Array, rhs: Array, precision: Any = None) -> Array:
    """The product of two matrices [M, K] and [K, N], with the gradients of ``dot_general``."""
    plain = functools.partial(_plain, precision=precision)

    def tangent_of_lhs(lhs: Array, rhs: Array) -> Array:
        return _by_rows(lhs, materialise(rhs.T), precision)

    def tangent_of_rhs(lhs: Array, rhs: Array) -> Array:
        if rhs.shape[0] <= rhs.shape[1] or rhs.size > _SMALL:
            return plain(lhs, rhs)
        return _by_rows(lhs, materialise(rhs.T), precision)

    return bilinear(plain, tangent_of_lhs, tangent_of_rhs)(lhs, rhs)


def bilinear(
    function: Callable[[Array, Array], Array],
    tangent_of_lhs: Callable[[Array, Array], Array],
    tangent_of_rhs: Callable[[Array, Array], Array],
) -> Callable[[Array, Array], Array]:
    """A function that is linear in each argument, with gradients that are derived from two equal functions.

    jax transposes the two functions into the gradients, so the form of each function decides the form of one gradient.
    If the program takes the routes of another platform than CPUs, the result is ``function`` itself.

    Args:
        function: a function of two arrays, linear in each.
        tangent_of_lhs: an equal function, which is transposed for the gradient of the first argument.
        tangent_of_rhs: an equal function, which is transposed for the gradient of the second argument.

    Returns:
        The function of two arrays.
    """
    if routes.platform() != "cpu":
        return function
    ruled = jax.custom_jvp(function)

    @functools.partial(ruled.defjvp, symbolic_zeros=True)
    def _(primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> tuple[Array, Array]:
        (lhs, rhs), (of_lhs, of_rhs) = primals, tangents
        out = ruled(lhs, rhs)
        parts = []
        if not isinstance(of_lhs, SymbolicZero):
            parts.append(tangent_of_lhs(of_lhs, rhs))
        if not isinstance(of_rhs, SymbolicZero):
            parts.append(tangent_of_rhs(lhs, of_rhs))
        return out, sum(parts[1:], parts[0]) if parts else jnp.zeros_like(out)

    # With rematerialisation the transposed kernels are made one layer at a time. Without it, XLA holds the transposed
    # kernels of all layers in memory at once.
    return jax.checkpoint(ruled)


def _plain(lhs: Array, rhs: Array, precision: Any) -> Array:
    return lax.dot_general(lhs, rhs, (((1,), (0,)), ((), ())), precision)


def _by_rows(lhs: Array, rhs: Array, precision: Any) -> Array:
    return lax.dot_general(lhs, rhs, (((1,), (1,)), ((), ())), precision)
