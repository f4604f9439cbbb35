"""The pyramid and its extra levels against torchvision's; level_extent and mask_beyond by hand."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdet.convert import reference
from flaxdet.nn import BackboneWithFPN, FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7, ResNet
from flaxdet.nn.canvas import inside, level_extent, mask_beyond
from flaxdet.nn.fpn import level_name, upsample_nearest
from tests.drawn import drawn
from tests.tolerances import BATCH_STATS_F64, LAYERS_F32, STAGE_F64

CHANNELS = {"c3": 6, "c4": 10, "c5": 14}
WIDTH = 8


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def nchw(torch, x):
    return torch.tensor(np.asarray(x).transpose(0, 3, 1, 2).copy())


def nhwc(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        ((5, 7), (10, 14)),
        ((5, 7), (9, 13)),
        ((1, 1), (3, 2)),
        ((4, 3), (4, 3)),
        ((13, 25), (25, 49)),
        ((6, 5), (7, 11)),
    ],
)
def test_upsample_nearest_is_torchs(torch, size, shape):
    x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    expected = torch.nn.functional.interpolate(nchw(torch, x), size=shape, mode="nearest")
    np.testing.assert_array_equal(jax.jit(upsample_nearest, static_argnums=1)(x, shape), nhwc(expected))


def test_upsample_nearest_is_torchs_at_every_size(torch):
    """torch floors in float32, where i * (n / m) can fall short of a whole number."""
    for size in (*range(1, 34), 84, 167):
        for out in {2 * size - 1, 2 * size, size + 1, 3 * size}:
            x = np.arange(size, dtype=np.float32).reshape(1, 1, size, 1)
            expected = torch.nn.functional.interpolate(nchw(torch, x), size=(1, out), mode="nearest")
            np.testing.assert_array_equal(upsample_nearest(x, (1, out)), nhwc(expected), err_msg=f"{size} to {out}")


def stages(height: int, width: int, dtype=np.float64):
    rng = np.random.default_rng(0)
    sizes = [(-(-height // stride), -(-width // stride)) for stride in (8, 16, 32)]
    return {
        name: rng.normal(size=(2, *size, channels)).astype(dtype)
        for (name, channels), size in zip(CHANNELS.items(), sizes, strict=True)
    }


def pair(torch, extra, *, use_norm=False):
    """The same pyramid on both sides, with moved biases and BatchNorms: (ours, variables, theirs)."""
    fpn = reference.torchvision().ops.feature_pyramid_network
    torch.manual_seed(0)
    their_extra = fpn.LastLevelMaxPool() if extra is None else fpn.LastLevelP6P7(*extra)
    norm = torch.nn.BatchNorm2d if use_norm else None
    theirs = fpn.FeaturePyramidNetwork(list(CHANNELS.values()), WIDTH, their_extra, norm).double()
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            if tensor.dim() == 1:
                tensor.copy_(torch.rand_like(tensor) + (0.5 if "running_var" in name else 0.0))
    our_extra = LastLevelMaxPool() if extra is None else LastLevelP6P7(*extra, dtype=jnp.float64)
    ours = FeaturePyramidNetwork(WIDTH, our_extra, use_norm=use_norm, dtype=jnp.float64, precision="highest")
    params, stats = {}, {}
    for key, tensor in theirs.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        *path, leaf = key.split(".")
        if path[0] == "extra_blocks":
            at = params.setdefault("extra_blocks", {}).setdefault(path[1], {})
        else:
            part = "norm" if path[2] == "1" else "conv"
            tree = stats if leaf.startswith("running") else params
            at = tree.setdefault(f"{path[0]}_{path[1]}", {}).setdefault(part, {})
        value = tensor.numpy()
        if value.ndim == 4:
            at["kernel"] = jnp.asarray(value.transpose(2, 3, 1, 0))
        else:
            names = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
            at[names[leaf]] = jnp.asarray(value)
    return ours, {"params": params, "batch_stats": stats}, theirs


@pytest.mark.parametrize("size", [(64, 96), (72, 100)], ids=["even", "odd"])
@pytest.mark.parametrize(
    ("extra", "use_norm", "train"),
    [
        (None, False, False),
        (None, True, False),
        (None, True, True),
        ((WIDTH, WIDTH), False, False),
        ((14, WIDTH), False, False),
    ],
    ids=["pool", "norm", "norm in training", "P6 of P5", "P6 of C5"],
)
def test_pyramid_is_torchvisions(torch, x64, extra, use_norm, train, size):
    ours, variables, theirs = pair(torch, extra, use_norm=use_norm)
    inputs = stages(*size)
    expected = theirs.train(train)({name: nchw(torch, x) for name, x in inputs.items()})
    found, state = jax.jit(lambda v, x: ours.apply(v, x, bucket=size, train=train, mutable=["batch_stats"]))(
        variables, inputs
    )
    assert list(found) == ["p3", "p4", "p5", *(["pool"] if extra is None else ["p6", "p7"])]
    for (name, level), there in zip(found.items(), expected.values(), strict=True):
        there = nhwc(there)
        np.testing.assert_allclose(level, there, rtol=0, atol=STAGE_F64 * np.abs(there).max(), err_msg=name)
    if train:
        norm = theirs.inner_blocks[0][1]
        np.testing.assert_allclose(
            state["batch_stats"]["inner_blocks_0"]["norm"]["mean"], norm.running_mean, rtol=BATCH_STATS_F64
        )
        np.testing.assert_allclose(
            state["batch_stats"]["inner_blocks_0"]["norm"]["var"], norm.running_var, rtol=BATCH_STATS_F64
        )


@functools.partial(jax.jit, static_argnums=(0, 4))
def levels_in_training(fpn, variables, x, canvas, bucket):
    return fpn.apply(variables, x, canvas=canvas, bucket=bucket, train=True, mutable=["batch_stats"])


@pytest.mark.parametrize("extra", [LastLevelMaxPool(), LastLevelP6P7(WIDTH, WIDTH), LastLevelP6P7(14, WIDTH)])
@pytest.mark.parametrize("canvas", [(64, 96), pytest.param((96, 32), marks=pytest.mark.ci)])  # a second size
def test_canvas_is_the_crop(extra, canvas):
    """Levels inside a canvas don't see what the bucket holds beyond it."""
    ours = FeaturePyramidNetwork(WIDTH, extra, use_norm=True)
    inputs = stages(128, 128, np.float32)
    cropped = {
        name: x[:, : -(-canvas[0] // stride), : -(-canvas[1] // stride)]
        for stride, (name, x) in zip((8, 16, 32), inputs.items(), strict=True)
    }
    variables = drawn(jax.eval_shape(lambda x: ours.init(jax.random.key(0), x, bucket=canvas), cropped))
    alone, alone_state = levels_in_training(ours, variables, cropped, None, canvas)
    found, state = levels_in_training(ours, variables, inputs, np.asarray([canvas] * 2, np.int32), (128, 128))
    for name, level in alone.items():
        inner = np.asarray(found[name])[:, : level.shape[1], : level.shape[2]]
        np.testing.assert_allclose(inner, level, rtol=0, atol=LAYERS_F32, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=LAYERS_F32), state, alone_state)


def test_max_pool_level_is_subsampling():
    """torchvision pools with a kernel of 1: every second cell, not the largest of two."""
    p5 = jnp.arange(15, dtype=jnp.float32).reshape(1, 3, 5, 1)
    out = LastLevelMaxPool().apply({}, {"p4": p5 + 1, "p5": p5}, {}, canvas=None, bucket=(96, 160))
    np.testing.assert_array_equal(np.asarray(out["pool"])[0, :, :, 0], [[0, 2, 4], [10, 12, 14]])


def test_level_names():
    names = [level_name(name) for name in ("c2", "c5", "c10", "c", "conv4", "0", "feat")]
    assert names == ["p2", "p5", "p10", "c", "conv4", "0", "feat"]


def test_backbone_reads_the_stages_it_is_told():
    model = BackboneWithFPN(ResNet(18), FeaturePyramidNetwork(WIDTH, LastLevelP6P7(WIDTH, WIDTH)), ("c4", "c5"))
    assert model.out_channels == WIDTH
    levels = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x)[0], np.zeros((1, 64, 96, 3), np.float32)
    )
    assert {name: level.shape[1:3] for name, level in levels.items()} == {
        "p4": (4, 6),
        "p5": (2, 3),
        "p6": (1, 2),
        "p7": (1, 1),
    }


@pytest.mark.parametrize(
    ("bucket", "shape", "stride"),
    [
        ((128, 96), (128, 96), 1),
        ((128, 96), (32, 24), 4),
        ((800, 1088), (13, 17), 64),
        ((800, 1088), (7, 9), 128),
        ((64, 1024), (1, 16), 64),
        ((32, 256), (1, 2), 128),  # the rows' one cell could be of any stride from 32
    ],
)
def test_level_extent(bucket, shape, stride):
    canvas = np.asarray([[32, 96], [64, 32], [31, 1]], np.int32)
    extent = level_extent(jnp.asarray(canvas), bucket, shape)
    np.testing.assert_array_equal(extent, -(-canvas // stride))
    assert extent.dtype == jnp.int32
    assert level_extent(None, bucket, shape) is None


@pytest.mark.parametrize("shape", [(43, 32), (32, 20), (65, 48), (129, 96), (0, 1)])
def test_level_extent_of_another_stride(shape):
    """A stride of 3, a layer without padding, upsampled maps: what share the canvas has is not known."""
    canvas = jnp.asarray([[32, 32]], jnp.int32)
    with pytest.raises(ValueError, match="has no power-of-two stride"):
        level_extent(canvas, (128, 96), shape)
    assert level_extent(None, (128, 96), shape) is None


def test_mask_beyond():
    x = jnp.asarray(np.ones((2, 3, 4, 2), jnp.bfloat16))
    extent = jnp.asarray([[2, 3], [3, 1]], jnp.int32)
    run, run_inside = jax.jit(mask_beyond), jax.jit(inside, static_argnums=1)
    found = run(x, extent)
    assert found.dtype == x.dtype
    expected = np.zeros((2, 3, 4))
    expected[0, :2, :3] = expected[1, :, :1] = 1
    np.testing.assert_array_equal(run_inside(extent, (3, 4)), expected.astype(bool))
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.broadcast_to(expected[..., None], x.shape))
    assert mask_beyond(x, None) is x
    rubbish = np.where(expected[..., None], x, np.asarray(np.nan, x.dtype))
    assert np.isfinite(np.asarray(run(rubbish, extent), np.float32)).all()
    grad = jax.jit(jax.grad(lambda x: jnp.sum(mask_beyond(x, extent).astype(jnp.float32))))(rubbish)
    np.testing.assert_array_equal(np.asarray(grad, np.float32), np.broadcast_to(expected[..., None], x.shape))
