"""Products with gradients of other forms: lax's numbers under every transformation, and no product too many."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import flaxdet
from flaxdet.nn.dot import dot_general, product
from flaxdet.nn.layers import Dense
from tests.tolerances import OP_F64

LAST_AND_FIRST = (((1,), (0,)), ((), ()))


def plain(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    return lax.dot_general(lhs, rhs, LAST_AND_FIRST)


def operands(inner: int, outer: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(7, inner))), jnp.asarray(rng.normal(size=(inner, outer)))


def loss(function, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    return jnp.sum(jnp.sin(function(lhs, rhs)))


TRANSFORMS = {
    "values": lambda f: f,
    "gradients": lambda f: jax.grad(functools.partial(loss, f), argnums=(0, 1)),
    "gradient of lhs": lambda f: jax.grad(functools.partial(loss, f), argnums=0),
    "gradient of rhs": lambda f: jax.grad(functools.partial(loss, f), argnums=1),
    "forward mode": lambda f: lambda a, b: jax.jvp(f, (a, b), (jnp.cos(a), jnp.sin(b))),
    "second derivatives": lambda f: jax.hessian(functools.partial(loss, f), argnums=(0, 1)),
    "gradient of each row": lambda f: jax.vmap(
        lambda row, b: jax.grad(functools.partial(loss, f), argnums=(0, 1))(row[None], b), in_axes=(0, None)
    ),
    "recomputed": lambda f: jax.grad(jax.checkpoint(functools.partial(loss, f)), argnums=(0, 1)),
}


@pytest.mark.parametrize("jitted", [pytest.param(False, marks=pytest.mark.ci), True])
@pytest.mark.parametrize("shape", [(5, 3), (3, 5)])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_same_numbers(name, shape, jitted, x64):
    wrap = jax.jit if jitted else lambda f: f
    found, expected = (wrap(TRANSFORMS[name](function))(*operands(*shape)) for function in (product, plain))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=OP_F64, atol=OP_F64 * np.abs(b).max())


@pytest.mark.parametrize("of", [0, 1, (0, 1)])
def test_no_product_too_many(of):
    """The gradient of one operand costs nothing for the other, frozen parameters for example."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 32), (32, 16))]
    products = []
    for function in (product, plain):
        lowered = jax.jit(jax.grad(functools.partial(loss, function), argnums=of)).lower(*shapes)
        text = lowered.compile().as_text()
        products.append(text.count(" dot("))
    assert products[0] == products[1] > 0


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other backends take lax's own gradients")
def test_forms_on_cpus():
    """The gradient of rhs has the fewer features first, a large one excepted; no product reads rhs transposed."""

    def products(*shape: int) -> set[str]:
        shapes = [jax.ShapeDtypeStruct(each, jnp.float32) for each in ((8, shape[0]), shape)]
        gradients = jax.jit(
            jax.grad(functools.partial(loss, product), argnums=(0, 1)), compiler_options=flaxdet.compiler_options()
        )
        text = gradients.lower(*shapes).compile().as_text()
        assert "lhs_contracting_dims={1}, rhs_contracting_dims={1}" not in text
        return set(re.findall(r"f32\[([\d,]+)\]\S* dot\(", text))

    assert products(32, 16) == {"8,16", "8,32", "16,32"}
    assert products(16, 32) == {"8,32", "8,16", "16,32"}
    assert products(12544, 1024) == {"8,1024", "8,12544", "12544,1024"}


def test_other_products_are_laxs():
    lhs, rhs = np.ones((4, 2, 3), np.float32), np.ones((4, 3, 5), np.float32)
    batched = (((2,), (1,)), ((0,), (0,)))
    np.testing.assert_array_equal(dot_general(lhs, rhs, batched), lax.dot_general(lhs, rhs, batched))
    wide = dot_general(lhs[0], rhs[0], LAST_AND_FIRST, preferred_element_type=jnp.int32)
    assert wide.dtype == jnp.int32


def test_linear_layer(x64):
    """Leading axes are those of the input; the precision reaches the product."""
    layer = Dense(5, dtype=jnp.float64, precision=lax.Precision.HIGHEST)
    x = np.random.default_rng(0).normal(size=(2, 4, 3))
    variables, run = jax.jit(layer.init)(jax.random.key(0), x), jax.jit(layer.apply)
    kernel, bias = (np.asarray(variables["params"][name]) for name in ("kernel", "bias"))
    np.testing.assert_allclose(run(variables, x), x @ kernel + bias, rtol=OP_F64)
    assert "precision = [HIGHEST, HIGHEST]" in run.lower(variables, x).as_text()
