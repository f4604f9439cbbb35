"""RoIAlign's backward pass: against torch's, against autodiff of the same forward pass, and what it costs."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdet.ops import bilinear, multiscale_roi_align, roi_align
from tests.ops.cases import torchvision
from tests.tolerances import GRADIENT_F32, HAND_F32, OP_F64

SCALES = (1 / 4, 1 / 8, 1 / 16)
SHAPES = ((24, 32), (12, 16), (6, 8))  # of a 96x128 image
CHANNELS = 3

pool = partial(multiscale_roi_align, scales=SCALES, sampling_ratio=2, canonical_scale=32, canonical_level=3)


def case(boxes: int, dtype, *, size=(7, 7), seed: int = 0):
    """(pyramid, boxes on all its levels and over the border, cotangent)."""
    rng = np.random.default_rng(seed)
    corner = rng.uniform(-20, 110, (boxes, 2))
    side = np.exp(rng.uniform(np.log(3), np.log(100), (boxes, 2)))
    drawn = (
        [rng.normal(size=(*shape, CHANNELS)) for shape in SHAPES],
        np.concatenate([corner, corner + side], axis=1),
        rng.normal(size=(boxes, *size, CHANNELS)),
    )
    return jax.tree.map(lambda a: jnp.asarray(a.astype(dtype)), drawn)


def backward(function, features, boxes, cotangent):
    _, vjp = jax.vjp(lambda features: function(features, boxes), features)
    return vjp(cotangent)[0]


gradient_7x7 = jax.jit(partial(backward, lambda f, b: pool(f, b, 7)))
gradient_2x2 = jax.jit(partial(backward, lambda f, b: pool(f, b, 2)))


def assert_near(found, expected, dtype):
    bar = {"float32": GRADIENT_F32, "float64": OP_F64}[dtype]
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.shape(a) == np.shape(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=bar * np.abs(b).max(initial=0))


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_matches_torch(samples, x64):
    """MultiScaleRoIAlign's gradient in float64, over three levels and several chunks, the last of them overlapping."""
    tv = torchvision()
    import torch

    features, boxes, cotangent = case(70, "float64")
    leaves = [torch.tensor(np.array(level)).permute(2, 0, 1)[None].requires_grad_() for level in features]
    pooler = tv.ops.MultiScaleRoIAlign(["0", "1", "2"], 7, samples, canonical_scale=32, canonical_level=3)
    output = pooler({str(k): leaf for k, leaf in enumerate(leaves)}, [torch.tensor(np.array(boxes))], [(96, 128)])
    output.backward(torch.tensor(np.array(cotangent)).permute(0, 3, 1, 2))

    run = jax.jit(partial(backward, lambda f, b: pool(f, b, 7, sampling_ratio=samples)))
    found = run(features, boxes, cotangent)
    for level, leaf in zip(found, leaves, strict=True):
        expected = leaf.grad[0].permute(1, 2, 0).numpy()
        assert np.any(expected)
        assert_near(level, expected, "float64")


@pytest.mark.parametrize(("boxes", "samples"), [(0, 2), (1, 2), (32, 2), (33, 2), (100, 3)])
def test_is_what_autodiff_gives(boxes, samples, x64):
    """For numbers of boxes below, at and above the size of a chunk; `fun` is the forward pass without our rule."""
    assert bilinear.CHUNK == 32
    (features, *_), corners, cotangent = case(boxes, "float64", size=(2, 3))
    height, width, channels = features.shape
    x1, y1, x2, y2 = np.asarray(corners).T / 4
    along = jax.jit(
        partial(bilinear.samples_along, samples=samples, aligned=False, dtype=jnp.dtype("float64")), static_argnums=2
    )
    y = along(y1, y2, 2, extent=np.full(boxes, height, np.int32))
    x = along(x1, x2, 3, extent=np.full(boxes, width, np.int32))
    y = y._replace(low=np.asarray(y.low) * np.int32(width), high=np.asarray(y.high) * np.int32(width))

    def gradient(function, pixels, y, x, cotangent):
        output, vjp = jax.vjp(lambda pixels: function(height * width, pixels, y, x), pixels)
        return output, vjp(cotangent)[0]

    pixels = np.asarray(features).reshape(-1, channels)
    found, expected = (
        jax.jit(partial(gradient, function))(pixels, y, x, cotangent)
        for function in (bilinear.mean_of_samples, bilinear.mean_of_samples.fun)
    )
    assert np.any(expected[1]) == (boxes > 0)
    assert_near(found, expected, "float64")


@pytest.mark.parametrize("mapped", ["both", "features", "boxes"])
def test_vmap(mapped):
    """Of two images, of one image's boxes on two, of two sets of boxes on one."""
    one, other = case(40, "float32", size=(2, 2)), case(40, "float32", size=(2, 2), seed=1)
    axes = (None if mapped == "boxes" else 0, None if mapped == "features" else 0, 0)
    pairs = [(a, a) if axis is None else (a, b) for axis, a, b in zip(axes, one, other, strict=True)]
    args = [
        pair[0] if axis is None else jax.tree.map(lambda a, b: np.stack([a, b]), *pair)
        for axis, pair in zip(axes, pairs, strict=True)
    ]
    found = jax.jit(jax.vmap(gradient_2x2, in_axes=axes))(*args)
    expected = [gradient_2x2(*(pair[i] for pair in pairs)) for i in range(2)]
    assert_near(found, jax.tree.map(lambda a, b: np.stack([a, b]), *expected), "float32")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_boxes_that_are_none(bad):
    """They leave the gradient of the others alone; NaN leaves it exactly so."""
    features, boxes, cotangent = case(40, "float32")
    spoilt = np.array(boxes)
    spoilt[np.arange(0, 40, 4), np.arange(10) % 4] = bad
    found = gradient_7x7(features, spoilt, cotangent)
    assert all(np.isfinite(level).all() and np.any(level) for level in found)
    if np.isnan(bad):
        nothing = np.array(cotangent)
        nothing[::4] = 0
        assert_near(found, gradient_7x7(features, boxes, nothing), "float32")


def test_nothing_flows_beyond_the_extent():
    features, boxes, cotangent = case(40, "float32")
    extents = ((15, 20), (8, 10), (4, 5))
    found = jax.jit(partial(backward, lambda f, b: pool(f, b, 7, extents=extents)))(features, boxes, cotangent)
    found = [np.asarray(level) for level in found]
    cropped = [np.asarray(level)[:h, :w] for level, (h, w) in zip(features, extents, strict=True)]
    expected = gradient_7x7(cropped, boxes, cotangent)
    for level, inner, (h, w) in zip(found, expected, extents, strict=True):
        assert_near(level[:h, :w], inner, "float32")
        assert not np.any(level[h:])
        assert not np.any(level[:, w:])


def test_bfloat16_adds_up_in_float32():
    """600 times 1 on one pixel: in bfloat16 the sum would stop at 256."""
    features = np.zeros((4, 4, 2), jnp.bfloat16)
    boxes = np.ones((600, 4), np.float32)
    run = jax.jit(partial(backward, lambda f, b: roi_align(f, b, 1, sampling_ratio=1, aligned=True)))
    found = np.asarray(run(features, boxes, np.ones((600, 1, 1, 2), jnp.bfloat16)))
    assert found.dtype == jnp.bfloat16
    # aligned and without area, each samples (.5, .5): a quarter on each of four pixels
    np.testing.assert_allclose(found[:2, :2].astype(np.float32), 150, rtol=HAND_F32)
    assert not np.any(found[2:])


def test_second_derivative(x64):
    """The gradient is linear in the cotangent, so its own gradient is the forward pass."""
    features, boxes, cotangent = case(40, "float64", size=(2, 2))
    others = jax.tree.map(np.cos, features)

    def inner(cotangent):
        found = backward(lambda f, b: pool(f, b, 2), features, boxes, cotangent)
        return sum(jnp.vdot(a, b) for a, b in zip(found, others, strict=True))

    assert_near(jax.jit(jax.grad(inner))(cotangent), pool(others, boxes, 2), "float64")


def test_takes_no_memory_but_the_gradient():
    """And the updates of one chunk. The updates of all boxes at once would take 40 MB, autodiff as much again."""
    features = [jax.ShapeDtypeStruct((*shape, 64), np.float32) for shape in SHAPES]
    boxes, cotangent = (jax.ShapeDtypeStruct(shape, np.float32) for shape in ((200, 4), (200, 7, 7, 64)))
    compiled = gradient_7x7.lower(features, boxes, cotangent).compile()
    gradient = 4 * 64 * sum(h * w for h, w in SHAPES)
    chunk = 4 * 64 * bilinear.CHUNK * 7 * 7 * 16
    assert compiled.memory_analysis().temp_size_in_bytes < 1.2 * (gradient + chunk) < 10e6


@pytest.mark.ci  # a process of several devices; the tests above compare gradients on one device
def test_a_sharded_batch_stays_where_it_is():
    """Each of four devices pools its own images: the same gradients, and no word between devices."""
    program = """
        import sys
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import AxisType, NamedSharding, PartitionSpec
        from flaxdet.ops import multiscale_roi_align

        def step(features, boxes, cotangent):
            options = {"scales": (1 / 4, 1 / 8), "sampling_ratio": 2, "canonical_scale": 32, "canonical_level": 3}
            pool = lambda features: multiscale_roi_align(features, boxes, 3, **options)
            return jax.vjp(pool, features)[1](cotangent)[0]

        rng = np.random.default_rng(0)
        corner = rng.uniform(-5, 60, (4, 40, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(2, 60, (4, 40, 2))], axis=2)
        features = [rng.normal(size=(4, 16, 20, 2)), rng.normal(size=(4, 8, 10, 2))]
        arrays = features, boxes, rng.normal(size=(4, 40, 3, 3, 2))
        arrays = jax.tree.map(lambda a: a.astype(np.float32), arrays)
        expected = jax.jit(jax.vmap(step))(*arrays)
        sharding = NamedSharding(jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec("data"))
        compiled = jax.jit(jax.vmap(step)).lower(*jax.device_put(arrays, sharding)).compile()
        words = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
        assert not [word for word in words if word in compiled.as_text()]
        for found, one in zip(compiled(*jax.device_put(arrays, sharding)), expected, strict=True):
            assert found.sharding.is_equivalent_to(sharding, 4), found.sharding
            assert np.any(one)
            np.testing.assert_allclose(found, one, rtol=0, atol=float(sys.argv[1]))
        print("four shards agree")
    """
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", textwrap.dedent(program), str(GRADIENT_F32)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "four shards agree", done.stderr


@pytest.mark.parametrize("vmapped", [False, True])
def test_lowers_for_every_platform(vmapped):
    batch = (2,) if vmapped else ()
    run = partial(backward, lambda f, b: pool(f, b, 7))
    features = [jax.ShapeDtypeStruct((*batch, *shape, 4), jnp.bfloat16) for shape in SHAPES]
    boxes = jax.ShapeDtypeStruct((*batch, 100, 4), np.float32)
    cotangent = jax.ShapeDtypeStruct((*batch, 100, 7, 7, 4), jnp.bfloat16)
    function = jax.jit(jax.vmap(run) if vmapped else run)
    exported = jax.export.export(function, platforms=("cpu", "cuda", "tpu"))(features, boxes, cotangent)
    assert [aval.shape for aval in exported.out_avals] == [level.shape for level in features]
