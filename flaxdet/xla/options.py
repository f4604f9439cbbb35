"""Compiler options with which XLA compiles the models for CPUs."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp

# XLA:CPU of jaxlib 0.10 hands convolutions and matrix products to YNNPACK. With YNNPACK these models take a tenth
# (FCOS) to a third (Faster R-CNN) longer than with XLA's own kernels, and the gradient of a kernel takes four times as
# long. YNNPACK is quicker for reductions, and for float64, for which XLA has no quick convolution.
_CPU_FLOAT32: dict[str, str | bool] = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
# On CPUs, this pass removes optimization barriers before fusion. With the pass disabled, rematerialisation saves
# memory, and RoIAlign is not computed twice for the gradient of the box head.
_CPU: dict[str, str | bool] = {"xla_disable_hlo_passes": "cse_barrier_expander"}


NAMES = frozenset({*_CPU, *_CPU_FLOAT32})  # of all options that flaxdet sets


def compiler_options(dtype: Any = jnp.float32, *, platform: str | None = None) -> dict[str, str | bool] | None:
    """Options for ``jax.jit`` under which the models run fastest on a platform.

    flaxdet's functions use these options. In a custom jit, use
    ``jax.jit(model.apply, compiler_options=flaxdet.compiler_options(model.dtype))``. The results are the same up to
    rounding. jax accepts compiler options only at the outermost jit.

    Args:
        dtype: dtype of the model's computation.
        platform: platform of the devices that the program will run on: "cpu", "gpu" or "tpu". The default is the
            platform of jax's default backend, which is wrong for arrays on other devices.

    Returns:
        For CPUs, the options that this jaxlib knows (None if it knows none). For other platforms None, the default of
        ``jax.jit``.
    """
    if (platform or jax.default_backend()) != "cpu":
        return None
    options = _CPU if jnp.dtype(dtype) == jnp.float64 else {**_CPU, **_CPU_FLOAT32}
    return {name: value for name, value in options.items() if known(name, value)} or None


@functools.cache
def known(name: str, value: str | bool) -> bool:
    """Whether this jaxlib accepts an option of XLA.

    Args:
        name: name of the option.
        value: value of the option.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(RuntimeError):  # a process without a CPU backend: every backend reads all options
            stack.enter_context(jax.default_device(jax.devices("cpu")[0]))
        try:
            jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
        except jax.errors.JaxRuntimeError:  # another jaxlib, which has no such option
            return False
    return True
