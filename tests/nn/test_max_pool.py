"""The stem's pooling against torch's, ties and NaN included."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from flaxdet.nn.pooling import max_pool_3x3
from flaxdet.xla.routes import routes_for

torch = pytest.importorskip("torch")


@jax.jit
def values_and_gradient(x, cotangent):
    """The values without a gradient, for which it may take another form; those with one, and the gradient."""
    found, pull = jax.vjp(max_pool_3x3, x)
    return max_pool_3x3(x), found, *pull(cotangent)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 8), (9, 5)])
@pytest.mark.parametrize("levels", [2, 1000])  # with 2 nearly every window has a tie, and the first takes the gradient
def test_values_and_gradient(size, levels, platform):
    rng = np.random.default_rng(0)
    x = rng.integers(-levels, levels, (2, *size, 3)).astype(np.float32)
    theirs = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).requires_grad_()
    expected = torch.nn.functional.max_pool2d(theirs, 3, 2, 1)
    cotangent = rng.integers(1, 100, expected.shape).astype(np.float32)
    expected.backward(torch.from_numpy(cotangent))
    with routes_for(platform):
        alone, found, gradient = values_and_gradient(x, cotangent.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(alone, found)
    np.testing.assert_array_equal(found, expected.detach().numpy().transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(gradient, theirs.grad.numpy().transpose(0, 2, 3, 1))


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_nan_and_infinity_as_torch_has_them(platform):
    x = np.zeros((1, 6, 6, 1), np.float32)
    x[0, 0, 0], x[0, 3, 3], x[0, 5, 0] = np.nan, np.inf, -np.inf
    expected = torch.nn.functional.max_pool2d(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), 3, 2, 1)
    with routes_for(platform):
        found = jax.jit(max_pool_3x3)(x)
    np.testing.assert_array_equal(np.asarray(found)[..., 0], expected[:, 0].numpy())
