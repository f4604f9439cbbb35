"""Two writers to one folder: the second is refused at once, until the first ends, even by SIGKILL."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest

from flaxdet.train import _lock
from flaxdet.train._lock import FolderLock, LockedError
from flaxdet.train.checkpoints import Checkpoints
from tests.train.states import ROOT, assert_same, make_state

HOLD = """
import sys, time
from pathlib import Path
from flaxdet.train._lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_another_process_is_named_and_gives_the_lock_up_when_killed(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(OSError, match=rf"{tmp_path}: process {process.pid} on .* is writing to it; wait"):
            Checkpoints(tmp_path)
        process.send_signal(signal.SIGKILL)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(1))


def test_one_object_at_a_time_writes(tmp_path):
    with Checkpoints(tmp_path) as first:
        first.save(make_state(1), wait=True)
        with pytest.raises(LockedError, match="this process, by another Checkpoints, is writing to it") as error:
            Checkpoints(tmp_path)
        assert error.value.errno == errno.EWOULDBLOCK
    with Checkpoints(tmp_path) as second:  # closed
        second.restore(make_state())
        with pytest.raises(LockedError):
            first.save(make_state(2))  # takes the lock anew
        second.save(make_state(2))


def test_readers_leave_the_writer_alone(tmp_path):
    with Checkpoints(tmp_path) as writer:
        writer.save(make_state(1), wait=True)
        begun = tmp_path / "2.orbax-checkpoint-tmp"
        begun.mkdir()
        reader = Checkpoints(tmp_path, read_only=True)
        assert_same(reader.restore(make_state())[0], make_state(1))
        assert begun.exists()  # is of a save in progress
        with pytest.raises(ValueError, match="opened with read_only=True"):
            reader.save(make_state(2))
    absent = Checkpoints(tmp_path / "absent", read_only=True)
    assert absent.last is None
    assert not absent.folder.exists()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def refuse(_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(_lock, "_lock", refuse)
    with pytest.warns(UserWarning, match="this file system has no locks"):
        FolderLock(tmp_path).release()
