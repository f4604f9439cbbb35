"""``jax.jit`` with the options of the devices that a call's arguments lie on."""

from __future__ import annotations

import functools
import math
import platform as machine
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, get_opaque_trace_state

from flaxdet.xla import routes
from flaxdet.xla.devices import platform_of
from flaxdet.xla.options import compiler_options, known

# XLA:CPU asks for a program's temporary buffers at each call. What is above 32 MiB glibc maps anew each time and gives
# back after it, so that every page faults; smaller buffers glibc keeps. Arrays larger than a piece lie alone in one.
_PIECE = 25_000_000  # bytes; two to a heap of glibc's
_IN_PIECES: dict[str, str | bool] = {"xla_multiheap_size_constraint_per_heap": str(_PIECE)}
_NOT_CACHED = r"Error writing persistent compilation cache entry for .*: Multiple temp buffer allocations"


class JitByDevice:
    """``jax.jit`` under ``compiler_options`` of the platform that a call runs on; inside another jit a plain jit.

    Routes that are chosen while a program is traced are that platform's too, unless ``routes_for`` overrides them.
    """

    def __init__(self, function: Callable[..., Any], dtype: Any = jnp.float32, **options: Any):
        """Wraps a function.

        Args:
            function: of pytrees of arrays.
            dtype: in which the model computes.
            **options: as ``jax.jit`` takes them.
        """
        self._function, self._dtype, self._options = function, dtype, options
        self._nested = jax.jit(function, **options)
        self._jitted: dict[str, Any] = {}
        self._outermost = get_opaque_trace_state()
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's values.

        Args:
            *args: as the function takes them.
            **kwargs: as the function takes them.
        """
        if get_opaque_trace_state() != self._outermost:
            return self._nested(*args, **kwargs)  # jax takes options at the outermost jit alone
        platform = self._platform(args, kwargs)
        with routes.of_devices(platform):
            return self._call(platform, *args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """As ``lower`` of ``jax.jit``.

        Args:
            *args: pytrees of arrays or ``jax.ShapeDtypeStruct``.
            **kwargs: pytrees of arrays or ``jax.ShapeDtypeStruct``.
        """
        platform = self._platform(args, kwargs)
        with routes.of_devices(platform):
            return self._choose(platform, *args, **kwargs).lower(*args, **kwargs)

    def on(self, platform: str) -> Any:
        """The jitted function for a platform; always the same one.

        Args:
            platform: "cpu", "gpu" or "tpu".
        """
        if platform not in self._jitted:
            chosen = compiler_options(self._dtype, platform=platform)
            options = {} if chosen is None else {"compiler_options": chosen}
            self._jitted[platform] = jax.jit(self._function, **options, **self._options)
        return self._jitted[platform]

    def _platform(self, args: Any, kwargs: Any) -> str:
        return platform_of(args, kwargs, self._options.get("in_shardings"))

    def _call(self, platform: str, *args: Any, **kwargs: Any) -> Any:
        return self.on(platform)(*args, **kwargs)

    def _choose(self, platform: str, *args: Any, **kwargs: Any) -> Any:
        del args, kwargs
        return self.on(platform)

    def _cache_size(self) -> int:
        """Compiled programs, as jax counts them."""
        return sum(jitted._cache_size() for jitted in self._jitted.values())


class JitBySize(JitByDevice):
    """``JitByDevice`` for programs whose memory is worth keeping from call to call.

    On CPUs under glibc, programs of small arrays have their temporary buffers in pieces that glibc keeps: a training
    step of FCOS, of two images of 320x448, takes a seventh less. Numbers are the same. Static arguments aren't taken.

    XLA can't serialise a program in pieces, so jax's persistent compilation cache does without it and each process
    compiles it anew; jax's warning of that is suppressed. Where jax is to raise instead
    (``jax_raise_persistent_cache_errors``), no program is in pieces.

    Attributes:
        chosen: the jitted function by the platforms that it runs on and whose routes it takes, and by the structure,
            shapes, dtypes and shardings of the arguments that it was called with. Empty where no program is ever in
            pieces: on accelerators, with another C library than glibc, and with a jaxlib that doesn't know the option.
    """

    def __init__(self, function: Callable[..., Any], dtype: Any = jnp.float32, **options: Any):
        """Wraps a function.

        Args:
            function: of pytrees of arrays.
            dtype: in which the model computes.
            **options: as ``jax.jit`` takes them, but no static arguments.
        """
        super().__init__(function, dtype, **options)
        self._pieces: dict[str, Any] = {}
        self._last: tuple[Any, Any] = (None, None)  # key and jitted function of the last call: steps are alike
        self.chosen: dict[Any, Any] = {}

    def in_pieces(self, platform: str) -> Any:
        """The jitted function whose temporary buffers are in pieces; ``on(platform)`` where there is no such thing.

        Args:
            platform: "cpu", "gpu" or "tpu".
        """
        if platform not in self._pieces:
            self._pieces[platform] = self.on(platform)
            chosen = compiler_options(self._dtype, platform=platform)
            if chosen is not None and machine.libc_ver()[0] == "glibc" and known(*next(iter(_IN_PIECES.items()))):
                options = {"compiler_options": {**chosen, **_IN_PIECES}}
                self._pieces[platform] = jax.jit(self._function, **options, **self._options)
        return self._pieces[platform]

    def _call(self, platform: str, *args: Any, **kwargs: Any) -> Any:
        if self.in_pieces(platform) is self.on(platform):
            return self.on(platform)(*args, **kwargs)
        key = (platform, routes.platform(), *_signature((args, kwargs)))
        last, jitted = self._last
        if key == last:  # mostly the very same objects, and so cheaper than a hash
            return jitted(*args, **kwargs)
        if key in self.chosen:
            self._last = key, self.chosen[key]
            return self.chosen[key](*args, **kwargs)
        self.chosen[key] = self._choose(platform, *args, **kwargs)
        with warnings.catch_warnings():  # this call compiles
            warnings.filterwarnings("ignore", _NOT_CACHED, UserWarning)
            return self.chosen[key](*args, **kwargs)

    def _choose(self, platform: str, *args: Any, **kwargs: Any) -> Any:
        plain, pieces = self.on(platform), self.in_pieces(platform)
        config: Any = jax.config
        if pieces is plain or config.jax_raise_persistent_cache_errors:
            return plain
        return pieces if _largest(plain.trace(*args, **kwargs).jaxpr.jaxpr) <= _PIECE else plain

    def _cache_size(self) -> int:
        own = [jitted for name, jitted in self._pieces.items() if jitted is not self._jitted[name]]
        return super()._cache_size() + sum(jitted._cache_size() for jitted in own)


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
