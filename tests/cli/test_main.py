"""The entry point: help, exit statuses, and errors of one line."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import subprocess
import sys
import time

import pytest

from flaxdet.cli import main as module
from flaxdet.cli.main import COMMANDS


def program(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "error", "-m", "flaxdet", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_no_arguments_print_the_help_and_fail():
    """As nothing was done; on stderr, so that it is not taken for output."""
    result = program()
    assert (result.returncode, result.stdout) == (2, "")
    for part in ("usage: flaxdet", *COMMANDS):
        assert part in result.stderr


def test_help(run):
    found = run("--help")
    assert (found.status, found.err) == (0, "")
    for part in ("usage: flaxdet", "torchvision's detectors", "Detect objects in images", *COMMANDS):
        assert part in found.out


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ("detect", ("IMAGE...", "--weights", "--threshold FLOAT", "--classes CLASS...", "--no-pictures", "COCO_V1")),
        ("train", ("--train PATH PATH", "--weights STR", "--resume", "--freeze-bn, --no-freeze-bn", "Ctrl-C saves")),
        ("eval", ("--images PATH", "--annotations PATH", "--batch-size INT", "flaxdet[train]")),
        ("convert", ("SOURCE TARGET", "--categories PATH", "--frozen-bn, --no-frozen-bn", "Torch is not needed")),
        ("verify", ("fasterrcnn_resnet50_fpn_v2", "--image FILE...", "--float64", "Exit status", "flaxdet[torch]")),
    ],
)
def test_help_of_a_command(run, command, parts):
    found = run(command, "--help")
    assert (found.status, found.err) == (0, "")
    for part in (f"usage: flaxdet {command}", *parts):
        assert part in found.out
    assert "None" not in found.out  # a default that says nothing


def test_help_is_quick_and_takes_no_torch():
    code = (
        "import json, sys\n"
        "from flaxdet.cli.main import main\n"
        f"for command in {list(COMMANDS)}:\n"
        "    assert main([command, '--help']) == 0\n"
        "print(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    )
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    taken = {name.partition(".")[0] for name in json.loads(result.stderr)}
    assert not taken & {"torch", "torchvision", "matplotlib", "tqdm", "sklearn"}
    assert time.perf_counter() - start < 30  # a second or two on an idle machine


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("detct", "a.jpg"), "flaxdet: error: Unrecognized options: detct"),
        (("detect", "a.jpg", "--nope"), "flaxdet detect: error: Unrecognized options: --nope"),
        (("detect", "a.jpg", "--threshold", "high"), "flaxdet detect: error: Error parsing --threshold: "),
        (("detect", "a.jpg", "--out"), "flaxdet detect: error: Missing value for argument '--out'"),
        (("convert", "a.pth"), "flaxdet convert: error: Missing from flaxdet convert: TARGET"),
        (("convert", "a", "b", "c"), "flaxdet convert: error: Unrecognized options: c"),
        (("verify", "yolo"), "flaxdet verify: error: invalid choice 'yolo'"),
        (("verify", "--min-size", "x"), "flaxdet verify: error: Error parsing --min-size"),
    ],
)
def test_bad_options_are_one_line(run, arguments, message):
    found = run(*arguments)
    assert found.status == 2
    assert found.out == ""
    assert found.error.startswith(message)
    program = message.partition(":")[0]
    assert found.error.endswith(f"(see {program} --help)")


def test_unknown_choices_are_answered_by_the_known(run):
    found = run("detect", "a.jpg", "--model", "yolo")
    assert "invalid choice 'yolo' for argument '--model'. Expected one of (" in found.error
    assert "'fcos_resnet50_fpn'" in found.error
    assert "'fasterrcnn_resnet50_fpn_v2'" in found.error
    assert "None" not in found.error


def test_unframed_messages_are_kept():
    assert module._first_paragraph("something\n else ") == "something else"


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ValueError("bad value"), 2, "flaxdet convert: error: bad value"),
        (TypeError("bad type"), 2, "flaxdet convert: error: bad type"),
        (OSError("no disk"), 2, "flaxdet convert: error: no disk"),
        (ImportError("no torch"), 2, "flaxdet convert: error: no torch"),
        (RuntimeError("no memory"), 2, "flaxdet convert: error: no memory"),
        (KeyboardInterrupt(), 130, "flaxdet: interrupted"),
    ],
)
def test_statuses(run, monkeypatch, error, status, message):
    def fail(self):
        raise error

    monkeypatch.setattr(COMMANDS["convert"], "run", fail)
    found = run("convert", "a.pth", "b.pth")
    assert (found.status, found.error) == (status, message)


def test_mistakes_of_our_own_are_not_hidden(run, monkeypatch):
    def fail(self):
        raise KeyError("a bug")

    monkeypatch.setattr(COMMANDS["convert"], "run", fail)
    with pytest.raises(KeyError, match="a bug"):
        run("convert", "a.pth", "b.pth")


def test_the_status_reaches_the_shell(tmp_path):
    result = program("convert", str(tmp_path / "none.pth"), str(tmp_path / "x.pth"))
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"flaxdet convert: error: {tmp_path / 'none.pth'}: cannot be read")


@pytest.mark.skipif(sys.platform == "win32", reason="pipes")
@pytest.mark.parametrize("stream", ["stdout", pytest.param("stderr", marks=pytest.mark.ci)])  # a second stream
def test_output_that_nobody_reads_ends_quietly(stream):
    """As of ``flaxdet ... | head``, and of ``flaxdet ... 2>&1 | head``."""
    arguments = ["--help"] if stream == "stdout" else []  # without a command, the help goes to stderr
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "flaxdet", *arguments]
    try:
        result = subprocess.run(command, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: writer})
    finally:
        os.close(writer)
    assert result.returncode == 141
    assert (result.stdout or b"", result.stderr or b"") == (b"", b"")


def test_another_broken_pipe_is_an_error(run, monkeypatch):
    def fail(self):
        raise BrokenPipeError(32, "Broken pipe")  # such as a worker's that died

    monkeypatch.setattr(COMMANDS["convert"], "run", fail)
    assert run("convert", "a.pth", "b.pth").error.endswith("flaxdet convert: error: [Errno 32] Broken pipe")


def test_is_installed_as_flaxdet():
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="flaxdet")
    assert entry.load() is module.main


def test_a_terminal_without_the_letters_loses_none(monkeypatch):
    """Class names and paths may hold letters that the terminal's encoding lacks."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "argv", ["flaxdet", "eval", "--images", "x"])
    monkeypatch.setattr(module, "keep_compiled", lambda folder: None)
    assert module.main() == 2
    print("кошка", flush=True)
    assert terminal.buffer.getvalue() == b"\\u043a\\u043e\\u0448\\u043a\\u0430\n"
