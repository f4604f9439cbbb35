"""The override of the routes: taken by every choice, kept apart by jit, and gone when it ends."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdet.nn.conv.dispatch import conv_general_dilated
from flaxdet.nn.dot import product
from flaxdet.xla.barriers import save_for_backward
from flaxdet.xla.routes import by_platform, platform, routes_for
from tests.tolerances import STAGE_F32


def test_without_an_override_it_is_the_default_backend():
    assert platform() == jax.default_backend()
    with routes_for("tpu"):
        assert platform() == "tpu"
        with routes_for(None):
            assert platform() == jax.default_backend()
        with routes_for("gpu"):
            assert platform() == "gpu"
        assert platform() == "tpu"
    assert platform() == jax.default_backend()


@pytest.mark.parametrize("name", ["cuda", "CPU", ""])
def test_an_unknown_platform_is_refused(name):
    with pytest.raises(ValueError, match=f"one of cpu, gpu, tpu, or None, got '{name}'"):
        routes_for(name)


def routed(x):
    return by_platform(x, cpu=lambda x: x + 1, gpu=lambda x: x + 2, default=lambda x: x + 3)


def test_jit_keeps_one_program_a_route():
    """The same function, called in turn: a plain context variable would find the first program again."""
    jitted = jax.jit(routed)
    x = jnp.float32(0)
    here = {"cpu": 1, "gpu": 2}.get(jax.default_backend(), 3)
    for _ in range(2):
        assert jitted(x) == here
        for name, value in (("cpu", 1), ("gpu", 2), ("tpu", 3)):
            with routes_for(name):
                assert jitted(x) == value
    assert jitted._cache_size() == 4


@pytest.mark.parametrize(("lowered_for", "added"), [("cpu", 1), ("cuda", 2), ("rocm", 2), ("tpu", 3)])
def test_without_an_override_the_platform_lowered_for_decides(lowered_for, added):
    exported = jax.export.export(jax.jit(routed), platforms=[lowered_for])(jax.ShapeDtypeStruct((), jnp.float32))
    assert f"dense<{added}.000000e+00>" in exported.mlir_module()


def test_inner_functions_take_the_override_of_the_outer_trace():
    inner = jax.jit(lambda x: x * 2 if platform() == "gpu" else x * 3)
    outer = jax.jit(lambda x: inner(x) + 1)
    x = jnp.float32(1)
    assert inner(x) == (3 if platform() != "gpu" else 2)  # traced before, without the override
    with routes_for("gpu"):
        assert outer(x) == 3
    with routes_for("tpu"):
        assert outer(x) == 4


def test_an_override_is_the_threads_own():
    import threading

    found = []
    with routes_for("gpu"):
        thread = threading.Thread(target=lambda: found.append(platform()))
        thread.start()
        thread.join()
    assert found == [jax.default_backend()]


def convolution(x, kernel):
    layout = ("NHWC", "HWIO", "NHWC")
    return conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=layout)


def test_the_layers_choices_follow():
    """What a GPU's program holds is decided here, on any device."""
    x, kernel = jnp.ones((1, 64, 64, 64), jnp.float32), jnp.ones((3, 3, 64, 64), jnp.float32)

    def loss(x, y):
        return jnp.sum(save_for_backward(product(x, y)))

    def texts(name):
        with routes_for(name):
            conv = str(jax.make_jaxpr(convolution)(x, kernel))
            gradient = str(jax.make_jaxpr(jax.grad(loss))(jnp.ones((4, 3)), jnp.ones((3, 2))))
        return conv.count("conv_general_dilated["), "optimization_barrier" in gradient

    assert texts("cpu") == (6, True)  # F(4, 3): six products
    for other in ("gpu", "tpu"):
        assert texts(other) == (1, False)


def test_the_same_numbers():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, 40, 40, 64), np.float32))
    kernel = jnp.asarray(rng.standard_normal((3, 3, 64, 64), np.float32))
    run = jax.jit(convolution)
    results = []
    for name in ("cpu", "gpu"):
        with routes_for(name):
            results.append(np.asarray(run(x, kernel)))
    assert not np.array_equal(*results)  # the routes are two
    np.testing.assert_allclose(*results, rtol=0, atol=STAGE_F32 * np.abs(results[1]).max())
