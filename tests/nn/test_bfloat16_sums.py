"""Sums over maps are float32 in a bfloat16 model: in bfloat16 they stop growing, and lose what nearly cancels."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from flaxdet.images.transform import transform, transform_targets
from flaxdet.nn import BatchNorm, FrozenBatchNorm
from flaxdet.nn.layers import Conv, Dense
from flaxdet.nn.norm import GroupNorm
from flaxdet.train import create_state, make_train_step, sgd, shard_batch
from tests.parity import sides
from tests.tiny import FCOS_NAME, V2_NAME
from tests.tolerances import SUM_BF16

CELLS = (1, 29, 290)  # 8410, which bfloat16 can't count


@functools.partial(jax.jit, static_argnums=0)
def gradient(module, x, cotangent):
    variables = module.init(jax.random.key(0), x)

    def loss(params):
        y = module.apply({**variables, "params": params}, x)
        return jnp.sum(y.astype(jnp.float32) * cotangent)

    return jax.grad(loss)(variables["params"])


@pytest.mark.parametrize("layer", ["convolution", "dense"])
def test_gradient_of_a_bias(layer):
    """With a cotangent of one, the number of cells: bfloat16 stops counting at 256, and in pairs at 4096."""
    module = Conv(2, 1, dtype=jnp.bfloat16) if layer == "convolution" else Dense(2, dtype=jnp.bfloat16)
    found = gradient(module, np.ones((*CELLS, 3), jnp.bfloat16), 1.0)["bias"]
    np.testing.assert_array_equal(found, np.full(2, np.prod(CELLS), np.float32))


@pytest.mark.parametrize("mean", [0.0, 0.2])
@pytest.mark.parametrize("kind", [BatchNorm, GroupNorm])
def test_gradient_of_a_norm(kind, mean):
    """Against numpy's float64 on the same bfloat16 numbers, also where the terms nearly cancel."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 40, 56, 32)).astype(jnp.bfloat16)
    cotangent = rng.normal(mean, size=x.shape).astype(jnp.bfloat16)
    found = gradient(kind(dtype=jnp.bfloat16), x, cotangent.astype(np.float32))
    wide, weights = (np.asarray(value, np.float64) for value in (x, cotangent))
    # BatchNorm has fresh statistics: mean 0 and variance 1; GroupNorm's are those of each channel, a group of its own
    centre, spread = (wide.mean((1, 2), keepdims=True), wide.std((1, 2), keepdims=True))
    normed = wide if kind is BatchNorm else (wide - centre) / spread
    for name, expected in (("scale", (normed * weights).sum((0, 1, 2))), ("bias", weights.sum((0, 1, 2)))):
        error = np.linalg.norm(found[name] - expected) / np.linalg.norm(expected)
        assert error < SUM_BF16, (name, error)


def sums(jaxpr: Jaxpr):
    """All reduce_sum, those of inner functions too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "reduce_sum":
            yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr)):
            if isinstance(inner, ClosedJaxpr | Jaxpr):
                yield from sums(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)


@pytest.mark.parametrize(
    ("name", "frozen"),
    [
        (FCOS_NAME, False),
        pytest.param(FCOS_NAME, True, marks=pytest.mark.ci),
        pytest.param(V2_NAME, False, marks=pytest.mark.ci),
    ],
)
def test_a_step_sums_maps_in_float32(name, frozen):
    model = sides.flax_detector(name, frozen=frozen, dtype=jnp.bfloat16, min_size=128, max_size=160)
    images = transform([np.zeros((128, 160, 3), np.uint8)] * 2, model.transform)
    box = {"boxes": np.asarray([[8.0, 8.0, 60.0, 90.0]], np.float32), "labels": np.asarray([1])}
    arrays = shard_batch({**vars(images), **vars(transform_targets([box] * 2, images, model=model))}, None)
    variables = jax.eval_shape(lambda key: model.init(key, images), jax.random.key(0))
    tx = sgd(0.01)
    state = jax.eval_shape(lambda v: create_state(model, v, tx, key=jax.random.key(0)), variables)
    step = jax.make_jaxpr(make_train_step(model, tx).__wrapped__)(state, arrays)
    found = list(sums(step.jaxpr))
    assert len(found) > 50
    narrow = [
        str(equation)
        for equation in found
        if equation.invars[0].aval.dtype == jnp.bfloat16
        # the 2x2 cells of an upsampling may be added up
        and np.prod([equation.invars[0].aval.shape[axis] for axis in equation.params["axes"]]) > 4
    ]
    assert not narrow


def test_frozen_norms_compute_alike():
    """x * factor + shift with both in float32, rounded once."""
    x = jnp.asarray([[[[1.0, 3.0]]]], jnp.bfloat16)
    stats = {"scale": [1.5, 1.0], "bias": [0.0, 1.003], "mean": [0.0, 0.0], "var": [1.0, 1.0]}
    stats = {name: jnp.asarray(value, jnp.float32) for name, value in stats.items()}
    found = FrozenBatchNorm(eps=0.0, dtype=jnp.bfloat16).apply({"batch_stats": stats}, x)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, jnp.asarray([[[[1.5, 4.003]]]], jnp.bfloat16))
