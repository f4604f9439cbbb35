"""ReLU by its result: the numbers of ``nn.relu`` under every transformation, and what the gradient reads."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdet.nn.relu import relu
from flaxdet.xla.routes import routes_for

X = np.array([-np.inf, -2.5, -1e-45, -0.0, 0.0, 1e-45, 2.5, np.inf, np.nan], np.float32)

TRANSFORMS = {
    "values": lambda f: f,
    "gradient": lambda f: lambda x: jax.vjp(f, x)[1](3 * jnp.ones_like(x))[0],
    "forward mode": lambda f: lambda x: jax.jvp(f, (x,), (3 * jnp.ones_like(x),)),
    "gradient of each": lambda f: jax.vmap(jax.grad(f)),
    "second derivative": lambda f: jax.vmap(jax.grad(jax.grad(lambda x: f(x) ** 2))),
    "recomputed": lambda f: lambda x: jax.vjp(jax.checkpoint(f), x)[1](3 * jnp.ones_like(x))[0],
}


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_is_flaxs(name, dtype, platform):
    with jax.enable_x64(dtype == "float64"), routes_for(platform):
        x = jnp.asarray(X, dtype)
        found, expected = (jax.jit(TRANSFORMS[name](f))(x) for f in (relu, nn.relu))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype == x.dtype
        np.testing.assert_array_equal(*(np.asarray(each).astype(np.float64) for each in (a, b)))


@pytest.mark.parametrize(("platform", "reads_the_result"), [("cpu", False), ("gpu", True), ("tpu", True)])
def test_what_the_gradient_reads(platform, reads_the_result):
    with routes_for(platform):
        text = str(jax.make_jaxpr(lambda x: jax.jvp(relu, (x,), (x,)))(jnp.ones(3)))
    assert ("optimization_barrier" in text) == reads_the_result
