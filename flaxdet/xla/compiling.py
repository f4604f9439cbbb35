"""What XLA is told when it compiles the models."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import math
import platform
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, get_opaque_trace_state

from flaxdet.xla import routes

# XLA:CPU of jaxlib 0.10 hands convolutions and products to YNNPACK, which over these models takes a tenth (FCOS) to a
# third (Faster R-CNN) longer than XLA's own kernels, and four times as long over the gradient of a kernel. Reductions
# it does better; and float64, for which XLA has no quick convolution.
_CPU_FLOAT32: dict[str, str | bool] = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
# This pass takes optimisation barriers out before fusion, on CPUs alone. Without it, rematerialisation saves memory,
# and RoIAlign is not computed twice for the gradient of the box head.
_CPU: dict[str, str | bool] = {"xla_disable_hlo_passes": "cse_barrier_expander"}
# XLA:CPU asks for a program's temporaries at each call. What is above 32 MiB glibc maps anew each time and gives back
# after it, so that every page faults; what is below it keeps. Arrays larger than a piece share memory with none other.
_PIECE = 25_000_000  # bytes; two to a heap of glibc's
_IN_PIECES: dict[str, str | bool] = {"xla_multiheap_size_constraint_per_heap": str(_PIECE)}
_NOT_KEPT = r"Error writing persistent compilation cache entry for .*: Multiple temp buffer allocations"


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


class JitBySize:
    """``jax.jit`` under ``compiler_options``, for programs whose memory is worth keeping from call to call.

    On CPUs under glibc, programs of small arrays have their temporaries in pieces that glibc keeps: a training step of
    FCOS, of two images of 320x448, takes a seventh less. Numbers are the same. Inside another jit it is a plain jit.

    XLA cannot serialize a program in pieces, so jax's persistent compilation cache does without it and each process
    compiles it anew; jax's warning of that is kept back. Where jax is to raise instead
    (``jax_raise_persistent_cache_errors``), no program is in pieces.

    Attributes:
        chosen: the jitted function by the platform whose routes it takes, and by the structure, shapes, dtypes and
            shardings of the arguments that it was called with. Empty where no program is ever in pieces: on
            accelerators, with another C library than glibc, and with a jaxlib that doesn't know the option.
    """

    def __init__(self, function: Callable[..., Any], dtype: Any = jnp.float32, **options: Any):
        """Wraps a function.

        Args:
            function: of pytrees of arrays.
            dtype: in which the model computes.
            **options: as ``jax.jit`` takes them, but no static arguments.
        """
        chosen = compiler_options(dtype)
        self._nested = self._plain = self._pieces = jax.jit(function, **options)
        if chosen is not None:
            self._plain = self._pieces = jax.jit(function, compiler_options=chosen, **options)
        if chosen is not None and platform.libc_ver()[0] == "glibc" and _known(*next(iter(_IN_PIECES.items()))):
            self._pieces = jax.jit(function, compiler_options={**chosen, **_IN_PIECES}, **options)
        self._outermost = get_opaque_trace_state()
        self._last: tuple[Any, Any] = (None, None)  # key and jitted function of the last call: steps are alike
        self.chosen: dict[Any, Any] = {}
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's values.

        Args:
            *args: pytrees of arrays.
            **kwargs: pytrees of arrays.
        """
        if self._plain is self._nested:
            return self._plain(*args, **kwargs)
        if get_opaque_trace_state() != self._outermost:
            return self._nested(*args, **kwargs)  # jax takes options at the outermost jit alone
        if self._pieces is self._plain:
            return self._plain(*args, **kwargs)
        key = (routes.platform(), *_signature((args, kwargs)))
        last, jitted = self._last
        if key == last:  # mostly the very same objects, and so cheaper than a hash
            return jitted(*args, **kwargs)
        if key in self.chosen:
            self._last = key, self.chosen[key]
            return self.chosen[key](*args, **kwargs)
        self.chosen[key] = self._choose(*args, **kwargs)
        with warnings.catch_warnings():  # this call compiles
            warnings.filterwarnings("ignore", _NOT_KEPT, UserWarning)
            return self.chosen[key](*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """As ``lower`` of ``jax.jit``.

        Args:
            *args: pytrees of arrays or ``jax.ShapeDtypeStruct``.
            **kwargs: pytrees of arrays or ``jax.ShapeDtypeStruct``.
        """
        return self._choose(*args, **kwargs).lower(*args, **kwargs)

    def _choose(self, *args: Any, **kwargs: Any) -> Any:
        config: Any = jax.config
        if self._pieces is self._plain or config.jax_raise_persistent_cache_errors:
            return self._plain
        return self._pieces if _largest(self._plain.trace(*args, **kwargs).jaxpr.jaxpr) <= _PIECE else self._plain


def _signature(arguments: Any) -> tuple[Any, tuple[Any, ...], tuple[Any, ...]]:
    """What distinguishes one compiled program from another: the structure, the leaves' types, and their shardings."""
    leaves, structure = jax.tree.flatten(arguments)
    try:
        return structure, tuple([leaf.aval for leaf in leaves]), tuple([leaf.sharding for leaf in leaves])
    except AttributeError:  # numpy arrays or Python's numbers among them
        shardings = tuple([getattr(leaf, "sharding", None) for leaf in leaves])
        return structure, tuple([jax.typeof(leaf) for leaf in leaves]), shardings


def _largest(jaxpr: Jaxpr) -> int:
    """Bytes of the largest array that a program computes, as jax writes it."""
    sizes = [0]
    for equation in jaxpr.eqns:
        results: Any = [var.aval for var in equation.outvars]
        sizes += [math.prod(result.shape) * result.dtype.itemsize for result in results if hasattr(result, "dtype")]
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr)):
            if isinstance(inner, ClosedJaxpr | Jaxpr):
                sizes.append(_largest(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner))
    return max(sizes)


@functools.cache
def _known(name: str, value: str | bool) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError:  # another jaxlib, which has no such option
        return False
    return True


def keep_compiled(folder: str | Path) -> Path | None:
    """Turns on jax's persistent compilation cache for this process, unless the user has chosen one or turned it off.

    For programs, such as the command line; the library itself never changes jax's configuration.

    Args:
        folder: under which programs are kept, those of different processors apart, since some instructions of one
            are unknown to another.

    Returns:
        The folder in use, or None if the cache is off.
    """
    config: Any = jax.config
    if not config.jax_enable_compilation_cache:
        return None
    if config.jax_compilation_cache_dir is None:
        config.update("jax_compilation_cache_dir", str(Path(folder) / _processor()))
        config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # many small programs take seconds together
    return Path(str(config.jax_compilation_cache_dir))


def give_memory_back() -> None:
    """Has glibc return what it keeps of freed memory; does nothing with another C library.

    Loading, folding and compiling leave it holding 300 MB, of which the threads that run the program use nothing; a
    train step in pieces leaves its temporaries.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _processor() -> str:
    """Names the kind of processor by what it can do."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = platform.processor()
    flags = re.search(r"^(flags|Features)\s*:.*$", text, re.MULTILINE)
    return f"{platform.machine()}-{hashlib.sha256((flags[0] if flags else text).encode()).hexdigest()[:8]}"
