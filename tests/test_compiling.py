"""The options that flaxdet compiles with: taken where jax knows them, and left out where not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import flaxdet
from flaxdet import compiling


@pytest.fixture(autouse=True)
def asked_anew():
    compiling._known.cache_clear()
    yield
    compiling._known.cache_clear()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
def test_a_jit_of_ones_own_takes_them(dtype):
    options = flaxdet.compiler_options(dtype)
    assert jax.jit(lambda x: x + 1, compiler_options=options)(jnp.float32(1)) == 2
    if options is not None:
        options.clear()  # a copy: the next caller's are whole
        assert flaxdet.compiler_options(dtype)


def test_another_jaxlib_knows_some(monkeypatch):
    monkeypatch.setattr(compiling, "_CPU_FLOAT32", {"xla_cpu_of_another_year": "1"})
    options = flaxdet.compiler_options()
    assert options is None or set(options) == {"xla_disable_hlo_passes"}
    monkeypatch.setattr(compiling, "_CPU", {"xla_of_another_year": "1"})
    assert flaxdet.compiler_options() is None


def test_other_platforms_have_none(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert flaxdet.compiler_options() is None


def in_a_process(tmp_path, **environment) -> str:
    """The folder of the cache after ``keep_compiled`` in a process of its own, where no test's setting reaches."""
    code = "import sys; from flaxdet.compiling import keep_compiled; print(keep_compiled(sys.argv[1]))"
    told = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env={**told, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_cache_is_the_users_own_where_there_is_one(tmp_path):
    assert Path(in_a_process(tmp_path)).parent == tmp_path
    assert in_a_process(tmp_path, JAX_COMPILATION_CACHE_DIR="/elsewhere") == "/elsewhere"
    assert in_a_process(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false") == "None"


def test_another_c_library_has_nothing_to_give_back(monkeypatch):
    monkeypatch.setattr(compiling.ctypes, "CDLL", lambda name: object())
    compiling.give_memory_back()
