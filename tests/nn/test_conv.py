"""The convolution's quick forms against lax's own, values and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from flaxdet.nn.conv import conv_general_dilated
from tests.tolerances import OP_F64

CASES = {
    "1x1": (1, 1, (3, 5), 1),
    "1x1 of stride 2": (1, 2, (3, 5), 1),
    "3x3": (3, 1, (8, 12), 1),
    "3x3 of stride 2": (3, 2, (12, 8), 1),
    "groups": (3, 1, (4, 8), 2),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, x64):
    size, stride, (channels, out), groups = CASES[case]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 6, 9, channels)))
    kernel = jnp.asarray(rng.normal(size=(size, size, channels // groups, out)))
    padding = ((size // 2, size // 2),) * 2
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": groups}
    weights = jnp.asarray(rng.normal(size=lax.conv_general_dilated(x, kernel, (stride,) * 2, padding, **options).shape))

    def value_and_gradients(function, x, kernel):
        def loss(x, kernel):
            return jnp.sum(weights * jnp.sin(function(x, kernel, (stride, stride), padding, **options)))

        return jax.value_and_grad(loss, argnums=(0, 1))(x, kernel)

    expected = value_and_gradients(lax.conv_general_dilated, x, kernel)
    found = value_and_gradients(conv_general_dilated, x, kernel)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=OP_F64, atol=OP_F64 * np.abs(b).max() * 100)
