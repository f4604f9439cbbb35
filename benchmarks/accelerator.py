"""Checks and measures both detectors on an accelerator, in one command for a machine that is available for minutes.

    python benchmarks/accelerator.py --out DIR [--seconds 240] [--small [--model MODEL]]

There are two passes of stages (accelerator_plan.py). The first measures one case per model, in bfloat16 at batch 16:

1. versions, device, seconds to import; upper limits of the device: a copy, and a matrix product in bfloat16, TF32 and
   float32
2. compilation of flaxdet's inference programs, while the host makes weights
3. correctness on the device, in concurrent stages, since none measures time: every layer and detection against
   torchvision's in float32, detections in bfloat16 against float32, and each parameter's gradient in bfloat16 against
   float32, with the same figures for torch's autocast
4. inference at 800x1088, from pixels to detections, on the device alone, and the network alone: flaxdet, torchvision
   eager, and torchvision under AMP with channels_last (``cudnn.benchmark`` on)
5. single operators, timed and compared with torchvision's: top-k, NMS, RoIAlign, norms, resize
6. a training step at 800x1088, compiled in advance, of the contenders of 4
7. during 4 and 6: peak memory of flaxdet and torchvision, and the kernels of one call by name and time

The second pass first repeats the stages that were killed in the first. Then it measures other cases, the most important
first, until the time is up: other batch sizes, AMP without channels_last, torch.compile, 320x448, float32 and TF32. On
an H100 with 16 cores stages of the first pass took more than 17 s for 1, 30 to 45 s for 2, 58 s for 3, 70 s for 4 and
more than 65 s for 5: 240 seconds should reach a part of 5. For 6, XLA had not compiled the steps of both models after
112 s, concurrently with inference, and torch takes 27 s per model and contender to choose kernels: 500 seconds may
reach flaxdet's steps.

Each stage is a process with a time limit. The limits sum to --seconds, and time that a stage leaves goes to later
stages. If a stage fails, or is killed at the limit, the report says why, and keeps the stage's figures until then.
Programs are compiled into DIR/cache, with separate folders for concurrent stages. DIR/accelerator.json has all figures
and is rewritten after each stage, DIR/profile.txt has the kernels, DIR/logs the output of each stage. The table is
printed last.

It needs jax, flaxdet's requirements, torch, torchvision, safetensors and matplotlib (for a photo), and no network.
--small runs every stage at toy size, also on a CPU, only to test the benchmark itself.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
for folder in (HERE, ROOT):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from accelerator_common import Notes  # noqa: E402
from accelerator_plan import (  # noqa: E402
    MODELS,
    TINY,
    Group,
    Stage,
    again,
    first_pass,
    limit,
    second_limit,
    second_pass,
    small_plan,
)
from accelerator_table import profile_text, table  # noqa: E402
from photos import describe_error  # noqa: E402


class Report:
    """What all stages found, as JSON and as text.

    Attributes:
        out: folder for everything that is written.
        about: the run as a whole.
        stages: one dict a stage: name, status ("done", "failed", "killed" or "skipped"), reason, limit, seconds, found.
    """

    def __init__(self, out: Path):
        self.out = out
        self.about: dict[str, Any] = {}
        self.stages: list[dict[str, Any]] = []

    def write(self) -> None:
        """Rewrites both files; whoever reads them sees either the old or the new."""
        content = {"date": time.strftime("%Y-%m-%d %H:%M:%S"), **self.about, "stages": self.stages}
        for name, text in (
            ("accelerator.json", json.dumps(content, indent=1) + "\n"),
            ("profile.txt", profile_text(self.stages)),
        ):
            part = self.out / f".{name}.part"
            part.write_text(text)
            part.replace(self.out / name)


class Running:
    """A stage's process."""

    def __init__(self, stage: Stage, out: Path, small: bool):
        self.stage = stage
        name = "".join(c if c.isalnum() else "-" for c in stage.name)
        self.found, self.log = out / "stages" / f"{name}.jsonl", out / "logs" / f"{name}.txt"
        for path in (self.found, self.log):
            path.parent.mkdir(exist_ok=True)
            path.unlink(missing_ok=True)
        options = {**stage.options, "out": str(out), "small": small}
        command = [sys.executable, __file__, "--stage", stage.function, json.dumps(options), str(self.found)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, env=_environment(stage, out), stdout=log, stderr=subprocess.STDOUT, process_group=0
            )
        self.start, self.seconds = time.monotonic(), 0.0

    def ended(self) -> bool:
        """Whether it has ended by itself."""
        if self.process.poll() is None:
            return False
        self.seconds = self.seconds or time.monotonic() - self.start
        return True

    def kill(self) -> None:
        """Ends it and what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.seconds = time.monotonic() - self.start

    def result(self, killed: bool, seconds: float) -> dict[str, Any]:
        """What it found, and how it ended."""
        found = _read(self.found)
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        result = {"name": self.stage.name, "options": self.stage.options, "limit": seconds, "seconds": self.seconds}
        said = [entry["text"] for entry in found if entry["kind"] == "said"]
        if killed:
            result |= {"status": "killed", "reason": f"over its limit of {seconds:.0f} s"}
        elif self.process.returncode:
            last = describe_error(lines[-1]) if lines else ""
            result |= {"status": "failed", "reason": f"exit status {self.process.returncode}: {last}"}
        else:
            result |= {"status": "done", "reason": said[-1] if said else ""}
        return {**result, "found": [entry for entry in found if entry["kind"] != "said"]}


def _read(path: Path) -> list[dict[str, Any]]:
    """Its lines; a last one that a killed process wrote in part is left out."""
    entries = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return entries


# What XLA takes where nothing is tried out on the device. Triton's products then have tiles that may not fit.
UNTUNED = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"


def _environment(stage: Stage, out: Path) -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {
        "JAX_COMPILATION_CACHE_DIR": str(out / "cache" / ("beside" if stage.beside else "alone")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    if stage.beside:
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {UNTUNED}".strip()
    return {**env, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""} if stage.host else env


def run_group(group: Group, report: Report, seconds: float, *, small: bool, clock: float) -> None:
    """Runs the stages of a group at the same time, kills what is left at the limit, and notes what they found."""
    names = " | ".join(stage.name for stage in group)
    print(f"[{time.monotonic() - clock:5.0f} s] {names} (limit {seconds:.0f} s)", flush=True)
    deadline = time.monotonic() + seconds
    waiting: list[Running] = []
    try:
        for stage in group:
            waiting.append(Running(stage, report.out, small))
        while waiting:
            time.sleep(0.05)
            over = time.monotonic() >= deadline
            for one in [one for one in waiting if one.ended() or over]:
                killed = not one.ended()
                if killed:
                    one.kill()
                waiting.remove(one)
                result = one.result(killed, seconds)
                report.stages.append(result)
                report.write()
                failures = sum(entry["kind"] == "failure" for entry in result["found"])
                print(
                    f"[{time.monotonic() - clock:5.0f} s]   {result['status']} in {result['seconds']:.1f} s: "
                    f"{one.stage.name}: {result['reason']}" + (f" ({failures} failures)" if failures else ""),
                    flush=True,
                )
    except BaseException:  # the run itself is cut short
        for one in waiting:
            one.kill()
            report.stages.append({**one.result(True, seconds), "reason": "the run was cut short"})
        report.write()
        raise


def run(first: list[Group], second: list[Group], report: Report, seconds: float, *, small: bool = False) -> None:
    """Runs both passes.

    Args:
        first: groups of the first pass, among which the seconds are dealt out.
        second: groups of the second pass, which run one by one while time is left.
        report: gets what they find.
        seconds: for all of it.
        small: toy sizes.
    """
    (report.out / "cache").mkdir(parents=True, exist_ok=True)
    report.about |= {"seconds": seconds, "small": small}
    clock = time.monotonic()

    def left() -> float:
        return seconds - (time.monotonic() - clock)

    def begin(group: Group, granted: float) -> None:
        if granted:
            run_group(group, report, granted, small=small, clock=clock)
        else:
            skipped = {"status": "skipped", "reason": "the time was up", "limit": 0, "seconds": 0, "found": []}
            report.stages += [{"name": one.name, "options": one.options, **skipped} for one in group]

    for i, group in enumerate(first):
        begin(group, limit(group, first[i + 1 :], max(left(), 0)))
        if _no_accelerator(report) and not small:
            break
    else:
        killed = {one["name"] for one in report.stages if one["status"] == "killed"}
        tries = [group for group in (again(group, killed) for group in first) if group]
        for group in tries + second:
            begin(group, second_limit(group, left()))
    report.about["took"] = time.monotonic() - clock
    report.write()


def _no_accelerator(report: Report) -> bool:
    return any(
        entry["kind"] == "imported" and entry["platform"] == "cpu" for one in report.stages for entry in one["found"]
    )


def _stage(function: str, options: str, found: str) -> None:
    """In a stage's process."""
    module, _, name = function.partition(":")
    notes = Notes(Path(found))
    said = getattr(importlib.import_module(module), name)(json.loads(options), notes)
    notes.add("said", text=str(said))


def main() -> int:
    """Runs the command; exit status 1 if a stage did not end well, 2 if there is no accelerator."""
    if sys.argv[1:2] == ["--stage"]:
        _stage(*sys.argv[2:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON, the profile, logs and cache")
    parser.add_argument("--seconds", type=float, default=240, help="for everything, up to 500; 240 by default")
    parser.add_argument("--small", action="store_true", help="toy sizes, one model; on a CPU too")
    parser.add_argument("--model", choices=[*MODELS, TINY], default=MODELS[0], help="of a small run")
    options = parser.parse_args()
    most = 3600 if options.small else 500  # a busy CPU may take long over toys
    if not 1 <= options.seconds <= most:
        parser.error(f"--seconds should be from 1 to {most}, found {options.seconds:g}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that stages are ended
    passes = small_plan(options.model) if options.small else (first_pass(MODELS, 16), second_pass())
    report = Report(options.out.resolve())
    cut_short = False
    try:
        run(*passes, report, options.seconds, small=options.small)
    except (KeyboardInterrupt, SystemExit):
        cut_short = True
    if _no_accelerator(report) and not options.small:
        parser.error("jax found no accelerator: on a CPU, --small shows that the instrument works")
    print(f"\n{table(report.stages)}", flush=True)
    return int(cut_short or any(one["status"] in ("failed", "killed") for one in report.stages))


if __name__ == "__main__":
    sys.exit(main())
