"""Optimization barriers, each named after the effect on XLA.

XLA:CPU honours them only under ``flaxdet.compiler_options()``; otherwise it removes them before fusion.
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax
from jax import lax

from flaxdet.xla import routes

Tree = TypeVar("Tree")


def materialise(values: Tree) -> Tree:
    """Has XLA compute each array once and write it to memory, before anything reads that array.

    Without the barrier, XLA may fuse the computation into each reader and so repeat it. XLA may also change an
    operation to suit one reader, such as a top-k of which a reader takes a slice.

    Args:
        values: any pytree of arrays.

    Returns:
        The same pytree.
    """
    return jax.tree.map(lax.optimization_barrier, values)


def wait_for_all(values: Tree) -> Tree:
    """Has XLA compute all of the arrays before any operation reads one of them.

    It delays work that XLA would otherwise start early, and whose results would wait in memory.

    Args:
        values: any pytree of arrays.

    Returns:
        The same pytree.
    """
    return lax.optimization_barrier(values)


@jax.custom_jvp
def save_for_backward(x: jax.Array) -> jax.Array:
    """Has XLA save this array for the backward pass instead of the arrays it was computed from.

    The identity. In a program that takes the routes of CPUs, differentiation puts one optimization barrier on the
    value and one on the cotangent.

    Args:
        x: any array.

    Returns:
        The same array.
    """
    return x


@save_for_backward.defjvp
def _save_for_backward_jvp(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
    if routes.platform() != "cpu":
        return primals[0], tangents[0]
    return lax.optimization_barrier(primals[0]), lax.optimization_barrier(tangents[0])
