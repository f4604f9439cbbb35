"""Strict settings for the whole suite, and the fixtures that more than one file uses."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import tempfile
from pathlib import Path

# One thread a worker: xdist runs a worker a core, and thread pools that fight cost more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
# Two fifths of the suite's time go to XLA, and its workers, the processes they start and its files compile many of the
# same programs: what takes a while is kept for all of them until the end. By the size limit, which is never reached,
# jax locks the folder.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    programs = tempfile.TemporaryDirectory(prefix="flaxdet-programs-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs.name
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(20_000_000_000)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import jax
import pytest

# Tracing makes millions of objects and hardly any cycles: at the default thresholds Python looks for those an eighth of
# the time.
gc.set_threshold(100_000, 20, 100)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_configure(config):
    # by default pytest-xdist starts with the group of the most tests, and so ends with a file of one long test
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    """Leaves out what only continuous integration runs, or only someone who prepares a release.

    Tests without an ``xdist_group`` of their own are grouped by file: one worker runs them, so that they share compiled
    programs. Groups with tests that continuous integration alone runs are the longest: they come first, so that at the
    end no worker waits long for another.
    """
    level = os.environ.get("FLAXDET_CI")
    skipped = {}
    if level != "release":
        skipped["release"] = "repeats smaller tests for minutes: FLAXDET_CI=release runs it"
    if level is None:
        skipped["ci"] = "repeats a smaller test at greater cost: .ci/run runs it, or pytest with FLAXDET_CI=1"
    long = set()
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
        if item.get_closest_marker("ci"):
            long.add(group_of(item))
        for mark, reason in skipped.items():
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))
    items.sort(key=lambda item: group_of(item) not in long)


def group_of(item: pytest.Item) -> str:
    return item.get_closest_marker("xdist_group").args[0]


@pytest.fixture(autouse=True, scope="module")
def bounded_memory():
    """Lets go of compiled programs between files once they fill memory: a worker would come to hold 10 GB of them."""
    yield
    statm = Path("/proc/self/statm")
    if statm.exists() and int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > 3e9:
        jax.clear_caches()
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # glibc alone gives freed memory back only when asked
            ctypes.CDLL("libc.so.6").malloc_trim(0)


@pytest.fixture
def x64():
    """Runs the test in float64 mode (threads and other tests are not affected)."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def compiled():
    """A list that gets an entry for each program that XLA compiles during the test, none being compiled before."""
    jax.clear_caches()
    entries = []

    def note(event: str, duration_secs: float, **kwargs: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            entries.append(kwargs)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield entries
    jax.monitoring.unregister_event_duration_listener(note)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of data and checkpoints that lies beside a developer's checkout."""
    if not SHARED.is_dir():
        pytest.skip("needs the data folder ../shared, which is not part of the repository")
    return SHARED


@pytest.fixture(scope="module")
def drawn_models():
    """(model, variables) by (builder, classes, frozen), drawn once."""
    from flaxdet import registry
    from flaxdet.convert.state_dict import abstract_variables
    from tests.drawn import drawn

    made: dict = {}

    def get(name: str, num_classes: int = 91, frozen: bool = False):
        key = (name, num_classes, frozen)
        if key not in made:
            model = registry.make_model(name, num_classes=num_classes, frozen_bn=frozen)
            made[key] = model, drawn(abstract_variables(model))
        return made[key]

    return get
