"""Jit with the options of the platform at hand: taken where jax knows them, left out elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxdet
from flaxdet.xla import jit, memory, options, routes
from flaxdet.xla.devices import platform_of


@pytest.fixture(autouse=True)
def asked_anew():
    options.known.cache_clear()
    yield
    options.known.cache_clear()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
def test_a_jit_of_ones_own_takes_them(dtype):
    found = flaxdet.compiler_options(dtype)
    assert jax.jit(lambda x: x + 1, compiler_options=found)(jnp.float32(1)) == 2
    if found is not None:
        found.clear()  # a copy: the next caller's are whole
        assert flaxdet.compiler_options(dtype)


def test_another_jaxlib_knows_some(monkeypatch):
    monkeypatch.setattr(options, "_CPU_FLOAT32", {"xla_cpu_of_another_year": "1"})
    found = flaxdet.compiler_options()
    assert found is None or set(found) == {"xla_disable_hlo_passes"}
    monkeypatch.setattr(options, "_CPU", {"xla_of_another_year": "1"})
    assert flaxdet.compiler_options() is None


def test_other_platforms_have_none(monkeypatch):
    cpu = flaxdet.compiler_options(platform="cpu")
    assert flaxdet.compiler_options(platform="gpu") is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert flaxdet.compiler_options() is None
    assert flaxdet.compiler_options(platform="cpu") == cpu != {}


def test_a_process_without_a_cpu_backend_knows_the_same(monkeypatch):
    """As under JAX_PLATFORMS=cuda, where an artifact still records the options for CPUs."""
    cpu = flaxdet.compiler_options(platform="cpu")
    options.known.cache_clear()

    def none(platform):
        raise RuntimeError(f"Unknown backend {platform}")

    monkeypatch.setattr(jax, "devices", none)
    assert flaxdet.compiler_options(platform="cpu") == cpu


HERE = jax.default_backend()
LARGE = jit._PIECE // 4 + 1  # float32s


def total(x):
    """Of an array as large as x, which no fusion can do without."""
    return jax.lax.optimization_barrier(x * 2).sum()


def of_size(function=total) -> jit.JitBySize:
    jitted = jit.JitBySize(function)
    if jitted.in_pieces(HERE) is jitted.on(HERE):
        pytest.skip("temporaries are in pieces on CPUs under glibc alone")
    return jitted


def test_pieces_for_programs_of_small_arrays_alone():
    jitted = of_size()
    small, large = jnp.ones(LARGE - 1), jnp.ones(LARGE)
    for x in (small, large, small):
        assert jitted(x) == 2 * x.size
    assert list(jitted.chosen.values()) == [jitted.in_pieces(HERE), jitted.on(HERE)]
    assert [each._cache_size() for each in jitted.chosen.values()] == [1, 1]
    assert jitted._cache_size() == 2
    assert jitted.lower(jax.ShapeDtypeStruct((LARGE,), jnp.float32)).compile()(large) == 2 * LARGE
    assert len(jitted.chosen) == 2
    assert jitted.__name__ == "total"


def with_a_rule(function):
    ruled = jax.custom_jvp(function)
    ruled.defjvps(lambda tangent, _, x: 2 * tangent.sum())
    return ruled


@pytest.mark.parametrize(
    "around",
    [
        jax.jit,
        jax.checkpoint,
        jax.grad,
        lambda f: lambda x: jax.lax.cond(x[0] > 0, f, lambda x: x[0], x),
        lambda f: lambda x: jax.lax.scan(lambda carry, _: (carry, f(carry)), x, None, 2)[1],
        with_a_rule,
    ],
    ids=["jit", "checkpoint", "grad", "cond", "scan", "custom_jvp"],
)
def test_arrays_are_found_wherever_they_are(around):
    jitted = of_size(around(total))
    for size in (LARGE - 1, LARGE):
        assert jitted._choose(HERE, jax.ShapeDtypeStruct((size,), jnp.float32)) is (
            jitted.in_pieces(HERE) if size < LARGE else jitted.on(HERE)
        )


def test_inside_another_jit_it_is_a_jit():
    jitted = of_size()
    assert jax.jit(jitted)(jnp.ones(3)) == 6
    assert jax.grad(jitted)(jnp.ones(3)).tolist() == [2, 2, 2]
    assert jax.vmap(jitted)(jnp.ones((2, 3))).tolist() == [6, 6]
    outside = jnp.ones(3)
    assert jax.jit(lambda: jitted(outside))() == 6  # no argument is traced, the call is
    assert not jitted.chosen


def test_keyword_arguments():
    jitted = of_size(lambda x, *, more: total(x) + total(more["y"]))
    small, large = jnp.ones(3), jnp.ones(LARGE)
    assert jitted(small, more={"y": small}) == jitted(more={"y": small}, x=small) == 12
    assert jitted(small, more={"y": large}) == 6 + 2 * LARGE
    assert list(jitted.chosen.values()) == [jitted.in_pieces(HERE), jitted.in_pieces(HERE), jitted.on(HERE)]
    assert jitted.lower(small, more={"y": small}).compile()(small, more={"y": small}) == 12
    assert len(jitted.chosen) == 3


def test_a_choice_is_made_once_a_signature(monkeypatch):
    """Also where calls take turns, in other threads, and with numpy's arrays and Python's numbers."""
    jitted = of_size(lambda x, y: total(x) + y)
    chosen = []
    monkeypatch.setattr(jit, "_largest", lambda jaxpr: chosen.append(jaxpr) or 0)
    calls = [(jnp.ones(3), 1.0), (jnp.ones(4), 1.0), (np.ones(3, np.float32), 1.0), (jnp.ones(3), jnp.float32(1))]
    for _ in range(2):
        assert [float(jitted(*call)) for call in calls] == [7, 9, 7, 7]
    assert float(jitted(jnp.zeros(3), 2.5)) == 2.5
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(jitted, *calls[1]).result() == 9
    with routes.routes_for("gpu"):
        assert jitted(*calls[0]) == 7
    assert len(chosen) == len(jitted.chosen) == 5


def test_the_choice_costs_little():
    """Of the 534 arrays of a state and its batch: they took three times as long as jit alone."""
    jitted, plain = of_size(lambda state: [x + 1 for x in state]), jax.jit(lambda state: [x + 1 for x in state])
    state = jitted([jnp.ones(i % 7 + 1) for i in range(534)])
    times = {call: [] for call in (jitted, plain)}
    for call in [jitted, plain] * 60:
        jax.block_until_ready(state)
        start = time.perf_counter()
        state = call(state)
        times[call].append(time.perf_counter() - start)
    assert min(times[jitted]) < 2 * min(times[plain])


@pytest.mark.parametrize("reason", ["another C library", "another jaxlib", "another platform"])
def test_elsewhere_one_jit_for_all(monkeypatch, reason):
    if reason == "another C library":
        monkeypatch.setattr(jit.machine, "libc_ver", lambda: ("", ""))
    elif reason == "another jaxlib":
        monkeypatch.setattr(jit, "_IN_PIECES", {"xla_cpu_of_another_year": "1"})
    else:
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    jitted = jit.JitBySize(total)
    assert jitted(jnp.ones(3)) == jitted(x=jnp.ones(3)) == jax.jit(jitted)(jnp.ones(3)) == 6
    assert not jitted.chosen  # nothing was looked up


@pytest.mark.skipif(HERE != "cpu", reason="the arguments are to lie on another device than the default one")
class TestTheArgumentsDecide:
    """Of arrays on a CPU in a process whose default backend is a GPU."""

    @pytest.fixture(autouse=True)
    def another_default(self, monkeypatch):
        self.cpu = jax.devices("cpu")[0]
        self.here = jax.device_put(jnp.ones(3), self.cpu)
        self.anywhere = jnp.ones(3)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def test_platform_of(self):
        sharded = jax.ShapeDtypeStruct((3,), jnp.float32, sharding=self.here.sharding)
        for held in (self.here, self.here.sharding, sharded):
            assert platform_of({"x": [1.0, np.ones(3), self.anywhere, held]}) == "cpu"
        assert platform_of(self.anywhere, np.ones(3), jax.ShapeDtypeStruct((3,), jnp.float32), "name") == "gpu"
        for default in (self.cpu, "cpu"):
            with jax.default_device(default):
                assert platform_of(self.anywhere) == "cpu"

    @pytest.mark.parametrize("kind", [jit.JitByDevice, jit.JitBySize])
    def test_options_and_routes_are_theirs(self, kind):
        seen = []
        jitted = kind(lambda x: seen.append(routes.platform()) or x + 1)
        assert jitted(self.here).tolist() == [2, 2, 2]
        with routes.routes_for("tpu"):  # an override has the last word on routes, and none on options
            assert jitted(self.here).tolist() == [2, 2, 2]
        assert jitted.lower(self.here).compile()(self.here).tolist() == [2, 2, 2]
        assert (set(seen), set(jitted._jitted)) == ({"cpu", "tpu"}, {"cpu"})
        assert jitted.on("cpu") is jitted.on("cpu") is not jitted.on("gpu")

    def test_arrays_held_nowhere_take_the_defaults(self):
        jitted = jit.JitByDevice(lambda x: x + 1)
        assert jitted(self.anywhere).tolist() == [2, 2, 2]
        assert set(jitted._jitted) == {"gpu"}

    def test_a_meshs_shardings(self):
        jitted = jit.JitByDevice(lambda x: x + 1, in_shardings=self.here.sharding)
        assert jitted(self.anywhere).tolist() == [2, 2, 2]
        assert set(jitted._jitted) == {"cpu"}


def in_a_process(code: str, *arguments: object, **environment: str) -> str:
    """What code prints in a process of its own, where no test's setting reaches; any warning is an error."""
    told = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        env={**told, **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


KEEP = "import sys; from flaxdet.xla.compilation_cache import keep_compiled; print(keep_compiled(sys.argv[1]))"


@pytest.mark.ci  # three processes; the next test uses a cache of the user's
def test_the_cache_is_the_users_own_where_there_is_one(tmp_path):
    assert Path(in_a_process(KEEP, tmp_path)).parent == tmp_path
    assert in_a_process(KEEP, tmp_path, JAX_COMPILATION_CACHE_DIR="/elsewhere") == "/elsewhere"
    assert in_a_process(KEEP, tmp_path, JAX_ENABLE_COMPILATION_CACHE="false") == "None"


@pytest.mark.parametrize("raises", [False, True])
def test_the_cache_does_without_pieces_in_silence(tmp_path, raises):
    """XLA cannot serialize them. Where jax is to raise then, there are none, and the program is kept."""
    of_size()
    code = """if True:
        import jax
        from flaxdet.xla.jit import JitBySize

        @JitBySize
        def several(x):  # arrays that live together, each in a piece of its own
            y = [jax.lax.optimization_barrier(x * n) for n in range(1, 9)]
            return sum(jax.lax.optimization_barrier(tuple(y))).sum()

        x = jax.numpy.ones(5_000_000)
        several.lower(x)
        print(int(several(x)), int(several(x)))
        print([jitted._cache_size() for jitted in (several.in_pieces("cpu"), several.on("cpu"))])
    """
    told = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_RAISE_PERSISTENT_CACHE_ERRORS": str(raises).lower()}
    found = in_a_process(code, JAX_COMPILATION_CACHE_DIR=str(tmp_path), **told)
    assert found == f"180000000 180000000\n{[0, 1] if raises else [1, 0]}"
    assert sum(path.name.startswith("jit_several") for path in tmp_path.glob("*-cache")) == raises


def test_glibc_alone_is_asked_for_freed_memory(monkeypatch):
    asked = []
    for library in (types.SimpleNamespace(malloc_trim=asked.append), object()):
        monkeypatch.setattr(memory.ctypes, "CDLL", lambda name, library=library: library)
        memory.give_memory_back()
    assert asked == [0]
