"""``remat`` of the ResNet: the same variables, outputs and gradients from less memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxdet
from flaxdet.nn import ResNet, resnet
from tests.drawn import drawn
from tests.tolerances import OP_F64

# XLA:CPU merges what is computed twice, unless told to heed the barriers between the two.
COMPILER_OPTIONS = flaxdet.compiler_options(jnp.float64)


@pytest.fixture
def short(monkeypatch):
    """Fewer blocks of either kind, which compile in less time."""
    for depth in (18, 50):
        monkeypatch.setitem(resnet.STAGE_SIZES, depth, (2, 1, 1, 1))


def bodies(depth: int, **options):
    return ResNet(depth, **options), ResNet(depth, remat=True, **options)


def shapes(model, size=(64, 64)):
    """Abstract variables and pixels."""
    x = jax.ShapeDtypeStruct((2, *size, 3), model.dtype)
    return jax.eval_shape(model.init, jax.random.key(0), x), x


def loss_of(model):
    def loss(params, batch_stats, x, canvas, train):
        variables = {"params": params, "batch_stats": batch_stats}
        stages, updates = model.apply(variables, x, canvas=canvas, train=train, mutable=["batch_stats"])
        return sum(jnp.mean(jnp.square(stage)) for stage in stages.values()), (stages, updates)

    return loss


def gradient(model, **options):
    return jax.jit(jax.value_and_grad(loss_of(model), has_aux=True), static_argnums=4, **options)


@pytest.mark.parametrize("frozen", [False, True])
def test_variables_have_the_same_names(frozen):
    plain, remat = (shapes(model)[0] for model in bodies(50, frozen_bn=frozen))
    assert remat == plain


@pytest.mark.ci  # the test above shows that the variables have the same names
def test_the_same_key_gives_the_same_values(short):
    plain, remat = (
        jax.jit(model.init, compiler_options={"xla_backend_optimization_level": 0})(
            jax.random.key(3), jnp.zeros((1, 32, 32, 3), jnp.float32)
        )
        for model in bodies(18)
    )
    jax.tree.map(np.testing.assert_array_equal, plain, remat)


@pytest.mark.parametrize(
    ("depth", "train", "canvas", "options"),
    [
        pytest.param(50, True, [[32, 64], [64, 32]], {}, marks=pytest.mark.release),
        (18, True, None, {"freeze_bn": True}),
    ],
)
@pytest.mark.ci  # test_rematerialisation has the numbers of smaller parts
def test_same_numbers(depth, train, canvas, options, x64, short):
    """Outputs, running statistics and the gradient of every parameter; also where XLA really computes them twice."""
    plain, remat = bodies(depth, dtype=jnp.float64, **options)
    abstract, x = shapes(plain, (64, 64) if canvas else (32, 32))
    variables, x = drawn(abstract), jax.random.normal(jax.random.key(1), x.shape, x.dtype)
    canvas = None if canvas is None else jnp.asarray(canvas, jnp.int32)
    args = variables["params"], variables["batch_stats"], x, canvas, train
    expected, found = gradient(plain)(*args), gradient(remat, compiler_options=COMPILER_OPTIONS)(*args)
    assert jax.tree.structure(found) == jax.tree.structure(expected)

    def same(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=OP_F64 * np.linalg.norm(b))

    jax.tree.map(same, found, expected)


def size_of(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.ci  # traces whole ResNet-50s
def test_keeps_less_for_the_gradient():
    """Of a ResNet-50 on two images of 320x448, besides the parameters: 203 MB of 845."""
    kept = []
    for model in bodies(50):
        variables, x = shapes(model, (320, 448))

        def pull_back(variables, x, model=model):
            loss = loss_of(model)
            return jax.vjp(lambda p: loss(p, variables["batch_stats"], x, None, True)[0], variables["params"])[1]

        kept.append(size_of(jax.eval_shape(pull_back, variables, x)) - size_of(variables["params"]))
    assert kept[1] < kept[0] / 4, kept


@pytest.mark.release  # test_keeps_less_for_the_gradient compiles nothing
def test_takes_less_memory():
    plain, remat = (
        gradient(model, compiler_options=COMPILER_OPTIONS)
        .lower(variables["params"], variables["batch_stats"], x, None, True)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for model in bodies(18)
        for variables, x in [shapes(model, (128, 128))]
    )
    assert remat < 0.8 * plain, (remat, plain)
