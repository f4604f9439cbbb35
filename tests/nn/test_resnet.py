"""The ResNet body against torchvision's: every depth by its shapes, one by its numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdet.convert import reference
from flaxdet.convert.rules import rules
from flaxdet.nn import ResNet
from tests.drawn import drawn
from tests.tolerances import BATCH_STATS_F64, STAGE_F64

STAGES = ("c2", "c3", "c4", "c5")


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def abstract(model: ResNet, size=(64, 96), batch: int = 1):
    return jax.eval_shape(model.init, jax.random.key(0), np.zeros((batch, *size, 3), model.dtype))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("depth", [18, 50, *(pytest.param(depth, marks=pytest.mark.ci) for depth in (34, 101, 152))])
def test_tensors_are_torchvisions(torch, depth, frozen):
    tv = reference.torchvision()
    norm = tv.ops.misc.FrozenBatchNorm2d if frozen else torch.nn.BatchNorm2d
    with torch.device("meta"):
        theirs = getattr(tv.models, f"resnet{depth}")(norm_layer=norm).state_dict()
    expected = {key: tuple(tensor.shape) for key, tensor in theirs.items() if not key.startswith("fc.")}
    body = ResNet(depth, frozen_bn=frozen)
    assert {row.key: row.shape for row in rules(body, abstract(body))} == expected


@pytest.mark.parametrize(
    ("depth", "size"),
    [
        *(pytest.param(depth, (64, 96), marks=pytest.mark.ci) for depth in (34, 101, 152)),
        (18, (64, 96)),
        (50, (64, 96)),
        (18, (61, 45)),
        (18, (1, 1)),
        (50, (61, 45)),
    ],
)
def test_stages_have_torchvisions_sizes(depth, size):
    model = ResNet(depth)
    stages = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x)[0], np.zeros((2, *size, 3), np.float32)
    )
    assert tuple(stages) == STAGES == tuple(stage.name for stage in model.stages)
    for found, stage in zip(stages.values(), model.stages, strict=True):
        assert found.shape == (2, *(-(-side // stage.stride) for side in size), stage.channels)


def test_resnet18_in_training_is_torchvisions(torch, x64):
    """Every stage in float64, and the running statistics, 20 BatchNorms deep. In evaluation: tests/parity."""
    tv = reference.torchvision()
    torch.manual_seed(0)
    theirs = tv.models.resnet18().double().train()
    with torch.no_grad():
        for module in theirs.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.3)
                module.running_mean.normal_(std=0.3)
                module.running_var.uniform_(0.5, 1.5)
    model = ResNet(18, dtype=jnp.float64, precision="highest")
    variables = from_resnet(model, theirs.state_dict())

    nodes = {f"layer{i - 1}": f"c{i}" for i in range(2, 6)}
    body = tv.models._utils.IntermediateLayerGetter(theirs, nodes)
    x = np.random.default_rng(0).normal(size=(2, 61, 75, 3))
    with torch.no_grad():
        expected = body(torch.tensor(x.transpose(0, 3, 1, 2).copy()))
    found, state = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))(variables, x)
    for name in STAGES:
        stage = expected[name].numpy().transpose(0, 2, 3, 1)
        np.testing.assert_allclose(found[name], stage, rtol=0, atol=STAGE_F64 * np.abs(stage).max(), err_msg=name)
    moved = from_resnet(model, theirs.state_dict())["batch_stats"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=BATCH_STATS_F64, atol=BATCH_STATS_F64),
        state["batch_stats"],
        moved,
    )


def from_resnet(model, state_dict):
    """Variables of a body from a classifier's state_dict, by the converter's own table."""
    variables = {"params": {}, "batch_stats": {}}
    for row in rules(model, abstract(model)):
        if row.collection is not None:
            *path, leaf = row.path
            at = variables[row.collection]
            for name in path:
                at = at.setdefault(name, {})
            at[leaf] = jnp.asarray(row.layout.to_flax(state_dict[row.key].numpy()))
    return variables


@pytest.mark.parametrize("option", ["frozen_bn", "freeze_bn"])
def test_frozen_statistics_in_training(option):
    """FrozenBatchNorm, and live BatchNorm that is told to hold still: training changes nothing."""
    model = ResNet(18, **{option: True})
    x = np.random.default_rng(1).normal(size=(1, 32, 32, 3)).astype(np.float32)
    variables = drawn(abstract(model))
    assert ("bn1" in variables["params"]) == (option == "freeze_bn")
    run = jax.jit(lambda v, x, train: model.apply(v, x, train=train, mutable=["batch_stats"]), static_argnums=2)
    (trained, state), (evaluated, _) = run(variables, x, True), run(variables, x, False)
    jax.tree.map(np.testing.assert_array_equal, trained, evaluated)
    jax.tree.map(np.testing.assert_array_equal, state["batch_stats"], variables["batch_stats"])


@pytest.mark.release  # tests/models/test_losses_invariance.py trains whole detectors in a bucket
def test_bucket_in_training(x64):
    """In a bucket of 96x96 every stage is that in 64x64, inside the canvases of 64x32 and 32x64.

    In evaluation, and against no canvas at all: tests/parity/test_invariance.py; in training: test_losses.py there.
    """
    model = ResNet(18, dtype=jnp.float64)
    x = np.random.default_rng(0).normal(size=(2, 64, 64, 3))
    canvases = np.asarray([[64, 32], [32, 64]], np.int32)
    for image, (rows, columns) in zip(x, canvases, strict=True):
        image[rows:] = image[:, columns:] = 0
    variables = drawn(abstract(model))
    run = jax.jit(lambda x: model.apply(variables, x, canvas=canvases, train=True, mutable=["batch_stats"]))
    (small, small_state), (found, state) = run(x), run(np.pad(x, ((0, 0), (0, 32), (0, 32), (0, 0))))
    for i, (name, stage) in enumerate(small.items(), start=2):
        bar = STAGE_F64 * np.abs(stage).max()
        for image, expected, (rows, columns) in zip(found[name], stage, canvases >> i, strict=True):
            inside = slice(rows), slice(columns)
            np.testing.assert_allclose(image[inside], expected[inside], rtol=0, atol=bar, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=BATCH_STATS_F64), state, small_state)


def test_unknown_depth():
    with pytest.raises(ValueError, match=r"depth should be one of \[10, 18, 34, 50, 101, 152\], got 20"):
        ResNet(20)


def test_dtypes():
    """bfloat16 computes and float32 stores, unless told otherwise."""
    for options, stored in (({}, jnp.float32), ({"param_dtype": jnp.bfloat16}, jnp.bfloat16)):
        model = ResNet(50, dtype=jnp.bfloat16, **options)
        stages, variables = jax.eval_shape(
            lambda x, model=model: model.init_with_output(jax.random.key(0), x), np.zeros((1, 64, 64, 3), np.float32)
        )
        assert {leaf.dtype for leaf in stages.values()} == {jnp.dtype(jnp.bfloat16)}
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(stored)}
