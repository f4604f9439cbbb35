"""Checkpoints when something goes wrong: full disks, kills, Ctrl-C."""

from __future__ import annotations

import errno
import os
import signal
import sys

import jax.numpy as jnp
import pytest

from flaxdet.train.checkpoints import Checkpoints
from tests.train.states import assert_same, make_state, names, run

# ------------------------------------------------------------------------------------------------------- failures


class Failing:
    """A save in the background that ends in an error, or is waited for in vain."""

    def __init__(self, *errors):
        self.errors = list(errors)

    def result(self):
        if self.errors:
            raise self.errors.pop(0)


FULL = ValueError("RESOURCE_EXHAUSTED: Failed writing: \"x\": No space left on device [os_error_code='28']")


@pytest.mark.parametrize("cause", [FULL, OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("when", ["at the start", "in the background"])
def test_a_full_disk_is_one_line_and_leaves_the_last_good_one(tmp_path, monkeypatch, cause, when):
    from orbax.checkpoint import v1 as ocp

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(make_state(1), metrics={"AP": 0.1}, wait=True)

    def save(path, *args, **options):
        path.with_name(f"{path.name}.orbax-checkpoint-tmp").mkdir()
        if when == "at the start":
            raise cause
        return Failing(cause)

    with monkeypatch.context() as patch:
        patch.setattr(ocp, "save_checkpointables_async", save)
        if when == "in the background":
            checkpoints.save(make_state(2))
        with pytest.raises(OSError, match=r"of step \d could not be saved: No space left on device$") as error:
            checkpoints.save(make_state(3))
    assert error.value.errno == errno.ENOSPC
    assert str(error.value).startswith(str(tmp_path))
    assert names(tmp_path) == ["1"]
    checkpoints.save(make_state(4))  # there is space again
    checkpoints.close()
    assert names(tmp_path) == ["1", "4"]


def test_config_that_cannot_be_written_stops_the_save(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, config={"a": 1})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="could not be saved: No space left on device"):
        checkpoints.save(make_state(1))
    assert names(tmp_path) == []


def test_an_error_in_the_background_surfaces_in_close_and_only_once(tmp_path, monkeypatch):
    from orbax.checkpoint import v1 as ocp

    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr(ocp, "save_checkpointables_async", lambda *_, **__: Failing(RuntimeError("a\nlong\nstory")))
    checkpoints.save(make_state(1))
    with pytest.raises(ValueError, match=r"step 1 could not be saved: a long story"):
        checkpoints.close()
    checkpoints.close()


def test_ctrl_c_while_waiting_does_not_lose_the_save(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(make_state(1))
    step, response, metrics = checkpoints._pending
    interrupted = Failing(KeyboardInterrupt())
    checkpoints._pending = (step, interrupted, metrics)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.close()
    assert checkpoints._pending is not None
    checkpoints._pending = (step, response, metrics)
    checkpoints.close()
    assert checkpoints.last == 1


def test_ctrl_c_in_save_waits_until_the_save_is_on_its_way(tmp_path, monkeypatch):
    from orbax.checkpoint import v1 as ocp

    begin = ocp.save_checkpointables_async

    def interrupted(*args, **options):
        signal.raise_signal(signal.SIGINT)
        return begin(*args, **options)

    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr(ocp, "save_checkpointables_async", interrupted)
    usual = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(make_state(1))
    assert signal.getsignal(signal.SIGINT) is usual
    checkpoints.close()
    assert_same(checkpoints.restore(make_state())[0], make_state(1))


def test_ctrl_c_while_reading_is_not_taken_for_damage(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(make_state(1), wait=True)
    read = checkpoints._orbax.checkpointables_metadata

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)  # orbax would go on with half of what it reads
        return read(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._orbax, "checkpointables_metadata", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.restore(make_state())
    assert_same(checkpoints.restore(make_state())[0], make_state(1))


@pytest.mark.ci  # a process of its own; a full disk is played above
def test_a_folder_that_cannot_be_made_leaves_no_thread_waiting(tmp_path):
    # orbax's default would keep the process for 20 minutes; run() has a timeout
    script = """
folder = Path(sys.argv[1])
checkpoints = Checkpoints(folder)
(folder / ".lock").unlink()
folder.rmdir()
folder.write_text("")
try:
    checkpoints.save(make_state(1), wait=True)
except OSError as error:
    print(error.errno == errno.ENOTDIR)
"""
    assert run(script, tmp_path / "folder") == "True\n"


def test_leftovers_of_a_killed_run_are_removed_and_nothing_else(tmp_path):
    for name in ("3.orbax-checkpoint-tmp", "2.removed", "mine", "5.mine"):
        (tmp_path / name / "state").mkdir(parents=True)
        (tmp_path / name / "state" / "file").write_text("x")
    for name in (".config.json.0a1b2c3d.tmp", "config.json", "notes.tmp"):
        (tmp_path / name).write_text("{}")
    assert Checkpoints(tmp_path).last is None
    assert names(tmp_path) == ["5.mine", "config.json", "mine", "notes.tmp"]


# ------------------------------------------------------------------------------------------- in other processes


KILLED = """
import signal, warnings
from orbax.checkpoint._src.path import atomicity
import flaxdet.train.checkpoints as module

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def die_half_way(path, **_):
    os.unlink(next(p for p in Path(path).rglob("*") if p.is_file()))
    die()

async def die_late(*_, **__):
    die()

warnings.simplefilter("ignore")  # of jax, about the forks; it has not begun to work yet
for moment in sys.argv[2:]:
    if os.fork():
        assert os.wait()[1] == signal.SIGKILL, moment
        continue
    folder = Path(sys.argv[1]) / moment
    checkpoints = Checkpoints(folder, config={"a": 1})
    if moment != "config":
        checkpoints.save(make_state(1), metrics={"AP": 0.5})
        checkpoints.save(make_state(2), {"place": 2}, wait=True)
    if moment == "config":  # the first save, config.json is written, nothing else
        jax.tree.leaves(make_state(3))
        checkpoints._orbax.save_checkpointables_async = die
    elif moment == "written":  # all but the renaming
        atomicity.AtomicRenameTemporaryPath.finalize = die_late
    elif moment == "committed":  # the new one is whole, the old one still there
        module.os.replace = die
    elif moment == "removing":
        module.shutil.rmtree = die_half_way
    checkpoints.save(make_state(3).replace(params={"big": jnp.arange(1_000_000.0)}), {"place": 3})
    if moment == "begun":
        die()
    if moment == "writing":
        while not any(p.is_file() for p in folder.glob("3.*/**/*")):
            pass
        die()
    checkpoints.close()
"""


@pytest.mark.ci  # what a kill leaves behind is removed in the test above
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_killed_in_the_middle_of_a_save(tmp_path):
    survivors = {"config": None, "begun": 2, "writing": 2, "written": 2, "committed": 3, "removing": 3}
    run(KILLED, tmp_path, *survivors)
    for moment, last in survivors.items():
        checkpoints = Checkpoints(tmp_path / moment, config={"a": 1})
        assert checkpoints.last == last, moment
        kept = {None: [], 2: ["1", "2"], 3: ["1", "2", "3"] if moment == "committed" else ["1", "3"]}[last]
        assert names(tmp_path / moment) == [*kept, "config.json"], moment
        template = make_state()
        if last is None:
            with pytest.raises(FileNotFoundError):
                checkpoints.restore(template)
            checkpoints.save(make_state(4), wait=True)
            continue
        assert checkpoints.best == 1
        assert_same(checkpoints.restore(template, step="best")[0], make_state(1))
        if last == 3:
            template = template.replace(params={"big": jnp.zeros(1_000_000)})
        found, place, _ = checkpoints.restore(template)
        assert place == {"place": last}
        expected = make_state(last)
        assert_same(found, expected if last == 2 else expected.replace(params={"big": jnp.arange(1_000_000.0)}))
        checkpoints.save(make_state(4))
        checkpoints.close()
        assert names(tmp_path / moment) == ["1", "4", "config.json"], moment


LIMITED = """
import resource
folder = Path(sys.argv[1])
checkpoints = Checkpoints(folder)
checkpoints.save(make_state(1), wait=True)
large = make_state(2).replace(params={"big": jax.random.normal(jax.random.key(0), (300_000,))})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
checkpoints.save(large)
try:
    checkpoints.close()
except OSError as error:
    print(error.errno == errno.EFBIG, str(error).removeprefix(f"{folder}: "))
print(names(folder))
"""


@pytest.mark.ci  # a full disk is played above
@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_a_real_failure_to_write_leaves_stderr_clean(tmp_path):
    message = f"the checkpoint of step 2 could not be saved: {os.strerror(errno.EFBIG)}"
    assert run(LIMITED, tmp_path) == f"True {message}\n['1']\n"
