"""Logs of a run: complete after a kill, and after a resume as if nothing had happened."""

from __future__ import annotations

import errno
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from flaxdet.train.logs import JsonLinesWriter, TensorBoardWriter, Writer, read_log

ROWS = [
    (10, {"loss": 1.5, "learning_rate": 0.1}),
    (20, {"loss": 1 / 3, "learning_rate": 0.1}),
    (20, {"AP": 0.25}),
    (30, {"loss": math.nan, "grad_norm": math.inf}),
    (40, {"loss": 0.125}),
]


def write(path, rows, **options) -> None:
    writer: Writer = JsonLinesWriter(path, **options)
    for step, values in rows:
        writer.scalars(step, values)
    writer.close()


def test_what_is_written_is_read(tmp_path):
    write(tmp_path / "run" / "log.jsonl", ROWS)
    rows = read_log(tmp_path / "run" / "log.jsonl")
    assert rows[:3] == [{"step": step, **values} for step, values in ROWS[:3]]
    assert math.isnan(rows[3]["loss"])
    assert math.isnan(rows[3]["grad_norm"])
    for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # no NaN or Infinity, which are no JSON


def test_numbers_of_numpy_and_jax(tmp_path):
    write(tmp_path / "log", [(np.int64(3), {"a": np.float32(0.5), "b": np.asarray(2)})])
    assert read_log(tmp_path / "log") == [{"step": 3, "a": 0.5, "b": 2.0}]


def test_each_line_is_there_at_once(tmp_path):
    writer = JsonLinesWriter(tmp_path / "log")
    for i, (step, values) in enumerate(ROWS, 1):
        writer.scalars(step, values)
        assert len(read_log(tmp_path / "log")) == i
    writer.close()


def test_a_kill_loses_no_line(tmp_path):
    script = (
        "import os, signal, sys; from flaxdet.train.logs import JsonLinesWriter\n"
        "writer = JsonLinesWriter(sys.argv[1])\n"
        "for step in range(1, 4): writer.scalars(step, {'loss': 1.0})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "log"], timeout=120)
    assert [row["step"] for row in read_log(tmp_path / "log")] == [1, 2, 3]


@pytest.mark.parametrize("step", [0, 5, 10, 20, 25, 40, 100])
@pytest.mark.parametrize("cut", [False, True])
def test_a_resumed_log_equals_the_uninterrupted_one(tmp_path, step, cut):
    write(tmp_path / "whole", ROWS)
    write(tmp_path / "log", ROWS)
    if cut:
        with open(tmp_path / "log", "ab") as file:
            file.write(b'{"step": 45, "lo')
        assert len(read_log(tmp_path / "log")) == len(ROWS)
    write(tmp_path / "log", [row for row in ROWS if row[0] > step], resume_from=step)
    assert (tmp_path / "log").read_bytes() == (tmp_path / "whole").read_bytes()


def test_without_resume_an_old_log_is_replaced(tmp_path):
    write(tmp_path / "log", ROWS)
    write(tmp_path / "log", ROWS[:1])
    assert len(read_log(tmp_path / "log")) == 1


def test_resume_without_a_log_begins_one(tmp_path):
    write(tmp_path / "log", ROWS[3:], resume_from=20)
    assert [row["step"] for row in read_log(tmp_path / "log")] == [30, 40]


@pytest.mark.parametrize("line", ["[1, 2]", "{", '{"loss": 1}', '{"step": 1.5}', "text", ""])
def test_a_file_that_is_no_log(tmp_path, line):
    (tmp_path / "log").write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    before = (tmp_path / "log").read_text()
    with pytest.raises(ValueError, match=r'log, line 2: expected a JSON object with a whole "step"'):
        read_log(tmp_path / "log")
    with pytest.raises(ValueError, match="line 2"):
        JsonLinesWriter(tmp_path / "log", resume_from=1)
    assert (tmp_path / "log").read_text() == before


def test_a_failed_resume_leaves_the_old_log(tmp_path, monkeypatch):
    write(tmp_path / "log", ROWS)
    before = (tmp_path / "log").read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="log: cannot be written: No space left on device"):
        JsonLinesWriter(tmp_path / "log", resume_from=10)
    assert (tmp_path / "log").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /dev/full")
def test_a_full_disk_is_one_line(tmp_path):
    writer = JsonLinesWriter(tmp_path / "log")
    writer.close()
    writer._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    with pytest.raises(OSError, match=r"log: cannot be written: No space left on device$") as error:
        writer.scalars(1, {"loss": 1.0})
    assert error.value.errno == errno.ENOSPC
    writer.close()


def events(folder) -> list:
    """(tag, step, value) in the event files, and ("purge", step, None) where one says so."""
    from tensorboardX import proto

    found = []
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            event = proto.event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            if event.HasField("session_log"):
                found.append(("purge", event.step, None))
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return found


def test_tensorboard(tmp_path):
    writer: Writer = TensorBoardWriter(tmp_path / "tb")
    writer.scalars(10, {"loss": 1.5, "classification": 0.5, "loss_rpn_box_reg": 0.25, "learning_rate": 0.5})
    writer.scalars(20, {"AP": 0.25, "AR100": 0.5})
    writer.close()
    assert events(tmp_path / "tb") == [
        ("loss/loss", 10, 1.5),
        ("loss/classification", 10, 0.5),
        ("loss/loss_rpn_box_reg", 10, 0.25),
        ("training/learning_rate", 10, 0.5),
        ("evaluation/AP", 20, 0.25),
        ("evaluation/AR100", 20, 0.5),
    ]


def test_tensorboard_hides_what_a_resumed_run_does_again(tmp_path):
    writer = TensorBoardWriter(tmp_path, resume_from=20)
    writer.scalars(30, {"loss": 1.0})
    writer.close()
    assert events(tmp_path) == [("purge", 21, None), ("loss/loss", 30, 1.0)]


def test_tensorboard_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"pip install 'flaxdet\[train\]'"):
        TensorBoardWriter(tmp_path)
