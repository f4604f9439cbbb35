"""The persistent cache of compiled programs."""

from __future__ import annotations

import hashlib
import platform
import re
from pathlib import Path
from typing import Any

import jax


def keep_compiled(folder: str | Path) -> Path | None:
    """Turns on jax's persistent compilation cache for this process, unless the user has chosen one or turned it off.

    For programs such as the command line. The library itself never changes jax's configuration.

    Args:
        folder: the folder of the cache. Each kind of processor has a subfolder, since a compiled program may have
            instructions that another processor lacks.

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


def _processor() -> str:
    """A name for the kind of processor: the architecture and a hash of the processor's features."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = platform.processor()
    flags = re.search(r"^(flags|Features)\s*:.*$", text, re.MULTILINE)
    return f"{platform.machine()}-{hashlib.sha256((flags[0] if flags else text).encode()).hexdigest()[:8]}"
