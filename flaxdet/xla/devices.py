"""The platform that a jitted function runs on, by the devices of its arguments."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Sharding


def platform_of(*trees: Any) -> str:
    """The platform that ``jax.jit`` runs a function on.

    Decides as ``jax.jit`` does. The function runs on the devices of the committed arrays. Without committed arrays it
    runs on ``jax.default_device``, or, if that is not set, on the default backend (asking for it starts that backend).

    Args:
        *trees: pytrees of arguments, ``jax.ShapeDtypeStruct`` and shardings.

    Returns:
        "cpu", "gpu" or "tpu".
    """
    for leaf in jax.tree.leaves(trees):
        if getattr(leaf, "committed", False):
            return _platform(leaf.sharding)
        if isinstance(leaf, Sharding):
            return _platform(leaf)
        if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is not None:
            return _platform(leaf.sharding)
    config: Any = jax.config
    default = config.jax_default_device
    if default is None:
        return jax.default_backend()
    return default if isinstance(default, str) else default.platform


def _platform(sharding: Sharding) -> str:
    return next(iter(sharding.device_set)).platform
