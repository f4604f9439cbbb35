"""The files of a run's model: which model they are of, with which figures, and that they belong together."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

pytest.importorskip("pycocotools", reason="an extra: flaxdet[train]")

import flaxdet
from flaxdet.cli import train_report
from flaxdet.cli.options import model_file
from flaxdet.cli.train_report import Report, log_row
from flaxdet.evaluation import evaluate as module
from flaxdet.evaluation.coco_metrics import ClassResult, CocoResult
from flaxdet.train import Checkpoints
from flaxdet.train.validation import ValidationLosses
from flaxdet.zoo._tiny import DEMO_WEIGHTS
from tests.train.states import make_state

NAMES = ["__background__", "Platelets", "RBC", "WBC"]
FIGURES = [field.name for field in dataclasses.fields(CocoResult) if field.name.startswith(("ap", "ar"))]


def result(ap: float | None) -> CocoResult:
    classes = (ClassResult("RBC", 2, 3, ap, ap, ap), ClassResult("WBC", 3, 0, None, None, None))
    return CocoResult(**dict.fromkeys(FIGURES, ap), images=2, boxes=3, detections=4, per_class=classes)


class Run:
    """A run whose model of step i has i in a bias, and whose evaluations give what they are told."""

    def __init__(self, out: Path, monkeypatch: pytest.MonkeyPatch):
        self.out = out
        self.model, self.variables = flaxdet.load(DEMO_WEIGHTS)
        self.checkpoints = Checkpoints(out / "checkpoints")
        options: Any = SimpleNamespace(out=out, batch_size=1, progress=False)
        data: Any = SimpleNamespace(categories=NAMES)
        monkeypatch.setattr(ValidationLosses, "__init__", lambda *_: None)
        monkeypatch.setattr(ValidationLosses, "__call__", lambda *_, **__: {"loss": 0.5})
        monkeypatch.setattr(Report, "draw", lambda *_: None)
        self.monkeypatch = monkeypatch
        self.report = Report(options, self.model, data, data, self.checkpoints)

    def save(self, step: int) -> dict[str, Any]:
        self.checkpoints.save(make_state(step), wait=True)
        self.report.after_save(self.at(step), step)
        return self.files()

    def evaluate(self, step: int, ap: float | None) -> dict[str, Any]:
        self.save(step)
        self.monkeypatch.setattr(module, "evaluate", lambda *_, **__: result(ap))
        self.checkpoints.save(make_state(step), metrics=self.report.evaluate(self.at(step), step))
        return self.files()

    def at(self, step: int) -> dict[str, Any]:
        changed = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf * 0 + step if "cls_logits" in str(path) else leaf, self.variables["params"]
        )
        return {**self.variables, "params": changed}

    def files(self) -> dict[str, Any]:
        """The content of metrics.json, which has to name the step of both models."""
        metrics = json.loads((self.out / "metrics.json").read_text())
        for name in ("model.safetensors", "model.pth"):
            bias = flaxdet.convert.read(self.out / name)["head.classification_head.cls_logits.bias"]
            np.testing.assert_array_equal(bias, np.full_like(bias, metrics["step"]))
        assert flaxdet.load_categories(self.out / "model.safetensors") == NAMES
        return metrics


@pytest.fixture
def of_run(tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch)
    yield run
    run.checkpoints.close()


def test_the_last_until_there_is_a_best(of_run, capfd, monkeypatch):
    assert of_run.save(1) == {"step": 1}
    undefined = of_run.evaluate(2, None)
    assert (undefined["step"], undefined["ap"], undefined["losses"]) == (2, None, {"loss": 0.5})
    assert "step 2: AP -, AP50 -, AP75 -, validation loss 0.5000" in capfd.readouterr().err
    monkeypatch.setattr(ValidationLosses, "__call__", lambda *_, **__: {"loss": math.nan})
    third = of_run.evaluate(3, 0.0)
    assert (third["step"], third["losses"]) == (3, {"loss": None})  # JSON knows no NaN
    assert "step 3: AP 0.0000, AP50 0.0000, AP75 0.0000, validation loss -" in capfd.readouterr().err
    assert of_run.save(4) == {"step": 4}
    best = of_run.evaluate(5, 0.25)
    assert (best["step"], best["ap"]) == (5, 0.25)
    assert best["per_class"] == [dataclasses.asdict(row) for row in result(0.25).per_class]
    assert of_run.save(6) == best
    assert of_run.evaluate(7, 0.2) == best
    assert of_run.evaluate(8, None) == best
    assert of_run.evaluate(9, 0.3)["step"] == 9


def test_the_log_has_all_figures():
    row = log_row(result(0.25), {"loss": 0.5, "bbox_regression": 0.1})
    expected = {"AP": 0.25, "AP50": 0.25, "AP75": 0.25, "AR100": 0.25, "AP/RBC": 0.25}
    assert {name: row[name] for name in expected} == expected
    assert math.isnan(row["AP/WBC"])
    assert {name: value for name, value in row.items() if "val" in name} == {
        "val/loss": 0.5, "val/bbox_regression": 0.1
    }  # fmt: skip


def test_a_full_disk_changes_nothing(of_run, monkeypatch):
    of_run.save(1)
    calls = []

    def full(_):
        calls.append(1)
        if len(calls) == 3:  # the last of the three files
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(train_report.os, "fsync", full)
    with pytest.raises(OSError, match=rf"{of_run.out}/metrics.json: cannot be written: No space left") as error:
        of_run.report.after_save(of_run.at(2), 2)
    assert ".model-" not in str(error.value)
    assert of_run.files() == {"step": 1}
    assert not [path for path in of_run.out.iterdir() if path.name.startswith(".")]


def test_leftovers_of_a_killed_run_are_removed(of_run, monkeypatch):
    of_run.save(1)
    for name in (".model-abc", ".mine"):
        (of_run.out / name).mkdir()
    for name in (".curves.png.0a1b2c3d.tmp", ".last.safetensors.00000000.tmp", ".env", "x.tmp"):
        (of_run.out / name).write_text("x")
    before = {path.name for path in of_run.out.iterdir()}
    Report(of_run.report.options, of_run.model, of_run.report.train, None, of_run.checkpoints)
    after = {path.name for path in of_run.out.iterdir()}
    assert before - after == {".model-abc", ".curves.png.0a1b2c3d.tmp", ".last.safetensors.00000000.tmp"}


def test_the_model_of_a_folder(tmp_path):
    file = tmp_path / "a.pth"
    assert model_file(str(file)) == str(file)
    with pytest.raises(ValueError, match=r"is a folder without model\.safetensors; expected a file"):
        model_file(str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="this run has no model yet"):
        model_file(str(tmp_path))
    for name in ("last.safetensors", "model.safetensors"):
        (tmp_path / name).write_text("")
        assert model_file(f"{tmp_path}/") == str(tmp_path / name)
