"""The options that flaxdet compiles with: taken where jax knows them, and left out where not."""

from __future__ import annotations

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
