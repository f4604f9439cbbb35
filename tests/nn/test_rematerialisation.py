"""What lies between two convolutions is computed again for the gradient on CPUs: the same numbers from less memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxdet
from flaxdet.models.fcos_head import FCOSHead
from flaxdet.models.roi_heads import FastRCNNConvFCHead
from flaxdet.nn import ResNet, resnet
from flaxdet.xla import routes
from flaxdet.xla.barriers import save_for_backward
from tests.drawn import drawn
from tests.tolerances import OP_F64

EXTENTS = np.asarray([[6, 4], [5, 7]], np.int32)


def parts(dtype):
    """Each module that recomputes, with its inputs."""
    x = jax.ShapeDtypeStruct((2, 32, 64, 3), dtype)
    levels = {"p3": jax.ShapeDtypeStruct((2, 6, 7, 64), dtype), "p4": jax.ShapeDtypeStruct((2, 3, 4, 64), dtype)}
    extents = {"p3": EXTENTS, "p4": (EXTENTS + 1) // 2}
    rois, real = jax.ShapeDtypeStruct((5, 3, 3, 8), dtype), np.arange(5) < 4
    canvas = np.asarray([[32, 64], [32, 32]], np.int32)
    head = FastRCNNConvFCHead((8, 3, 3), (8, 12, 8), (10,), use_norm=True, dtype=dtype)
    return {
        "body": (ResNet(50, dtype=dtype), (x,), {"canvas": canvas, "train": True}),
        "frozen body": (ResNet(50, frozen_bn=True, dtype=dtype), (x,), {"train": True}),
        "FCOS head": (FCOSHead(64, 1, 5, dtype=dtype), (levels, extents), {}),
        "FCOS head without convolutions": (FCOSHead(64, 1, 5, num_convs=0, dtype=dtype), (levels, extents), {}),
        "box head": (head, (rois,), {"train": True, "mask": real}),
    }


def gradient(module, kwargs):
    """A function of variables and inputs: outputs, new statistics, and the gradient of parameters and inputs."""

    def loss(params, rest, *args):
        outputs, new = module.apply({"params": params, **rest}, *args, **kwargs, mutable=["batch_stats"])
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(outputs)), (outputs, new)

    def run(params, rest, *args):
        return jax.value_and_grad(loss, argnums=(0, 2), has_aux=True, allow_int=True)(params, rest, *args)

    return jax.jit(run, compiler_options=flaxdet.compiler_options(jnp.float64))


MARKS: dict[str, list[pytest.MarkDecorator]] = {
    "body": [pytest.mark.release],  # parity/test_losses.py has the gradients of a whole v2 beside torchvision's
    "frozen body": [pytest.mark.release],
    "FCOS head": [pytest.mark.ci],  # the smallest, the head without convolutions, runs always
    "box head": [pytest.mark.ci],
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, [])) for name in parts(jnp.float32)])
def test_same_numbers(name, x64, monkeypatch):
    for depth in (18, 50):
        monkeypatch.setitem(resnet.STAGE_SIZES, depth, (1, 1, 1, 1))
    module, args, kwargs = parts(jnp.float64)[name]
    variables = drawn(jax.eval_shape(lambda *a: module.init(jax.random.key(0), *a, **kwargs), *args))
    params, rest = variables["params"], {key: value for key, value in variables.items() if key != "params"}
    rng = np.random.default_rng(0)
    args = jax.tree.map(
        lambda a: jnp.asarray(rng.normal(size=a.shape)) if isinstance(a, jax.ShapeDtypeStruct) else a, args
    )
    found = gradient(module, kwargs).trace(params, rest, *args)
    with monkeypatch.context() as other:  # of the choices, only that which falls when the program is traced
        other.setattr(routes, "platform", lambda: "gpu")
        plain = gradient(module, kwargs).trace(params, rest, *args)
    # the FCOS head without convolutions has nothing to normalise, but its predictions are recomputed all the same
    assert ("remat" in str(found.jaxpr), "remat" in str(plain.jaxpr)) == (True, False)
    found, expected = found.lower().compile()(params, rest, *args), plain.lower().compile()(params, rest, *args)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(b.dtype, jnp.floating):
            np.testing.assert_allclose(a, b, rtol=0, atol=OP_F64 * max(np.linalg.norm(b), 1))


def test_save_for_backward_is_the_identity():
    x, tangent = jnp.asarray([1.0, -2.0]), jnp.asarray([3.0, 5.0])
    primal, moved = jax.jvp(save_for_backward, (x,), (tangent,))
    np.testing.assert_array_equal(primal, x)
    np.testing.assert_array_equal(moved, tangent)
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(save_for_backward(x) ** 2))(x), 2 * x)
    assert "optimization_barrier" not in str(jax.make_jaxpr(save_for_backward)(x))
    assert (
        str(jax.make_jaxpr(jax.grad(lambda x: jnp.sum(save_for_backward(x) ** 2)))(x)).count("optimization_barrier")
        >= 2
    )


@pytest.mark.parametrize("part", [pytest.param("FCOS head", marks=pytest.mark.release), "box head"])
def test_takes_less_memory(part, monkeypatch):
    """Of the compiled gradient, where maps are large enough to count."""
    if part == "FCOS head":
        module, args, kwargs = (
            FCOSHead(64, 1, 5),
            ({"p3": jax.ShapeDtypeStruct((2, 40, 56, 64), jnp.float32)}, None),
            {},
        )
    else:
        module = FastRCNNConvFCHead((32, 7, 7), (32, 32, 32), (16,), use_norm=True)
        args, kwargs = (jax.ShapeDtypeStruct((256, 7, 7, 32), jnp.float32),), {"train": True}
    variables = jax.eval_shape(lambda *a: module.init(jax.random.key(0), *a, **kwargs), *args)

    def pull_back(params, rest, *args):
        def loss(params):
            outputs, _ = module.apply({"params": params, **rest}, *args, **kwargs, mutable=["batch_stats"])
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(outputs))

        return jax.grad(loss)(params)

    def temporaries() -> int:
        jitted = jax.jit(lambda *a: pull_back(*a), compiler_options=options)
        rest = {key: value for key, value in variables.items() if key != "params"}
        return jitted.lower(variables["params"], rest, *args).compile().memory_analysis().temp_size_in_bytes

    options = flaxdet.compiler_options()
    found = temporaries()
    monkeypatch.setattr(routes, "platform", lambda: "gpu")
    plain = temporaries()
    assert found < 0.8 * plain, (found, plain)  # .64 and .67
