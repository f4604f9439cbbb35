"""Optimization barriers, named for what they make XLA do.

XLA:CPU heeds them under ``flaxdet.compiler_options()`` alone: else it takes them out before it fuses.
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax
from jax import lax

from flaxdet.xla import routes

Tree = TypeVar("Tree")


def materialise(values: Tree) -> Tree:
    """Has XLA compute each array once and write it to memory, before anything reads that array.

    Without it XLA may fuse the computation into each reader and so repeat it there, or change an operation for one
    reader's sake, such as a top-k of which a reader takes a slice.

    Args:
        values: any pytree of arrays.

    Returns:
        The same pytree.
    """
    return jax.tree.map(lax.optimization_barrier, values)


def wait_for_all(values: Tree) -> Tree:
    """Has XLA start nothing that reads one of the arrays before all of them are there.

    It orders work that XLA would else start early, whose results then wait in memory.

    Args:
        values: any pytree of arrays.

    Returns:
        The same pytree.
    """
    return lax.optimization_barrier(values)


@jax.custom_jvp
def save_for_backward(x: jax.Array) -> jax.Array:
    """Has XLA save this array for the backward pass instead of the arrays it was computed from.

    The identity. Under a gradient it puts an optimization barrier on the value and one on its cotangent, where CPUs'
    routes are taken.

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
