"""Boxes, dtypes and torchvision for the tests of this folder."""

from __future__ import annotations

import importlib
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tolerances import OP_F32, OP_F64

DTYPES = (np.float32, np.float64)


def torchvision() -> ModuleType:
    pytest.importorskip("torch", reason="compares with torch, which is not installed")
    return importlib.import_module("flaxdet.convert.reference").torchvision()


def relative(dtype: type) -> float:
    return OP_F32 if dtype == np.float32 else OP_F64


def random_boxes(rng: np.random.Generator, n: int, dtype: type, span: float = 400) -> np.ndarray:
    corner = rng.uniform(-20, span, (n, 2))
    return np.concatenate((corner, corner + rng.uniform(1, span / 2, (n, 2))), axis=1).astype(dtype)


def adversarial_boxes(dtype: type) -> np.ndarray:
    """Equal, touching, nested, tiny, huge, without area, reversed."""
    return np.array(
        [
            [10, 10, 50, 40],
            [10, 10, 50, 40],
            [50, 10, 90, 40],  # touches the first
            [20, 20, 30, 30],  # inside it
            [60, 60, 60.001, 60.002],
            [0, 0, 1e5, 1e5],
            [20, 20, 20, 35],  # a line
            [25, 25, 25, 25],  # a point
            [0, 0, 0, 0],  # padding
            [40, 40, 30, 20],  # reversed
        ],
        dtype,
    )


def assert_close(ours: jax.Array, torch_tensor, dtype: type, factor: float = 1) -> None:
    """Equal dtype and shape, and values within the operation's tolerance of the largest; NaN matches NaN."""
    theirs = torch_tensor.detach().numpy()
    ours = np.asarray(ours)
    assert ours.dtype == theirs.dtype == dtype
    assert ours.shape == theirs.shape
    finite = np.abs(theirs[np.isfinite(theirs)])
    scale = max(1.0, float(finite.max())) if finite.size else 1.0
    rtol = relative(dtype) * factor
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol * scale)


def check_transforms(function, *arrays: np.ndarray) -> None:
    """Under jit, vmap over two different images gives what each image gives alone."""
    rtol = relative(np.result_type(*(a.dtype for a in arrays if a.dtype.kind == "f")).type)
    jitted = jax.jit(function)

    def same(a, b):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype
        if a.dtype.kind != "f":
            np.testing.assert_array_equal(a, b)
        else:
            scale = np.max(np.abs(b[np.isfinite(b)]), initial=1)
            np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * scale)

    flipped = [np.flip(a, axis=0) for a in arrays]
    batch = [jnp.asarray(np.stack(pair)) for pair in zip(arrays, flipped, strict=True)]
    alone = [jitted(*map(jnp.asarray, image)) for image in (arrays, flipped)]
    together = jax.jit(jax.vmap(function))(*batch)
    for i in range(2):
        jax.tree.map(lambda batched, single, i=i: same(batched[i], single), together, alone[i])
