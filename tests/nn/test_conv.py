"""The convolution's quick forms against lax's own, values and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from flaxdet.nn.conv import conv_general_dilated
from tests.tolerances import LAYERS_F32, OP_F64

CASES = {
    "1x1": (1, 1, (3, 5), 1),
    "1x1 of stride 2": (1, 2, (3, 5), 1),
    "narrow 3x3": (3, 1, (8, 128), 1),
    "wide 3x3": (3, 1, (128, 130), 1),
    "wide 3x3 of stride 2": (3, 2, (130, 128), 1),
    "wide 5x5": (5, 2, (128, 128), 1),
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


def test_under_vmap_and_for_other_platforms():
    x, kernel = jnp.ones((3, 1, 6, 6, 128)), jnp.ones((3, 3, 128, 128))
    padding = ((1, 1), (1, 1))
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}

    def gradient(x):
        return jax.grad(lambda k: jnp.sum(conv_general_dilated(x, k, (1, 1), padding, **options) ** 2))(kernel)

    one = gradient(x[0])
    np.testing.assert_allclose(jax.vmap(gradient)(x), jnp.stack([one] * 3), rtol=LAYERS_F32)
    for platform, dots in {"cpu": 9, "cuda": 0, "tpu": 0}.items():
        text = export.export(jax.jit(gradient), platforms=[platform])(x[0]).mlir_module()
        assert text.count("stablehlo.dot_general") == dots
