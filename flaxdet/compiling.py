"""What XLA is told when it compiles the models."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

# XLA:CPU of jaxlib 0.10 hands convolutions and products to YNNPACK, which over these models takes a tenth (FCOS) to a
# third (Faster R-CNN) longer than XLA's own kernels, and four times as long over the gradient of a kernel. Reductions
# it does better; and float64, for which XLA has no quick convolution.
_CPU_FLOAT32: dict[str, str | bool] = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
# This pass takes optimisation barriers out before fusion, on CPUs alone. Without it, rematerialisation saves memory,
# and RoIAlign is not computed twice for the gradient of the box head.
_CPU: dict[str, str | bool] = {"xla_disable_hlo_passes": "cse_barrier_expander"}


def compiler_options(dtype: Any = jnp.float32) -> dict[str, str | bool] | None:
    """Options for ``jax.jit`` under which the models run fastest on the default backend.

    flaxdet's own functions use them. A jit of your own does with
    ``jax.jit(model.apply, compiler_options=flaxdet.compiler_options(model.dtype))``; answers are the same up to
    rounding. jax takes them at the outermost jit alone.

    Args:
        dtype: in which the model computes.

    Returns:
        Options for CPUs, as far as this jaxlib knows them; None elsewhere, which is jit's default.
    """
    if jax.default_backend() != "cpu":
        return None
    options = _CPU if jnp.dtype(dtype) == jnp.float64 else {**_CPU, **_CPU_FLOAT32}
    return {name: value for name, value in options.items() if _known(name, value)} or None


@functools.cache
def _known(name: str, value: str | bool) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError:  # another jaxlib, which has no such option
        return False
    return True
