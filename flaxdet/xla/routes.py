"""Which of the routes of an algorithm a program takes.

A route is one way to compute a result; the routes of an algorithm give the same numbers, up to the order of sums, and
are quick on different platforms. A program takes the routes of the platform it is lowered for where jax can leave the
choice until then (``by_platform``). Where the choice changes what jax differentiates, it falls when the program is
traced (``platform``), by the default backend. ``routes_for`` overrides both.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

import jax
from jax import lax

Platform = Literal["cpu", "gpu", "tpu"]
PLATFORMS: tuple[Platform, ...] = ("cpu", "gpu", "tpu")

# Part of the key under which jit keeps traced and compiled programs, which no other context variable is: a function
# that is called with and without an override is traced for each.
_override = jax.make_user_context(None)


def routes_for(platform: Platform | None) -> AbstractContextManager[Any]:
    """While it lasts, what this thread traces takes the routes of a platform, wherever it runs.

    For programs that are compiled for a device which this process doesn't have, and for tests of other platforms'
    routes on the device at hand. It changes neither the device nor the options of ``flaxdet.compiler_options``.

    Args:
        platform: "cpu", "gpu" or "tpu"; None ends the override of a context around this one.

    Returns:
        The context manager.

    Raises:
        ValueError: for another platform.
    """
    if platform is not None and platform not in PLATFORMS:
        raise ValueError(f"platform should be one of {', '.join(PLATFORMS)}, or None, got {platform!r}")
    return _override(platform)


def platform() -> str:
    """The platform whose routes are taken where the choice falls when a program is traced.

    Returns:
        The override's, or else the default backend's, which starts that backend.
    """
    return _override.value or jax.default_backend()


def by_platform(*args: Any, default: Callable[..., Any], **routes: Callable[..., Any]) -> Any:
    """The values of one of several functions that are equal up to rounding.

    Args:
        *args: of the functions, arrays.
        default: for platforms that are not named.
        **routes: functions by platform ("cpu", "gpu", "tpu").

    Returns:
        The values of the override's function; without an override, of the platform that the program is lowered for.
    """
    if _override.value is not None:
        return routes.get(_override.value, default)(*args)
    if "gpu" in routes:
        routes["cuda"] = routes["rocm"] = routes.pop("gpu")  # lax knows no "gpu"
    return lax.platform_dependent(*args, default=default, **routes)
