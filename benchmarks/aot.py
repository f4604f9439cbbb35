"""Compiles a detector's program for an accelerator without the device, and reports on the compiled program.

    python benchmarks/aot.py {h100|tpu-v5e|all} {MODEL|all} {infer|train|all} [--dtype bfloat16] [--batch N]
        [--size 800x1088] [--masked] [--depth 50] [--devices 1] [--json FILE] [--keep FOLDER]

The compiler is the device's, and nothing is run. ``infer`` is from normalised pixels to detections, with BatchNorm
folded; ``train`` is a step of SGD with up to 100 boxes an image. Without --masked every canvas fills the bucket, as for
photos of one size. The batch is 16 on an H100 and 8 on a TPU by default. --depth 18 takes a smaller ResNet, for a
quick test. --devices 4 divides the batch over the chips of a TPU v5e 2x2 slice, and lists what they exchange.

It prints, and with --json merges into a file: arithmetic and memory traffic, temporary buffers and size of the code;
kernels, loops (with the number of iterations if known) and sorts; convolutions, products and sums by dtype; and a
roofline, the lower bound of the time at the device's practical rates (``aot_devices.py``). For an H100 the roofline is
the sum over kernels of the longer of arithmetic and traffic, plus a launch for each. For a TPU, whose compiler reports
totals, it is the longer of the program's arithmetic and traffic. A loop of unknown length counts as one iteration. If
the JSON file has the same program already, its former figures are printed too.

The compilers are plugins of jax, some 500 MB each, which every ``import jax`` would find. So they are in a separate
folder (.aot-plugins, or $FLAXDET_AOT_PLUGINS), which only the compiling processes see; without the folder, the script
prints the command that makes it.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import compiled_hlo
from aot_devices import DEVICES, Device

HERE = Path(__file__).parent
ROOT = HERE.parent
MODELS = ("fcos_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2")
PROGRAMS = ("infer", "train")
DTYPES = ("bfloat16", "float32")


def plugin_folder() -> Path:
    """Where the compilers lie.

    Raises:
        SystemExit: if they aren't there, with the command that puts them there.
    """
    folder = Path(os.environ.get("FLAXDET_AOT_PLUGINS") or ROOT / ".aot-plugins")
    if folder.is_dir() and any(folder.glob("libtpu*")) and any(folder.glob("jax_plugins*")):
        return folder
    listed = HERE / "aot_requirements" / f"jax-{version('jax')}.txt"
    if not listed.exists():
        known = ", ".join(sorted(path.stem for path in listed.parent.glob("*.txt")))
        sys.exit(
            f"there is no list of compilers for jax {version('jax')} (known: {known}): add {listed.relative_to(ROOT)} "
            "with jax-cuda12-plugin and jax-cuda12-pjrt of the same version, and a libtpu of its time"
        )
    shown = [path.relative_to(ROOT) if path.is_relative_to(ROOT) else path for path in (folder, listed)]
    sys.exit(
        f"the compilers are not there; install them with\n  pip install --no-deps --target {shown[0]} -r {shown[1]}"
    )


def compile_alone(asked: dict[str, Any], folder: Path, plugins: Path) -> dict[str, Any]:
    """Compiles in a process of its own.

    Args:
        asked: {"device", "model", "program", "dtype", "batch", "size", "masked", "depth"}.
        folder: for what the compiler writes.
        plugins: where the compilers lie.

    Returns:
        The report (``describe``), or {"error": ...}.
    """
    device = DEVICES[asked["device"]]
    dump = folder / "dump"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    environment |= {
        **device.environment,
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "PYTHONPATH": os.pathsep.join([str(plugins), str(ROOT)]),
    }
    if device.platform == "cuda":
        environment["XLA_FLAGS"] = f"--xla_dump_to={dump} --xla_dump_hlo_module_re=.*aot_program.*"
    command = [sys.executable, HERE / "aot_compile.py", json.dumps(asked), folder]
    done = subprocess.run([*map(str, command)], env=environment, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        (folder / "stderr.txt").write_text(done.stderr)
        lines = [line for line in done.stderr.splitlines() if "Error" in line] or done.stderr.splitlines()
        return {"error": (lines or [f"exit status {done.returncode}"])[-1][:300]}
    facts = json.loads((folder / "facts.json").read_text())
    launches: Counter[str] = Counter()
    outside: int | None = None
    for path in dump.glob("*thunk_sequence.txt"):
        launches, outside = read_thunks(path.read_text())
        facts["memory"]["generated_code"] = sum(ptx.stat().st_size for ptx in dump.glob("*.ptx"))
    program = compiled_hlo.read((folder / "program.hlo").read_text(), launches)
    return describe(device, asked, facts, program, outside)


def read_thunks(text: str) -> tuple[Counter[str], int]:
    """What XLA:GPU launches.

    Args:
        text: its thunk_sequence.txt: a line a launch, those within a loop indented.

    Returns:
        Launches by instruction, whose numbered parts count to it, and how many there are outside loops.
    """
    launches: Counter[str] = Counter()
    outside = 0
    for line in text.splitlines():
        words = line.split("]", 1)
        kind = line.split(":", 1)[1].split()[0] if ":" in line and line.split(":", 1)[1].split() else ""
        if not kind.startswith("k") or kind == "kWhile":
            continue
        outside += not line.startswith(" ")
        if kind == "kCustomKernel" and len(words) == 2:
            launches[words[1].split()[0].split("__")[0]] += 1
    return launches, outside


def describe(
    device: Device, asked: dict[str, Any], facts: dict[str, Any], program: compiled_hlo.Program, outside: int | None
) -> dict[str, Any]:
    """The report of a compiled program.

    Args:
        device: compiled for.
        asked: as in ``compile_alone``.
        facts: of ``aot_compile.py``.
        program: taken apart.
        outside: launches outside loops, where the compiler lists them.

    Returns:
        A dict for the JSON.
    """
    flop = facts["costs"].get("flops") or sum(k.flop * k.turns for k in program.kernels)
    moved = facts["costs"].get("bytes accessed") or sum(k.bytes * k.turns for k in program.kernels)
    if "bytes accessed" in facts["costs"]:
        arithmetic = flop / device.rates["bf16" if asked["dtype"] == "bfloat16" else "f32"]
        traffic = moved / device.bandwidth
        roofline = max(arithmetic, traffic)
    else:
        arithmetic = traffic = roofline = 0.0
        for kernel in program.kernels:
            computes = kernel.flop / device.rates.get(kernel.dtype, device.rates["f32"])
            moves = kernel.bytes / device.bandwidth
            arithmetic += computes * kernel.turns
            traffic += moves * kernel.turns
            roofline += (max(computes, moves) + device.launch * kernel.passes) * kernel.turns
    kinds = Counter[str]()
    for kernel in program.kernels:
        kinds[kernel.kind] += kernel.passes
    in_entry = sum(k.passes for k in program.kernels) - sum(x.kernels for x in program.loops)
    memory = facts["memory"]
    held = memory["argument"] + memory["output"] - memory["alias"] + memory["temp"]
    loops = [{"path": tail(x.path), "turns": x.turns, "kernels": x.kernels, "depth": x.depth} for x in program.loops]
    return {
        **asked,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": facts["versions"],
        "compile_seconds": facts["compile_seconds"],
        "gflop": round(flop / 1e9, 1),
        "gflop_an_image": round(flop / 1e9 / asked["batch"], 1),
        "traffic_gb": round(moved / 1e9, 2),
        "arguments_mb": round(memory["argument"] / 1e6, 1),
        "temporaries_mb": round(memory["temp"] / 1e6, 1),
        "code_mb": round(memory["generated_code"] / 1e6, 2),
        "share_of_memory": round(held / device.memory, 3),
        "kernels": in_entry if outside is None else outside,
        "kernels_by_kind": dict(kinds.most_common()),
        "loops": loops,
        "sorts": [{**x, "path": tail(x["path"])} for x in program.sorts],
        "convolutions": dict(program.convolutions),
        "products": dict(program.products),
        "sums": dict(program.sums),
        "custom_calls": dict(program.custom_calls.most_common()),
        "callbacks": program.callbacks,
        "collectives": exchanged(program),
        "arithmetic_ms": round(arithmetic * 1e3, 2),
        "traffic_ms": round(traffic * 1e3, 2),
        "roofline_ms": round(roofline * 1e3, 2),
    }


def exchanged(program: compiled_hlo.Program) -> list[dict[str, Any]]:
    """{"kind", "count", "mb", "path"} of the exchanges between devices, by kind and place, the largest first."""
    sizes: dict[tuple[str, str], list[float]] = {}
    for one in program.collectives:
        sizes.setdefault((one["kind"], tail(one["path"])), []).append(one["bytes"])
    found = [
        {"kind": kind, "count": len(group), "mb": round(sum(group) / 1e6, 3), "path": path}
        for (kind, path), group in sizes.items()
    ]
    return sorted(found, key=lambda one: -one["mb"])


def tail(path: str) -> str:
    """The end of jax's name of an operation, which says where in the model it is."""
    return path[-80:]


@functools.cache  # --json changes a file of the checkout, which is then "dirty"
def commit() -> str:
    """Of the code that was compiled; "unknown" outside a checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=9", "--exclude", "*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def key_of(report: dict[str, Any]) -> str:
    """Under which a program stands in the JSON."""
    rows, columns = report["size"]
    parts = [report[name] for name in ("device", "model", "program", "dtype")]
    extra = ["masked"] * report["masked"] + [f"depth {report['depth']}"] * (report["depth"] != 50)
    extra += [f"{report['devices']} devices"] * (report.get("devices", 1) != 1)
    return " ".join([*parts, f"{report['batch']}x{rows}x{columns}", *extra])


def show(report: dict[str, Any], former: dict[str, Any] | None) -> None:
    """Prints a report; figures that the JSON held before stand in brackets."""

    def line(title: str, name: str, unit: str) -> None:
        was = f"  [{former[name]} {unit}, {former['commit']}]" if former and former.get(name) != report[name] else ""
        print(f"  {title:<24}{report[name]:>12} {unit}{was}")

    line("roofline", "roofline_ms", "ms")
    line("  arithmetic alone", "arithmetic_ms", "ms")
    line("  traffic alone", "traffic_ms", "ms")
    line("arithmetic", "gflop", "GFLOP")
    line("  an image", "gflop_an_image", "GFLOP")
    line("traffic", "traffic_gb", "GB")
    line("temporaries", "temporaries_mb", "MB")
    line("arguments", "arguments_mb", "MB")
    line("code", "code_mb", "MB")
    line("kernels outside loops", "kernels", "")
    print(
        "  kernels by kind         "
        + ", ".join(f"{kind} {n}" for kind, n in list(report["kernels_by_kind"].items())[:8])
    )
    for name in ("convolutions", "products", "sums"):
        print(f"  {name:<24}" + ", ".join(f"{dtype} {n}" for dtype, n in report[name].items()))
    for loop in report["loops"]:
        turns = "unknown" if loop["turns"] is None else loop["turns"]
        print(f"  {'  ' * loop['depth']}loop of {turns} turns, {loop['kernels']} kernels a turn: {loop['path']}")
    for sort in sorted(report["sorts"], key=lambda x: -x["length"] * x["rows"])[:8]:
        print(
            f"  sort of {sort['rows']} x {sort['length']} {sort['dtype']}, {sort['launches']} launches: {sort['path']}"
        )
    for one in report["collectives"]:
        print(f"  {one['kind']} x {one['count']}, {one['mb']} MB: {one['path']}")
    print(f"  callbacks               {', '.join(report['callbacks']) or 'none'}", flush=True)


def merge(path: Path, key: str, report: dict[str, Any]) -> None:
    """Writes a report into the JSON, which is whole at any moment."""
    reports = json.loads(path.read_text()) if path.exists() else {}
    reports[key] = report
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(dict(sorted(reports.items())), indent=1) + "\n")
    beside.replace(path)


def size_of(text: str) -> tuple[int, int]:
    """(rows, columns) of "800x1088"."""
    rows, _, columns = text.partition("x")
    if not (rows.isdigit() and columns.isdigit()):
        raise argparse.ArgumentTypeError(f"expected ROWSxCOLUMNS, as 800x1088, got {text!r}")
    return int(rows), int(columns)


def main() -> None:
    """Compiles what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", choices=(*DEVICES, "all"))
    parser.add_argument("model", choices=(*MODELS, "all"))
    parser.add_argument("program", choices=(*PROGRAMS, "all"))
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--batch", type=int, help="images a call; default 16 on an H100, 8 on a TPU")
    parser.add_argument("--size", type=size_of, default=(800, 1088), help="rows x columns of the bucket")
    parser.add_argument("--masked", action="store_true", help="canvases may be smaller than the bucket")
    parser.add_argument("--depth", type=int, choices=(18, 34, 50), default=50, help="of the ResNet")
    parser.add_argument("--devices", type=int, default=1, help="chips that share the batch; up to 4 on a TPU")
    parser.add_argument("--json", type=Path, help="merge the figures into this file")
    parser.add_argument("--keep", type=Path, help="keep the compiled programs' text in this folder")
    options = parser.parse_args()

    plugins = plugin_folder()
    chosen = lambda value, values: values if value == "all" else (value,)  # noqa: E731
    failed = []
    for device in chosen(options.device, tuple(DEVICES)):
        for model in chosen(options.model, MODELS):
            for program in chosen(options.program, PROGRAMS):
                asked = {"device": device, "model": model, "program": program, "dtype": options.dtype}
                asked |= {"batch": options.batch or DEVICES[device].batch, "size": list(options.size)}
                asked |= {"masked": options.masked, "depth": options.depth, "devices": options.devices}
                key = key_of(asked)
                print(f"== {key}: compiling (from half a minute for an H100 to several for a TPU)", flush=True)
                with tempfile.TemporaryDirectory(prefix="flaxdet-aot-") as temporary:
                    folder = options.keep / key.replace(" ", "-") if options.keep else Path(temporary)
                    folder.mkdir(parents=True, exist_ok=True)
                    start = time.perf_counter()
                    report = compile_alone(asked, folder.resolve(), plugins.resolve())
                if "error" in report:
                    failed.append(key)
                    print(f"  failed: {report['error']}", flush=True)
                    continue
                print(f"  compiled in {time.perf_counter() - start:.0f} s by {report['versions']}")
                known = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
                show(report, known.get(key))
                if options.json:
                    merge(options.json, key, report)
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
