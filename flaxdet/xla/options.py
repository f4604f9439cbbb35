"""Options of jit: what XLA is told when it compiles the models for a CPU."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp

# XLA:CPU of jaxlib 0.10 hands convolutions and products to YNNPACK, which over these models takes a tenth (FCOS) to a
# third (Faster R-CNN) longer than XLA's own kernels, and four times as long over the gradient of a kernel. Reductions
# it does better; and float64, for which XLA has no quick convolution.
_CPU_FLOAT32: dict[str, str | bool] = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
# This pass takes optimization barriers out before fusion, on CPUs alone. Without it, rematerialisation saves memory,
# and RoIAlign is not computed twice for the gradient of the box head.
_CPU: dict[str, str | bool] = {"xla_disable_hlo_passes": "cse_barrier_expander"}


def compiler_options(dtype: Any = jnp.float32, *, platform: str | None = None) -> dict[str, str | bool] | None:
    """Options for ``jax.jit`` under which the models run fastest on a platform.

    flaxdet's own functions use them. A jit of your own does with
    ``jax.jit(model.apply, compiler_options=flaxdet.compiler_options(model.dtype))``; answers are the same up to
    rounding. jax takes options at the outermost jit alone.

    Args:
        dtype: in which the model computes.
        platform: "cpu", "gpu" or "tpu", of the devices that the program will run on; default that of jax's default
            backend, which is wrong for arrays that lie on other devices.

    Returns:
        Options for CPUs, as far as this jaxlib knows them; None elsewhere, which is jit's default.
    """
    if (platform or jax.default_backend()) != "cpu":
        return None
    options = _CPU if jnp.dtype(dtype) == jnp.float64 else {**_CPU, **_CPU_FLOAT32}
    return {name: value for name, value in options.items() if known(name, value)} or None


@functools.cache
def known(name: str, value: str | bool) -> bool:
    """Whether this jaxlib takes an option of XLA.

    Args:
        name: of the option.
        value: of the option.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(RuntimeError):  # a process without a CPU backend: every backend reads all options
            stack.enter_context(jax.default_device(jax.devices("cpu")[0]))
        try:
            jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
        except jax.errors.JaxRuntimeError:  # another jaxlib, which has no such option
            return False
    return True
