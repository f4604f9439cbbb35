"""The routes of top-k against a stable sort of NumPy: values and indices, with ties, infinities, NaN and -0."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdet.ops import top_k as module
from flaxdet.ops.top_k import top_k
from flaxdet.xla.routes import routes_for

# Compiled once for all cases of a shape. For `test_groups` alone: a compiled program keeps the patched sizes of groups.
in_groups = jax.jit(top_k, static_argnames="k")


def expected(x: np.ndarray, k: int) -> np.ndarray:
    """Indices by NumPy's stable sort: NaN first, then descending; 0 before -0."""
    rank = np.where(np.isnan(x), np.inf, x)
    place = np.lexsort((np.arange(x.shape[-1]), np.signbit(x) & ~np.isnan(x), -rank, ~np.isnan(x)))
    return place[:k].astype(np.int32)


def rows(kind: str, n: int, dtype: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    x = rng.normal(size=n).astype(dtype)
    if kind == "ties":
        x = np.round(x * 4) / 4  # a dozen values, zeros of both signs among them
    elif kind == "all tied":
        x[:] = 0.5
    elif kind == "few above":  # as scores below a threshold
        x = np.where(x > 2.5, x, -1).astype(dtype)
    elif kind == "infinite":
        x = np.where(x > 0.5, np.inf, np.where(x < 0, -np.inf, x)).astype(dtype)
    elif kind == "NaN":
        x[rng.integers(0, n, n // 50)] = np.nan
    elif kind == "ascending":  # the best in the last group, which padding fills up
        x = np.arange(n).astype(dtype)
    return x


@pytest.mark.parametrize("kind", ["distinct", "ties", "all tied", "few above", "infinite", "NaN", "ascending"])
@pytest.mark.parametrize("dtype", [pytest.param("float64", marks=pytest.mark.ci), "float32", "bfloat16"])
def test_groups(kind, dtype, monkeypatch):
    """Two levels of groups: 5003 values in groups of 16 and of 4, as for a long row."""
    monkeypatch.setattr(module, "SORTED", 200)
    monkeypatch.setattr(module, "GROUPS", (16, 4))
    with jax.enable_x64(dtype == "float64"), routes_for("gpu"):
        wide = rows(kind, 5003, "float32" if dtype == "bfloat16" else dtype)
        x = np.asarray(wide, jnp.dtype(dtype))
        for k in (1, 60, 300, 5003):
            values, index = in_groups(x, k=k)
            order = expected(x.astype(wide.dtype), k)
            np.testing.assert_array_equal(index, order, err_msg=f"k={k}")
            assert index.dtype == jnp.int32
            assert values.dtype == x.dtype
            np.testing.assert_array_equal(np.asarray(values, wide.dtype), x.astype(wide.dtype)[order])


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_rows(platform):
    """[2, 3, N] under vmap and without, at the sizes of FCOS's finest level of a small image."""
    x = np.stack([[rows(kind, 20_000, "float32") for kind in ("ties", "distinct", "few above")]] * 2)
    x[1] = x[1, :, ::-1]
    want = np.stack([[expected(row, 100) for row in image] for image in x])
    with routes_for(platform):
        _, index = jax.jit(functools.partial(top_k, k=100))(x)
        np.testing.assert_array_equal(index, want)
        _, index = jax.jit(jax.vmap(functools.partial(top_k, k=100)))(x)
        np.testing.assert_array_equal(index, want)


def test_no_long_sort():
    """FCOS's finest level at 800x1088: no sort or top-k of more than 8192 values remains."""
    with routes_for("gpu"):
        jaxpr = jax.make_jaxpr(functools.partial(top_k, k=1000))(jax.ShapeDtypeStruct((2, 1_237_600), jnp.float32))
    lengths = [
        equation.invars[0].aval.shape[-1]
        for equation in jaxpr.jaxpr.eqns
        if equation.primitive.name in ("sort", "top_k", "jit")
        for equation in ([equation] if equation.primitive.name != "jit" else equation.params["jaxpr"].eqns)
        if equation.primitive.name in ("sort", "top_k")
    ]
    assert len(lengths) >= 4
    assert max(lengths) <= 8192
