"""benchmarks/accelerator.py: time dealt out by hand-worked values, stages that fail, the whole command at toy size."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.tolerances import TOY_GRADIENTS_LARGEST, TOY_GRADIENTS_MEDIAN, TOY_PARTS

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
# What the machine that it is written for does not have.
ABSENT = ("tyro", "grain", "pycocotools", "tensorboardX", "orbax", "sklearn", "supervision", "fiftyone")
WITHOUT = f"""
from importlib.machinery import PathFinder

found = PathFinder.find_spec

def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in {ABSENT} else found(name, path, target)

PathFinder.find_spec = staticmethod(find_spec)
"""
FAKES = """
import subprocess, time

def works(options, notes):
    notes.add("rate", what="pixels", images_per_second=options["rate"])
    return "all well"

def fails(options, notes):
    notes.add("found_before", value=1)
    raise ValueError("no such luck")

def hangs(options, notes):
    notes.add("found_before", value=2)
    child = subprocess.Popen(["sleep", "600"])
    notes.add("child", pid=child.pid)
    time.sleep(600)

def no_accelerator(options, notes):
    notes.add("imported", platform="cpu")
    raise RuntimeError("there is none")

def half_fails(options, notes):
    with notes.attempt(part="the hard one"):
        raise KeyError("gone")
    return "the rest"
"""


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """The modules of the driver, which import neither jax nor torch; stages find the fake ones above."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    (tmp_path / "fakes.py").write_text(FAKES)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    names = ("accelerator", "accelerator_plan", "accelerator_table", "accelerator_common")
    return SimpleNamespace(**{name.removeprefix("accelerator_"): importlib.import_module(name) for name in names})


def fake(driver, name, weight=1.0, **options):
    return (driver.plan.Stage(name, f"fakes:{name}", weight, options),)


def test_limits_sum_to_the_seconds_there_are(driver):
    groups = [fake(driver, "works", weight) for weight in (30, 10, 20)]
    left, limits = 120.0, []
    for i, group in enumerate(groups):
        limits.append(driver.plan.limit(group, groups[i + 1 :], left))
        left -= limits[-1]  # each takes all of its own
    assert limits == [60, 20, 40]
    assert sum(limits) == 120


def test_what_a_stage_leaves_goes_to_those_after_it(driver):
    groups = [fake(driver, "works", weight) for weight in (30, 10, 20)]
    # the first took 30 of its 60 seconds, so that 90 are left for weights of 10 and 20
    assert driver.plan.limit(groups[1], groups[2:], 90.0) == 30
    assert driver.plan.limit(groups[2], [], 60.0) == 60
    # stages that run together share a limit, the one of the longest
    assert driver.plan.limit((*groups[0], *groups[1]), [groups[2]], 100.0) == 60


def test_where_time_is_short_the_last_stages_go_short_and_not_each(driver):
    groups = [fake(driver, "works", weight) for weight in (30, 100, 20)]
    left, limits = 75.0, []
    for i, group in enumerate(groups):
        limits.append(driver.plan.limit(group, groups[i + 1 :], left))
        left -= limits[-1]
    assert limits == [30, 45, 0]  # by weight it would be 15, 50 and 10, each of them too few
    assert driver.plan.limit(groups[2], [], 11.0) == 0
    assert driver.plan.limit(fake(driver, "works", 5)[0:1], [], 8.0) == 8  # all that is left, of a short one


def test_the_second_pass_takes_what_is_left(driver):
    (stage,) = fake(driver, "works", 30)
    assert driver.plan.second_limit((stage,), 100.0) == 60
    assert driver.plan.second_limit((stage,), 40.0) == 40
    assert driver.plan.second_limit((stage,), 5.0) == 0


def test_the_plans_cover_both_models_and_every_function_exists(driver):
    groups = [*driver.plan.first_pass(driver.plan.MODELS, 16), *driver.plan.second_pass()]
    stages = [stage for group in groups for stage in group]
    assert len({stage.name for stage in stages}) == len(stages)  # they name files
    for stage in stages:
        module, _, function = stage.function.partition(":")
        assert f"\ndef {function}(" in (BENCHMARKS / f"{module}.py").read_text()
    first, _ = driver.plan.small_plan(driver.plan.MODELS[0])
    small = {stage.function for group in first for stage in group}
    assert small == {stage.function for stage in stages}


@pytest.mark.ci  # a benchmark's driver, in several processes
def test_stages_that_fail_or_hang_are_reported_and_the_rest_goes_on(driver, tmp_path, capsys):
    report = driver.accelerator.Report(tmp_path)
    first = [
        fake(driver, "fails", 30),
        fake(driver, "hangs", 3),
        (*fake(driver, "half_fails", 30), *fake(driver, "works", 30, rate=7.5)),
    ]
    driver.accelerator.run(first, [fake(driver, "works", 1000, rate=8.5)], report, 60)
    stages = {one["name"]: one for one in report.stages}
    assert json.loads((tmp_path / "accelerator.json").read_text())["stages"] == report.stages

    assert stages["fails"]["status"] == "failed"
    assert stages["fails"]["reason"] == "exit status 1: ValueError: no such luck"
    assert stages["fails"]["found"] == [{"kind": "found_before", "value": 1}]

    # and once more in the second pass, with what is left
    assert stages["hangs, again"]["status"] == "killed"
    assert stages["hangs"]["status"] == "killed"
    assert stages["hangs"]["reason"].startswith("over its limit of ")
    assert abs(stages["hangs"]["seconds"] - stages["hangs"]["limit"]) < 20  # it would sleep 600 s
    assert stages["hangs"]["found"][0] == {"kind": "found_before", "value": 2}
    assert not runs(stages["hangs"]["found"][1]["pid"])

    assert stages["half_fails"]["status"] == "done"
    failure = {"kind": "failure", "part": "the hard one", "error": "KeyError: 'gone'"}
    assert stages["half_fails"]["found"] == [failure]

    works = [one for one in report.stages if one["name"] == "works"]
    assert [one["found"][0]["images_per_second"] for one in works] == [7.5, 8.5]
    printed = capsys.readouterr().out
    assert "failed in" in printed
    assert "exit status 1: ValueError: no such luck" in printed
    text = driver.table.table([one for one in report.stages if one["name"] != "works"])
    assert "killed: hangs: over its limit of" in text
    assert "failure: the hard one: KeyError: 'gone'" in text


def runs(pid):
    """Whether a process is there and not a zombie."""
    status = Path(f"/proc/{pid}/status")
    for _ in range(50):
        if not status.exists() or "State:\tZ" in status.read_text():
            return False
        time.sleep(0.1)
    return True


def test_a_run_whose_time_is_up_begins_nothing_more(driver, tmp_path):
    report = driver.accelerator.Report(tmp_path)
    driver.accelerator.run([fake(driver, "works", 1, rate=1)], [fake(driver, "hangs", 1)], report, 8)
    assert [(one["name"], one["status"]) for one in report.stages] == [("works", "done"), ("hangs", "skipped")]


def test_a_run_that_is_cut_short_keeps_what_it_found(driver, tmp_path, monkeypatch):
    report = driver.accelerator.Report(tmp_path)

    def interrupt(seconds):
        if (tmp_path / "stages" / "hangs.jsonl").exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(driver.accelerator.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        driver.accelerator.run([fake(driver, "hangs")], [], report, 60)
    assert [(one["status"], one["reason"]) for one in report.stages] == [("killed", "the run was cut short")]


def test_without_an_accelerator_the_first_stage_is_the_last(driver, tmp_path):
    report = driver.accelerator.Report(tmp_path)
    driver.accelerator.run([fake(driver, "no_accelerator"), fake(driver, "works", rate=1)], [], report, 60)
    assert [one["name"] for one in report.stages] == ["no_accelerator"]


def test_the_table_has_ratios_shares_and_agreement(driver):
    case = {"task": "inference", "model": "fcos_resnet50_fpn", "dtype": "bfloat16", "size": 800, "batch": 16}
    rate = {"kind": "rate", "what": "pixels", **case}
    found = [
        {"kind": "ceiling", "what": "bfloat16", "library": "jax", "value": 500.0, "unit": "TFLOP/s"},
        {"kind": "compiled", "contender": "flaxdet", "seconds": 20.0, "gflop": 5000.0, **case},
        {**rate, "contender": "flaxdet", "images_per_second": 600.0, "median": 0.025},
        {**rate, "contender": "eager", "images_per_second": 200.0, "median": 0.08},
        {**rate, "contender": "AMP, channels_last", "images_per_second": 400.0, "median": 0.04},
        {"kind": "memory", "contender": "flaxdet", "mib": 2048.0, **case},
        {"kind": "part", "part": "a part", "side": "flaxdet", "median": 0.002},
        {"kind": "part", "part": "a part", "side": "torchvision", "median": 0.005},
        {"kind": "agreement", "part": "a part", "relative_difference": 1e-6},
    ]
    text = driver.table.table([{"name": "one", "status": "done", "reason": "", "found": found}])
    (line,) = (line for line in text.splitlines() if " pixels " in line)
    # 600 / 400, and 5 TFLOP in .025 s of 500 TFLOP/s
    assert line.split()[4:] == ["pixels", "600", "200", "-", "400", "-", "1.50", "40%", "flaxdet", "2.0"]
    (line,) = (line for line in text.splitlines() if "a part" in line)
    assert line.split()[2:] == ["2.000", "5.000", "2.50", "to", "1.0e-06"]


def test_the_table_stays_short(driver):
    failure = {"kind": "failure", "part": "x" * 300, "error": "y" * 300}
    part = {"kind": "part", "side": "flaxdet", "median": 0.002}
    found = [{**part, "part": f"part {i}"} for i in range(400)] + [failure] * 400
    text = driver.table.table([{"name": "one", "status": "done", "reason": "", "found": found}])
    assert len(text) < 12_000
    assert "and 384 more, in the JSON" in text


@pytest.mark.release
def test_the_whole_command_at_toy_size(tmp_path):
    pytest.importorskip("torch")
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        # CPUs then have no program in pieces, which the cache can't keep
        "JAX_RAISE_PERSISTENT_CACHE_ERRORS": "true",
        # what is compiled runs once or twice, so that quick code is not worth its while
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
        + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    }
    command = [
        sys.executable,
        BENCHMARKS / "accelerator.py",
        "--out",
        tmp_path / "out",
        "--small",
        "--model",
        "tiny_fcos",
    ]
    command += ["--seconds", "1500"]
    done = subprocess.run([*map(str, command)], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    report = json.loads((tmp_path / "out" / "accelerator.json").read_text())
    assert {one["status"] for one in report["stages"]} == {"done"}
    found = [entry for one in report["stages"] for entry in one["found"]]
    by_kind = {kind: [entry for entry in found if entry["kind"] == kind] for kind in {e["kind"] for e in found}}

    assert not by_kind.get("failure", []), by_kind["failure"]
    (machine,) = by_kind["machine"]
    assert machine["device_kind"] == "cpu"
    assert {entry["what"] for entry in by_kind["ceiling"]} == {"copy", "bfloat16", "tf32", "float32"}
    assert all(entry["value"] > 0 for entry in by_kind["ceiling"])
    assert all(entry["same"] and sum(m["count"] for m in entry["matches"]) > 10 for entry in by_kind["verify"])
    assert {entry["side"] for entry in by_kind["bfloat16"]} == {"flaxdet", "torchvision AMP"}

    gradients = {(entry["side"], entry["of"]): entry for entry in by_kind["gradients"]}
    assert gradients["flaxdet", "float32"]["median"] < TOY_GRADIENTS_MEDIAN
    assert gradients["flaxdet", "float32"]["largest"] < TOY_GRADIENTS_LARGEST
    assert 0 < gradients["torchvision", "bfloat16"]["median"] < 1
    assert len(gradients["flaxdet", "bfloat16"]["worst"]) == 10
    assert all(entry["parameters"] > 60 for entry in gradients.values())

    rates = {(entry["task"], entry["dtype"], entry["contender"], entry["what"]) for entry in by_kind["rate"]}
    for contender in ("flaxdet", "eager", "AMP, channels_last"):
        assert {("inference", "bfloat16", contender, what) for what in ("pixels", "device", "network")} <= rates
        assert ("training", "bfloat16", contender, "step") in rates
    assert all(entry["images_per_second"] > 0 and math.isfinite(entry.get("loss", 0)) for entry in by_kind["rate"])
    assert len(by_kind["memory"]) == len([entry for entry in by_kind["rate"] if entry["what"] in ("pixels", "step")])
    counted = [entry["gflop"] for kind in ("compiled", "gflop") for entry in by_kind[kind] if entry.get("gflop")]
    assert len(counted) > 2
    assert {entry["side"] for entry in by_kind["part"]} == {"flaxdet", "torchvision"}
    agreements = [entry for entry in by_kind["agreement"] if {"same", "relative_difference"} & set(entry)]
    assert len(agreements) == 10
    assert all(entry.get("same", True) and entry.get("relative_difference", 0) < TOY_PARTS for entry in agreements)
    assert all(entry["launches"] > 20 and entry["rows"] for entry in by_kind["kernels"])
    assert "AMP, channels_last, inference, tiny_fcos" in (tmp_path / "out" / "profile.txt").read_text()

    *_, table = done.stdout.partition("\ncpu (cpu), ")
    assert len(table) < 12_000
    for title in ("CORRECTNESS", "SPEED", "PARTS", "STAGES"):
        assert title in table


@pytest.mark.slow
def test_on_a_cpu_the_whole_run_is_refused(tmp_path):
    pytest.importorskip("torch")
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, BENCHMARKS / "accelerator.py", "--out", tmp_path, "--seconds", "100"]
    done = subprocess.run([*map(str, command)], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "jax found no accelerator" in done.stderr
