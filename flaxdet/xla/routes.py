"""Chooses the route by which a program computes an algorithm.

A route is one way to compute a result. The routes of an algorithm give the same numbers up to the order of sums, but
each is quick on a different platform. ``by_platform`` takes the route of the platform that a program is lowered for. A
route that changes how jax differentiates is chosen earlier, when the program is traced: by the devices of the arguments
if a ``JitByDevice`` traces the program, otherwise by the default backend. ``routes_for`` overrides every choice.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import jax
from jax import lax

Platform = Literal["cpu", "gpu", "tpu"]
PLATFORMS: tuple[Platform, ...] = ("cpu", "gpu", "tpu")

# jit's cache key includes a user context, and no other context variable. So a function that is called with and without
# an override is traced twice.
_override = jax.make_user_context(None)


def routes_for(platform: Platform | None) -> AbstractContextManager[Any]:
    """A context in which every program that this thread traces takes the routes of one platform.

    Used to compile for a device that this process doesn't have, and to test the routes of other platforms on the
    present device. The context changes neither the device nor the options of ``flaxdet.compiler_options``.

    Args:
        platform: "cpu", "gpu" or "tpu"; None cancels the override of an enclosing context.

    Returns:
        The context manager.

    Raises:
        ValueError: for another platform.
    """
    if platform is not None and platform not in PLATFORMS:
        raise ValueError(f"platform should be one of {', '.join(PLATFORMS)}, or None, got {platform!r}")
    return _override(platform)


def of_devices(platform: str) -> AbstractContextManager[Any]:
    """A context in which programs take the routes of the devices they run on, unless ``routes_for`` overrides them.

    Args:
        platform: platform of the devices, from ``flaxdet.xla.devices.platform_of``.

    Returns:
        The context manager. It does nothing if there is an override, or if the default backend is of this platform.
    """
    if _override.value is not None or platform == jax.default_backend():
        return nullcontext()
    return _override(platform)


def platform() -> str:
    """The platform whose routes a program takes, for routes that are chosen while the program is traced.

    Returns:
        "cpu", "gpu" or "tpu": the override if there is one, else the platform of the ``JitByDevice`` that traces, else
        jax's default backend (asking for it starts that backend).
    """
    return _override.value or jax.default_backend()


def by_platform(*args: Any, default: Callable[..., Any], **routes: Callable[..., Any]) -> Any:
    """Calls the route of the platform that the program is lowered for, or of the override if there is one.

    Args:
        *args: arrays, the arguments of every route.
        default: the route of platforms that are not named.
        **routes: functions by platform ("cpu", "gpu", "tpu"), with results equal up to rounding.

    Returns:
        The result of the route.
    """
    if _override.value is not None:
        return routes.get(_override.value, default)(*args)
    if "gpu" in routes:
        routes["cuda"] = routes["rocm"] = routes.pop("gpu")  # lax knows no "gpu"
    return lax.platform_dependent(*args, default=default, **routes)
