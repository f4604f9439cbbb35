"""One contender in a separate process: the time to the first detection, and the peak memory.

    python benchmarks/alone.py CONTENDER MODEL WEIGHTS PHOTO [--batch 1] [--repeats 1] [--started TIME]

Other benchmarks start this script; it prints one line of JSON. It imports only the contender's libraries. Times are
seconds since --started. Memory is the resident set in MiB: at the times of the measurement, the peak over the whole
process (including loading and compiling), and the peak over the calls after the first; on a GPU also the device's peak.
"""

import time

STARTED = time.time()  # before the imports, which count

import argparse  # noqa: E402
import json  # noqa: E402
import resource  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
from contenders import (  # noqa: E402
    CONTENDERS,
    DTYPES,
    MODELS,
    load_torch,
    make_predictor,
    torch_contender,
    torchvision_detection,
)
from PIL import Image  # noqa: E402


def resident(field: str) -> float:
    """MiB: "VmRSS" now, or "VmHWM", the peak.

    ru_maxrss is only for where there is no /proc: a process that was forked inherits its parent's.
    """
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024**2 if sys.platform == "darwin" else 1024)


def reset_resident_peak() -> bool:
    """Whether the peak now counts from here."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def device_peak(contender: str) -> float | None:
    """MiB of the accelerator's memory, None on a CPU."""
    if contender == "flaxdet":
        import jax

        stats = jax.devices()[0].memory_stats() or {}
        peak = stats.get("peak_bytes_in_use")
    else:
        import torch

        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return None if peak is None else peak / 1024**2


def main() -> None:
    """Runs the contender."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("weights", type=Path)
    parser.add_argument("photo", type=Path)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1, help="calls after the first")
    parser.add_argument("--min-size", type=int, default=800)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--started", type=float, default=STARTED, help="time.time() when the process was started")
    options = parser.parse_args()
    report: dict[str, Any] = {"seconds": {}, "resident": {}}

    def note(moment: str) -> None:
        report["seconds"][moment] = time.time() - options.started
        report["resident"][moment] = resident("VmRSS")

    numbers: dict[str, Any] = {"dtype": options.dtype, "min_size": options.min_size}
    if options.contender == "flaxdet":
        import flaxdet  # noqa: F401

        note("imported")
        columns, rows = Image.open(options.photo).size
        run: Any = make_predictor(options.weights, (rows, columns), batch=options.batch, **numbers)
    else:
        torchvision_detection()
        note("imported")
        model = load_torch(options.model, options.weights, options.contender, **numbers)
        run = torch_contender(model, dtype=options.dtype)
    note("loaded")
    photos = [np.array(Image.open(options.photo).convert("RGB"))] * options.batch
    run(photos)
    note("first detection")
    report["peak"] = resident("VmHWM")
    was_reset = reset_resident_peak()
    start = time.perf_counter()
    for _ in range(options.repeats):
        run(photos)
    report["seconds"]["a later call"] = (time.perf_counter() - start) / max(options.repeats, 1)
    report["running_peak"] = resident("VmHWM") if was_reset and options.repeats else None
    report["device_peak"] = device_peak(options.contender)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
