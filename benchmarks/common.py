"""What the benchmarks share: the machine's description, timing in alternation, the table and the JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from contenders import MODELS, torch_device
from photos import describe_error, photo, photos

import flaxdet
from flaxdet.convert import from_torchvision, reference
from flaxdet.convert.lively import make_lively
from flaxdet.registry import make_model
from flaxdet.xla.options import compiler_options

__all__ = ["MODELS", "describe_error", "photo", "photos"]  # which other files import from here

HERE = Path(__file__).parent


def lively_weights(name: str, path: Path) -> None:
    """Writes seeded weights under which every tensor matters to a file that both sides read."""
    state_dict = make_lively(reference.build(name)).state_dict()
    model = make_model(name, num_classes=91)
    flaxdet.save(path, model, from_torchvision(model, state_dict))


def share_gpu() -> None:
    """Keeps jax from taking most of a GPU's memory, where torch needs some in the same process."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def describe_machine() -> dict[str, Any]:
    """Processor, device, threads and versions; printed as well."""
    machine = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "device": str(jax.devices()[0]),
        "device_kind": jax.devices()[0].device_kind,
        "torch_device": torch_device(),
        "torch_threads": torch.get_num_threads(),
        "xla_threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torchvision_ops": reference.ops_kind(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("jax", "jaxlib", "flax", "torch", "torchvision")},
    }
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    return machine


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def matmul_rate(dtype: str = "float32", size: int | None = None) -> dict[str, float]:
    """GFLOP/s of a large square product, in jax and in torch: what this machine gives in practice."""
    on_cpu = jax.default_backend() == "cpu"
    size = size or (3072 if on_cpu else 8192)
    rng = np.random.default_rng(0)
    host = rng.standard_normal((size, size), np.float32)
    half = dtype == "bfloat16"
    ours = jnp.asarray(host, jnp.bfloat16 if half else jnp.float32)
    precision = "highest" if dtype == "float32" and not on_cpu else None
    product = jax.jit(lambda x: jnp.matmul(x, x, precision=precision), compiler_options=compiler_options())
    theirs = torch.from_numpy(host).to(torch_device(), torch.bfloat16 if half else torch.float32)
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    seconds = measure_short(
        {"jax": lambda: jax.block_until_ready(product(ours)), "torch": lambda: wait(theirs @ theirs)}, 5
    )
    return {name: 2 * size**3 / min(values) / 1e9 for name, values in seconds.items()}


def wait(result: Any) -> Any:
    """Waits until torch's device is done, as ``jax.block_until_ready`` does for jax's."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result


def measure(
    functions: Mapping[str, Callable[[], Any]], repeats: int, failed: dict[str, str] | None = None
) -> dict[str, list[float]]:
    """Seconds of each run, the functions in turn after one warm-up each.

    Where ``failed`` is given, a function that fails in its warm-up is left out and its error noted there.
    """
    functions, seconds = dict(functions), {}
    for name, function in list(functions.items()):
        try:
            function()
        except Exception as error:
            if failed is None:
                raise
            failed[name] = describe_error(error)
            del functions[name]
    seconds = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def measure_short(
    functions: Mapping[str, Callable[[], Any]], repeats: int, at_least: float = 0.05
) -> dict[str, list[float]]:
    """``measure`` for functions of milliseconds: each turn calls one until ``at_least`` seconds are over."""
    counts = {}
    for name, function in functions.items():
        function()
        start = time.perf_counter()
        function()
        counts[name] = max(1, round(at_least / (time.perf_counter() - start)))

    def several(function: Callable[[], Any], count: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(count):
                function()

        return run

    turns = measure({name: several(function, counts[name]) for name, function in functions.items()}, repeats)
    return {name: [value / counts[name] for value in values] for name, values in turns.items()}


def show(title: str, seconds: Mapping[str, list[float]], unit: str = "s") -> dict[str, Any]:
    """Prints medians, in seconds or in "ms", and what flaxdet takes of each; returns them for the JSON."""
    medians = {contender: statistics.median(values) for contender, values in seconds.items()}
    factor = {"s": 1, "ms": 1000}[unit]
    print(title)
    for contender, values in seconds.items():
        spread = f"({min(values) * factor:.2f} to {max(values) * factor:.2f})"
        line = f"  {contender:<28}{medians[contender] * factor:8.2f} {unit} {spread:<20}"
        if "flaxdet" in medians:
            line += f" flaxdet takes {medians['flaxdet'] / medians[contender]:.2f} of it"
        print(line, flush=True)
    return {"seconds": dict(seconds), "median": medians}


def run_alone(contender: str, model: str, weights: Path, image: Path, *options: Any, env: Any = None) -> dict[str, Any]:
    """``alone.py`` in a fresh process; its report, or {"error": ...}."""
    command: Sequence[Any] = [sys.executable, HERE / "alone.py", contender, model, weights, image, *options]
    done = subprocess.run(
        [*map(str, command), "--started", str(time.time())],
        env=os.environ if env is None else env,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        return {"error": describe_error("".join(last) or f"exit status {done.returncode}")}
    return json.loads(done.stdout.splitlines()[-1])


def json_path(name: str, dtype: str = "float32") -> Path:
    """Where figures go by default: beside this file, those of a GPU or another dtype apart."""
    parts = [name, *([] if jax.default_backend() == "cpu" else [jax.default_backend()])]
    return HERE / ("-".join([*parts, *([] if dtype == "float32" else [dtype])]) + ".json")


def write(path: Path, machine: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Writes the figures as JSON."""
    report = {"machine": machine, "date": time.strftime("%Y-%m-%d"), "results": results}
    path.write_text(json.dumps(report, indent=1) + "\n")
