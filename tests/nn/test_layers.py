"""Several convolutions of one map at once: the numbers of each alone, and the parameters that each would have."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdet.nn.layers import Conv, together
from flaxdet.xla.routes import routes_for
from tests.tolerances import OP_F64


class Two(nn.Module):
    """A convolution to 3 and one to 12 channels, alone or together."""

    joined: bool
    kernel_size: int
    use_bias: bool

    @nn.compact
    def __call__(self, x):
        layers = [
            Conv(features, self.kernel_size, use_bias=self.use_bias, dtype=jnp.float64, name=name)
            for name, features in (("a", 3), ("b", 12))
        ]
        return together(layers, x) if self.joined else [layer(x) for layer in layers]


@pytest.mark.parametrize(
    ("kernel_size", "use_bias", "platform"),
    [
        (1, True, "cpu"),
        (1, True, "gpu"),
        pytest.param(1, False, "cpu", marks=pytest.mark.ci),
        pytest.param(3, True, "cpu", marks=pytest.mark.ci),
    ],
)
def test_together_as_alone(kernel_size, use_bias, platform, x64):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 6, 16)))
    variables = Two(False, kernel_size, use_bias).init(jax.random.key(0), x)
    again = Two(True, kernel_size, use_bias).init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, again, variables)
    variables = jax.tree.map(lambda leaf: leaf + 0.1, variables)  # biases too

    def values_and_gradients(joined):
        def loss(variables, x):
            outputs = Two(joined, kernel_size, use_bias).apply(variables, x)
            return sum(jnp.sum(jnp.sin((i + 1) * y)) for i, y in enumerate(outputs)), outputs

        with routes_for(platform):
            return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(variables, x)

    found, expected = values_and_gradients(True), values_and_gradients(False)
    assert [y.shape for y in found[0][1]] == [(2, 5, 6, 3), (2, 5, 6, 12)]
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=OP_F64, atol=100 * OP_F64 * np.abs(b).max())
