"""The stages of accelerator.py before all others: the machine and its ceilings, and the weights."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from accelerator_common import Notes, sizes, timed, weights_file


def machine(options: dict[str, Any], notes: Notes) -> str:
    """Device, versions, seconds to import; then the copy and the matrix products that the device manages.

    Raises:
        RuntimeError: on a CPU, unless the run is a small one.
    """
    start = time.perf_counter()
    import flaxdet  # noqa: F401

    imported = time.perf_counter() - start
    import jax

    start = time.perf_counter()
    platform = jax.default_backend()
    notes.add("imported", flaxdet=imported, devices=time.perf_counter() - start, platform=platform)
    if platform == "cpu" and not options["small"]:
        raise RuntimeError("jax found no accelerator: on a CPU the run must be a small one (--small)")
    from common import describe_machine, matmul_rate
    from contenders import DTYPES

    notes.add("machine", **describe_machine(), platform=platform)
    for library, run in _copies(options).items():
        with notes.attempt(what="copy", library=library):
            moved, seconds = run()
            notes.add("ceiling", what="copy", library=library, unit="GB/s", value=moved / seconds / 1e9)
    best = {}
    for dtype in DTYPES[::-1]:
        with notes.attempt(what="product", dtype=dtype):
            rates = matmul_rate(dtype, 256 if options["small"] else None)
            best[dtype] = max(rates.values()) / 1000
            for library, rate in rates.items():
                notes.add("ceiling", what=dtype, library=library, unit="TFLOP/s", value=rate / 1000)
    return f"{jax.devices()[0].device_kind}: " + ", ".join(f"{name} {rate:.4g} TFLOP/s" for name, rate in best.items())


def _copies(options: dict[str, Any]) -> dict[str, Any]:
    """For each library a function that moves a large array once; it returns the bytes read and written, and seconds."""
    import jax
    import jax.numpy as jnp
    import torch
    from common import wait
    from contenders import torch_device

    count = 1_000_000 if options["small"] else 100_000_000

    def ours() -> tuple[int, float]:
        source = jax.random.uniform(jax.random.key(0), (count,), jnp.float32)
        copy = jax.jit(lambda x: -x)  # which a compiler can't leave out
        return 8 * count, timed(lambda: copy(source), jax.block_until_ready, options)["median"]

    def theirs() -> tuple[int, float]:
        source = torch.rand(count, device=torch_device())
        target = torch.empty_like(source)
        return 8 * count, timed(lambda: target.copy_(source), wait, options)["median"]

    return {"jax": ours, "torch": theirs}


def weights(options: dict[str, Any], notes: Notes) -> str:
    """Lively weights of the models, in files that both sides read; made on the CPU."""
    from common import lively_weights

    start = time.perf_counter()
    for model in options["models"]:
        target = weights_file(options, model)
        part: Path = target.with_suffix(".part.safetensors")
        lively_weights(model, part)
        part.replace(target)
        notes.add("weights", model=model, bytes=target.stat().st_size)
    return f"made in {time.perf_counter() - start:.1f} s ({sizes(options)['min_size']} px)"
