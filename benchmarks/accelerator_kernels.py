"""Kernels by name and time, as text, of one call: jax's from its trace, torch's from its profiler."""

from __future__ import annotations

import collections
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerator_common import kernels

# Lines of a device that repeat, by module or by operation, what its streams hold.
_DERIVED = ("XLA Modules", "XLA Ops", "Steps", "Framework", "Source", "XLA TraceMe", "XLA Async")


def jax_kernels(run: Callable[[], Any]) -> dict[str, Any]:
    """The kernels of one call.

    Args:
        run: waits for its result, and has run before.

    Returns:
        As ``accelerator_common.kernels``; on a CPU the functions of XLA's threads.
    """
    import jax

    quiet = jax.profiler.ProfileOptions()
    quiet.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=quiet):
            jax.block_until_ready(run())
        *_, path = sorted(Path(folder).rglob("*.xplane.pb"))
        profile = jax.profiler.ProfileData.from_file(str(path))
        return kernels(_summed(_events(list(profile.planes))))


def _events(planes: list[Any]) -> Iterator[tuple[str, float]]:
    """(name, milliseconds) of what ran on the devices, or on the host where there is no device."""
    devices = [plane for plane in planes if plane.name.startswith("/device:") and "CUSTOM" not in plane.name.upper()]
    for plane in devices or [plane for plane in planes if plane.name.startswith("/host:")]:
        lines = list(plane.lines)
        streams = [line for line in lines if line.name.startswith("Stream")]
        for line in streams or [line for line in lines if not line.name.startswith(_DERIVED)]:
            for event in line.events:
                yield event.name, event.duration_ns / 1e6


def torch_kernels(run: Callable[[], Any]) -> dict[str, Any]:
    """The kernels of one call.

    Args:
        run: waits for its result, and has run before.

    Returns:
        As ``accelerator_common.kernels``; on a CPU torch's operators.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        run()
    rows: dict[str, tuple[float, int]] = {}
    for event in profiler.key_averages():
        on_device = event.device_type != torch.autograd.DeviceType.CPU
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        # a range that somebody named repeats the kernels inside it
        if microseconds and on_device == on_gpu and not getattr(event, "is_user_annotation", False):
            rows[event.key] = (microseconds / 1e3, event.count)
    return kernels(rows)


def _summed(events: Iterator[tuple[str, float]]) -> dict[str, tuple[float, int]]:
    milliseconds: collections.Counter[str] = collections.Counter()
    count: collections.Counter[str] = collections.Counter()
    for name, each in events:
        milliseconds[name] += each  # pyright: ignore[reportArgumentType]
        count[name] += 1
    return {name: (milliseconds[name], count[name]) for name in count}
