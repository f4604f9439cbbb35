"""The convolution's quick forms against lax's own, values and gradients, and where each is taken."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from flaxdet.nn.conv.dispatch import conv_general_dilated
from flaxdet.xla.routes import routes_for
from tests.tolerances import CONV_BF16, OP_F64, WINOGRAD_F32

CASES = {
    "1x1": (1, 1, (3, 5), 1, (6, 9)),
    "1x1 to fewer channels": (1, 1, (5, 3), 1, (6, 9)),
    "1x1 of stride 2": (1, 2, (3, 5), 1, (6, 9)),
    "3x3": (3, 1, (8, 12), 1, (6, 9)),
    "3x3 of stride 2": (3, 2, (12, 8), 1, (6, 9)),
    "groups": (3, 1, (4, 8), 2, (6, 9)),
    "Winograd, even width": (3, 1, (64, 72), 1, (30, 40)),
    "Winograd, odd width": (3, 1, (72, 64), 1, (42, 29)),
    "Winograd, two columns over": (3, 1, (64, 64), 1, (40, 30)),
    "Winograd, one column": (3, 1, (64, 64), 1, (1200, 1)),
    "few outputs": (3, 1, (40, 4), 1, (6, 9)),
    "one output, one row": (3, 1, (10, 1), 1, (1, 9)),
    "3x3, one column": (3, 1, (8, 12), 1, (6, 1)),
    "7x7 of stride 2": (7, 2, (3, 5), 1, (8, 10)),
    "7x7 of stride 2, odd sides": (7, 2, (3, 5), 1, (9, 7)),
    "7x7 of stride 2, one pixel": (7, 2, (3, 5), 1, (1, 1)),
    "7x7 of stride 2, more channels": (7, 2, (5, 3), 1, (9, 7)),
}
# NHWC maps and HWIO kernels, as flax.linen.Conv asks for them
LAYOUT = ("NHWC", "HWIO", "NHWC")
PLAIN_3X3 = {"window_strides": (1, 1), "padding": ((1, 1), (1, 1)), "dimension_numbers": LAYOUT}


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def values_and_gradients(function, stride, padding, groups, x, kernel, weights):
    """Values without a gradient, for which ``function`` may take another form; then a loss and its gradients."""
    options = {"window_strides": (stride,) * 2, "padding": ((padding,) * 2,) * 2, "feature_group_count": groups}
    convolve = functools.partial(function, dimension_numbers=LAYOUT, **options)

    def loss(x, kernel):
        return jnp.sum(weights * jnp.sin(convolve(x, kernel)))

    return convolve(x, kernel), jax.value_and_grad(loss, argnums=(0, 1))(x, kernel)


@pytest.mark.parametrize(
    ("case", "platform"),
    [
        *((case, "cpu") for case in CASES),
        ("1x1", "gpu"),
        ("1x1", "tpu"),
        ("1x1 of stride 2", "gpu"),
        ("7x7 of stride 2", "gpu"),
        ("7x7 of stride 2", "tpu"),
        # other sizes of the same form
        *(pytest.param(case, "tpu", marks=pytest.mark.ci) for case in CASES if case.startswith("7x7 of stride 2,")),
    ],
)
def test_values_and_gradients(case, platform, x64):
    size, stride, (channels, out), groups, shape = CASES[case]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *shape, channels))
    kernel = rng.normal(size=(size, size, channels // groups, out))
    weights = rng.normal(size=(2, *(-(-side // stride) for side in shape), out))
    arguments = stride, size // 2, groups, x, kernel, weights
    expected = values_and_gradients(lax.conv_general_dilated, *arguments)
    with routes_for(platform):
        found = values_and_gradients(conv_general_dilated, *arguments)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=OP_F64, atol=OP_F64 * np.abs(b).max() * 100)


def maps(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(jnp.dtype(dtype))


def convolutions(x: np.ndarray, kernel: np.ndarray, platform: str = "cpu", **options) -> int:
    """How many XLA is asked for."""
    function = functools.partial(conv_general_dilated, **PLAIN_3X3, **options)
    lowered = jax.jit(function).trace(x, kernel).lower(lowering_platforms=(platform,))
    return lowered.as_text().count("stablehlo.convolution")


def test_winograd_on_cpus_alone_for_large_maps():
    x, kernel = maps(1, 30, 40, 64), maps(3, 3, 64, 64)
    assert convolutions(x, kernel) == 6
    assert [convolutions(x, kernel, platform) for platform in ("cuda", "tpu")] == [1, 1]
    assert convolutions(x[:, :29], kernel) == 1
    assert convolutions(x[..., :63], kernel[:, :, :63]) == 1
    assert convolutions(x, kernel[..., :63]) == 1
    assert convolutions(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)) == 1


def test_few_outputs_by_a_product_on_cpus_alone():
    x, kernel = maps(1, 25, 32, 64), maps(3, 3, 64, 7)
    assert convolutions(x, kernel) == 0
    assert [convolutions(x, kernel, platform) for platform in ("cuda", "tpu")] == [1, 1]
    assert convolutions(x[..., :63], kernel[:, :, :63]) == 1
    assert convolutions(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)) == 1


def test_stem_over_cells():
    x, kernel = maps(1, 32, 33, 3), maps(7, 7, 3, 64)
    stem = functools.partial(
        conv_general_dilated, window_strides=(2, 2), padding=((3, 3), (3, 3)), dimension_numbers=LAYOUT
    )

    def kernels(x: np.ndarray, kernel: np.ndarray, platform: str = "cpu") -> list[str]:
        text = jax.jit(stem).trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
        lines = [line for line in text.splitlines() if "stablehlo.convolution" in line]
        return [line.split("tensor<")[2].split(">")[0] for line in lines]

    assert kernels(x, kernel) == ["4x4x12x64xf32"]
    assert kernels(x, kernel, "cuda") == ["7x7x3x64xf32"]
    assert kernels(x, kernel, "tpu") == ["4x3x24x128xf32"]
    x, kernel = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    assert kernels(x, kernel) == kernels(x, kernel, "cuda") == ["7x7x3x64xbf16"]
    assert kernels(x, kernel, "tpu") == ["4x3x24x128xbf16"]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other backends take the gradient of one convolution")
def test_gradient_of_a_kernel_by_columns():
    """Three convolutions for the kernel and one for the map; of many images the plain two."""

    def gradients(x: jax.ShapeDtypeStruct, kernel: jax.ShapeDtypeStruct) -> int:
        def loss(x, kernel):
            return jnp.sum(conv_general_dilated(x, kernel, **PLAIN_3X3))

        text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, kernel).as_text()
        return text.count("stablehlo.convolution")  # the sum's gradient needs no value

    kernel = jax.ShapeDtypeStruct((3, 3, 64, 64), jnp.float32)
    assert gradients(jax.ShapeDtypeStruct((2, 20, 28, 64), jnp.float32), kernel) == 4
    assert gradients(jax.ShapeDtypeStruct((5, 20, 28, 64), jnp.float32), kernel) == 2


def test_winograd_rounds_little_more_than_the_plain_sum(x64):
    x, kernel = maps(1, 40, 50, 256, dtype="float64"), maps(3, 3, 256, 256, dtype="float64")
    run_plain, run_quick = (
        jax.jit(functools.partial(function, **PLAIN_3X3))
        for function in (lax.conv_general_dilated, conv_general_dilated)
    )
    truth = np.asarray(run_plain(x, kernel))
    small = x.astype(np.float32), kernel.astype(np.float32)
    plain, quick = (
        np.sqrt(np.mean((np.asarray(function(*small), np.float64) - truth) ** 2)) for function in (run_plain, run_quick)
    )
    assert 0 < quick < WINOGRAD_F32 * plain


@pytest.mark.parametrize("shape", [(1, 30, 41, 64), (1, 5, 6, 64)], ids=["Winograd", "by columns"])
def test_forward_mode(shape, x64):
    x, kernel = maps(*shape, dtype="float64"), maps(3, 3, 64, 64, dtype="float64")
    found, expected = (
        jax.jit(functools.partial(jax.jvp, functools.partial(function, **PLAIN_3X3)))(
            (x, kernel), (np.cos(x), np.sin(kernel))
        )
        for function in (conv_general_dilated, lax.conv_general_dilated)
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=OP_F64, atol=OP_F64 * np.abs(b).max() * 100)


def test_channels_of_bfloat16_are_aligned_on_gpus():
    """Of tensor cores, whose sums are float32: the result of the channels asked for, and their gradients."""
    x, kernel = maps(1, 6, 9, 16, dtype="bfloat16"), maps(3, 3, 16, 5, dtype="bfloat16")

    @jax.jit
    def run(x, kernel):
        y, pull = jax.vjp(functools.partial(conv_general_dilated, **PLAIN_3X3), x, kernel)
        return y, pull(jnp.cos(y))

    expected = run(x, kernel)
    with routes_for("gpu"):
        found = run(x, kernel)
        shapes = str(jax.make_jaxpr(functools.partial(conv_general_dilated, **PLAIN_3X3))(x, kernel))
    assert "bf16[1,6,9,8]" in shapes
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == jnp.bfloat16
        assert a.shape == b.shape
        a, b = (np.asarray(each, np.float64) for each in (a, b))
        np.testing.assert_allclose(a, b, rtol=CONV_BF16, atol=CONV_BF16 * np.abs(b).max())
