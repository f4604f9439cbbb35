"""RoIAlign against golden results of torchvision's C++ op (tests/golden/make_ops_golden.py), and by hand."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdet.ops.roi_align import assign_levels, multiscale_roi_align, roi_align
from flaxdet.xla.routes import routes_for
from tests.tolerances import HAND_F32, OP_F64, ROI_ALIGN_BF16, ROI_ALIGN_F32

with np.load(Path(__file__).parents[1] / "golden" / "roi_align.npz") as _file:
    GOLDEN = dict(_file)
CASES = sorted(key.split("/")[0] for key in GOLDEN if key.endswith("/output_size"))
PYRAMID = [GOLDEN[f"pyramid/features_{k}"] for k in range(4)]
SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)

# Shared, so that cases of one shape share a compiled program.
levels_jit = jax.jit(assign_levels, static_argnames=("scales", "canonical_scale", "canonical_level"))


@functools.partial(jax.jit, static_argnames="samples")
def align_2x2(features, boxes, samples):
    return roi_align(features, boxes, 2, spatial_scale=0.25, sampling_ratio=samples)


gradient_2x2 = jax.jit(jax.grad(lambda *args: align_2x2(*args).sum()), static_argnums=2)


@pytest.fixture(params=[pytest.param("float32", marks=pytest.mark.ci), "float64"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


def assert_near(actual, desired, dtype):
    bar = {"float32": ROI_ALIGN_F32, "float64": OP_F64, "bfloat16": ROI_ALIGN_BF16}[dtype]
    np.testing.assert_allclose(np.asarray(actual, np.float64), desired, rtol=0, atol=bar * np.abs(desired).max())


def load(name, dtype):
    """(features, boxes, output size, options, output) of one golden case."""
    options = {
        "spatial_scale": 0.25,
        "sampling_ratio": int(GOLDEN[f"{name}/sampling_ratio"]),
        "aligned": bool(GOLDEN[f"{name}/aligned"]),
    }
    features, boxes = (jnp.asarray(GOLDEN[key].astype(dtype)) for key in ("features", "boxes"))
    return features, boxes, tuple(GOLDEN[f"{name}/output_size"].tolist()), options, GOLDEN[f"{name}/{dtype}"]


def beyond(level, extent):
    """The map with NaN in all that lies beyond the extent."""
    level = np.array(level)
    level[extent[0] :] = level[:, extent[1] :] = np.nan
    return jnp.asarray(level)


def pyramid(dtype, levels=4):
    # by NumPy, as jnp.asarray compiles a conversion for each shape
    return jax.tree.map(lambda a: jnp.asarray(a.astype(dtype)), (tuple(PYRAMID[:levels]), GOLDEN["pyramid/boxes"]))


@pytest.mark.parametrize("name", CASES)
class TestGolden:
    def test_matches_torchvision(self, name, dtype):
        features, boxes, size, options, expected = load(name, dtype)
        result = roi_align(features, boxes, size, **options)
        assert result.dtype == dtype
        assert_near(result, expected, dtype)

    def test_vmap_of_jit_with_traced_scale_and_extent(self, name, dtype):
        """Beside an upside-down image, in an array larger than both, whose rest must never be read."""
        features, boxes, size, options, expected = load(name, dtype)
        del options["spatial_scale"]

        @jax.jit
        def run(features, boxes, scale, extent):
            return roi_align(features, boxes, size, spatial_scale=scale, extent=extent, **options)

        upside_down = np.asarray(features)[::-1]
        batch = np.stack([features, upside_down])
        batch = np.pad(batch, ((0, 0), (0, 5), (0, 3), (0, 0)), constant_values=np.nan)
        extents = jnp.asarray([features.shape[:2]] * 2)
        result = np.asarray(jax.vmap(run)(batch, np.stack([boxes, boxes]), jnp.asarray([0.25] * 2, dtype), extents))
        assert_near(result[0], expected, dtype)
        flipped = roi_align(upside_down, boxes, size, spatial_scale=0.25, **options)
        assert_near(result[1], np.asarray(flipped), dtype)

    def test_gradient(self, name, x64):
        features, boxes, size, options, expected = load(name, "float64")
        cotangent = np.cos(np.arange(expected.size, dtype=np.float64)).reshape(expected.shape)

        def weighed(features, boxes):
            return jnp.sum(cotangent * roi_align(features, boxes, size, **options))

        by_features, by_boxes = jax.jit(jax.grad(weighed, argnums=(0, 1)))(features, boxes)
        assert_near(by_features, GOLDEN[f"{name}/gradient"], "float64")
        np.testing.assert_array_equal(by_boxes, np.zeros_like(by_boxes))


class TestByHand:
    def test_linear_ramp(self, dtype):
        """On a ramp, the mean of the samples is the ramp at the bin's centre."""
        rows, columns = np.meshgrid(*(np.arange(n, dtype=dtype) for n in (10, 12)), indexing="ij")
        features = jnp.asarray(np.stack([rows, columns], axis=-1))
        result = np.asarray(roi_align(features, jnp.asarray([[2, 1, 8, 7]], dtype), (2, 3), sampling_ratio=2))
        np.testing.assert_allclose(result[0, :, 0, 0], [2.5, 5.5], rtol=HAND_F32)
        np.testing.assert_allclose(result[0, 0, :, 1], [3, 5, 7], rtol=HAND_F32)
        shifted = roi_align(features, jnp.asarray([[2, 1, 8, 7]], dtype), (2, 3), sampling_ratio=2, aligned=True)
        np.testing.assert_allclose(shifted, result - 0.5, rtol=HAND_F32)

    def test_one_pixel(self, dtype):
        """A box without area samples as one of a whole pixel does; aligned, it samples its corner alone."""
        features = jnp.asarray(np.arange(12, dtype=dtype).reshape(3, 4, 1))
        box = jnp.asarray([[1, 1, 1, 1]], dtype)
        np.testing.assert_allclose(roi_align(features, box, 1, sampling_ratio=1), [[[[1.5 * 4 + 1.5]]]])
        lifted = roi_align(features, box, 1, sampling_ratio=1, aligned=True)
        np.testing.assert_allclose(lifted, [[[[0.5 * 4 + 0.5]]]])

    @pytest.mark.parametrize(
        ("start", "expected"), [(-1.75, 0), (-1.5, 1), (-0.75, 1), (2.0, 3), (2.5, 3), (2.75, 0), (1.0, 2.5)]
    )
    def test_border(self, dtype, start, expected):
        """One sample at start + .5 along a row 1, 2, 3: 0 beyond [-1, 3], the border's pixel where nearer."""
        features = jnp.asarray([[[1], [2], [3]]], dtype)
        result = roi_align(features, jnp.asarray([[start, 0, start + 1, 0]], dtype), 1, sampling_ratio=1)
        np.testing.assert_array_equal(np.ravel(result), [expected])

    @pytest.mark.parametrize(
        ("samples", "bad"),
        [(1, np.nan), (2, np.nan), (3, np.nan), (2, np.inf), (2, -np.inf), (3, np.inf)],
    )
    def test_not_finite(self, samples, bad):
        """Nothing but 0 or means of pixels comes out, exactly 0 for NaN; the other boxes and gradients stay."""
        features, boxes, *_ = load("plain", "float32")
        good = np.asarray(boxes)[:8]
        boxes = good.copy()
        boxes[np.arange(4, 8), np.arange(4)] = bad
        result = np.asarray(align_2x2(features, boxes, samples))
        assert np.isfinite(result).all()
        np.testing.assert_array_equal(result[:4], np.asarray(align_2x2(features, good, samples))[:4])
        if np.isnan(bad):
            np.testing.assert_array_equal(result[4:], np.zeros_like(result[4:]))
        assert np.isfinite(gradient_2x2(features, boxes, samples)).all()


class TestExtent:
    @pytest.mark.parametrize("extent", [(9, 12), (5, 12), (9, 1), (1, 1), (4, 7)])
    def test_is_the_cropped_array(self, dtype, extent):
        features, boxes, size, options, _ = load("plain", dtype)
        cropped = roi_align(np.asarray(features)[: extent[0], : extent[1]], boxes, size, **options)
        rest = beyond(features, extent)
        np.testing.assert_array_equal(roi_align(rest, boxes, size, extent=extent, **options), cropped)

    def test_levels(self, dtype):
        features, boxes = pyramid(dtype)
        extents = ((20, 25), (10, 13), (5, 7), (3, 3))
        options = {"scales": SCALES, "sampling_ratio": 2, "canonical_scale": 32, "canonical_level": 3}
        cropped = [np.asarray(level)[:h, :w] for level, (h, w) in zip(features, extents, strict=True)]
        expected = multiscale_roi_align(cropped, boxes, 3, **options)
        rest = tuple(map(beyond, features, extents))
        np.testing.assert_array_equal(multiscale_roi_align(rest, boxes, 3, extents=extents, **options), expected)

    def test_no_gradient_to_what_does_not_count(self):
        features, boxes, size, options, _ = load("plain", "float32")
        run = jax.jit(jax.grad(lambda f: roi_align(f, boxes, size, extent=(5, 7), **options).sum()))
        grad = np.asarray(run(features))
        assert np.all(grad[:5, :7] != 0)
        assert not np.any(grad[5:])
        assert not np.any(grad[:, 7:])


class TestMultiscale:
    @pytest.mark.parametrize(
        ("name", "levels", "canonical"),
        [("pyramid_224", 4, (224, 4)), ("pyramid_32", 4, (32, 3)), ("single", 1, (224, 4))],
    )
    def test_matches_torchvision(self, dtype, name, levels, canonical):
        features, boxes = pyramid(dtype, levels)
        expected = GOLDEN[f"{name}/{dtype}"]
        options = {"sampling_ratio": 2, "canonical_scale": canonical[0], "canonical_level": canonical[1]}
        result = multiscale_roi_align(features, boxes, 3, scales=SCALES[:levels], **options)
        assert_near(result, expected, dtype)

        def traced(features, boxes, scales, extents):
            return multiscale_roi_align(features, boxes, 3, scales=scales, extents=extents, **options)

        batch = jax.tree.map(lambda a: np.stack([a, a]), features)
        extents = jnp.asarray([level.shape[:2] for level in features])
        scales = jnp.asarray(SCALES[:levels], dtype)
        mapped = jax.jit(jax.vmap(traced, in_axes=(0, 0, None, None)))
        result = mapped(batch, np.stack([boxes, np.asarray(boxes)[::-1]]), scales, extents)
        assert_near(result, np.stack([expected, expected[::-1]]), dtype)

    def test_every_level_is_used(self):
        boxes = GOLDEN["pyramid/boxes"]
        levels = levels_jit(jnp.asarray(boxes), SCALES, canonical_scale=32, canonical_level=3)
        assert set(np.asarray(levels).tolist()) == {0, 1, 2, 3}
        assert np.any(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) < 0)  # these belong to no level

    def test_per_image_scales(self):
        """Two images of a batch whose pyramids begin at different scales."""
        features, boxes = pyramid("float32")
        scales = np.array([SCALES, [2 * s for s in SCALES]], np.float32)
        run = lambda scales: multiscale_roi_align(features, boxes, 2, scales=scales, sampling_ratio=2)  # noqa: E731
        result = jax.jit(jax.vmap(run))(scales)
        for one, expected in zip(scales, np.asarray(result), strict=True):
            assert_near(run(tuple(one.tolist())), expected, "float32")

    def test_bfloat16(self):
        """Coordinates stay in float32: the result is that of the rounded features, rounded once."""
        features, boxes = pyramid("float32")
        narrow = tuple(np.asarray(level, jnp.bfloat16) for level in features)
        options = {"scales": SCALES, "sampling_ratio": 2}
        result = multiscale_roi_align(narrow, boxes, 3, **options)
        assert result.dtype == jnp.bfloat16
        wide = multiscale_roi_align([level.astype(np.float32) for level in narrow], boxes, 3, **options)
        np.testing.assert_array_equal(result, np.asarray(wide, jnp.bfloat16))
        assert_near(result, GOLDEN["pyramid_224/float32"], "bfloat16")

    @pytest.mark.parametrize("samples", [pytest.param(2, marks=pytest.mark.release), 3])  # 3 is a loop
    def test_the_routes_of_gpus_and_tpus(self, samples):
        """The bits of a CPU, under vmap too; the sums of a GPU's gradient are of other chunks."""
        rng = np.random.default_rng(0)
        maps = [rng.normal(size=(2, 40 >> i, 56 >> i, 6)).astype(jnp.bfloat16) for i in range(4)]
        corner, size = rng.uniform(0, 140, (2, 2, 300, 2)).astype(np.float32)
        boxes = np.concatenate([corner, corner + size], axis=-1)
        boxes[0, 0] = np.nan
        options = {"output_size": 3, "scales": SCALES, "sampling_ratio": samples, "canonical_scale": 56}
        align = jax.vmap(functools.partial(multiscale_roi_align, **options))
        cotangent = rng.normal(size=(2, 300, 3, 3, 6)).astype(jnp.bfloat16)

        @jax.jit
        def run(maps, boxes, cotangent):
            out, pull = jax.vjp(lambda maps: align(maps, boxes), maps)
            return out, pull(cotangent)[0]

        found, gradients = {}, {}
        for platform in ("cpu", "gpu"):
            with routes_for(platform):
                found[platform], gradients[platform] = run(maps, boxes, cotangent)
        with routes_for("tpu"):  # the gradient is a CPU's
            found["tpu"] = jax.jit(align)(maps, boxes)
        for platform in ("gpu", "tpu"):
            assert found[platform].dtype == jnp.bfloat16
            np.testing.assert_array_equal(found[platform], found["cpu"])
        for gpu, cpu in zip(gradients["gpu"], gradients["cpu"], strict=True):
            np.testing.assert_allclose(*(np.asarray(g, np.float32) for g in (gpu, cpu)), rtol=2**-7, atol=1e-3)

    def test_the_tiles_of_a_tpu(self):
        """The bits of a CPU with channels that fill tiles; nothing is read beyond the extents or from another row."""
        rng = np.random.default_rng(0)
        maps = [rng.normal(size=(12 >> i, 14 >> i, 256)).astype(np.float32) for i in range(2)]
        corner, size = rng.uniform(-2, 48, (2, 40, 2)).astype(np.float32)
        boxes = np.concatenate([corner, corner + size], axis=-1)
        extents = ((10, 11), (5, 5))
        options = {"scales": SCALES[:2], "sampling_ratio": 2, "canonical_scale": 56}
        align = jax.jit(lambda *maps: multiscale_roi_align(maps, boxes, 3, **options, extents=extents))
        with routes_for("tpu"):
            found = align(*map(beyond, maps, extents))
        with routes_for("cpu"):
            np.testing.assert_array_equal(found, align(*maps))

    def test_gradient_reaches_every_level_and_no_box(self, x64):
        """The output is linear in the features, so <g, f(x)> = <grad, x> for every x."""
        features, boxes = pyramid("float64")
        boxes = np.array(boxes)
        boxes[2] = np.nan
        rng = np.random.default_rng(0)
        cotangent = rng.normal(size=(len(boxes), 3, 3, 2))

        def run(features, boxes):
            return multiscale_roi_align(
                features, boxes, 3, scales=SCALES, sampling_ratio=2, canonical_scale=32, canonical_level=3
            )

        by_features, by_boxes = jax.jit(lambda cotangent, *args: jax.vjp(run, *args)[1](cotangent))(
            cotangent, features, boxes
        )
        assert all(np.isfinite(level).all() and np.any(level) for level in by_features)
        np.testing.assert_array_equal(by_boxes, np.zeros_like(by_boxes))
        other = tuple(rng.normal(size=level.shape) for level in features)
        inner = sum(np.vdot(a, b) for a, b in zip(by_features, other, strict=True))
        np.testing.assert_allclose(inner, np.vdot(cotangent, run(other, boxes)), rtol=OP_F64)

    def test_no_boxes(self, dtype):
        features, _ = pyramid(dtype)
        result = multiscale_roi_align(features, jnp.zeros((0, 4), dtype), 7, scales=SCALES, sampling_ratio=2)
        assert result.shape == (0, 7, 7, 2)


class TestLevels:
    @pytest.mark.parametrize(("name", "canonical"), [("levels_224", (224, 4)), ("levels_100", (100, 3))])
    def test_matches_torchvision_at_the_steps(self, dtype, name, canonical):
        sides = np.asarray(GOLDEN[f"{name}/sides"], dtype)
        boxes = jnp.asarray(np.stack([0 * sides, 0 * sides, sides, sides], axis=1))
        scales = [2.0**-k for k in range(1, 7)]
        run = jax.jit(lambda b: assign_levels(b, scales, canonical_scale=canonical[0], canonical_level=canonical[1]))
        np.testing.assert_array_equal(run(boxes), GOLDEN[f"{name}/{dtype}"])
        assert len(np.unique(GOLDEN[f"{name}/{dtype}"])) >= 5

    @pytest.mark.parametrize(
        ("scales", "expected"),
        [
            (SCALES, [0, 0, 1, 2, 3, 3, 0, 0]),
            ((1 / 2, 1 / 4, 1 / 8, 1 / 16), [1, 1, 2, 3, 3, 3, 0, 0]),  # of a 67x1333 image
            ((1 / 8,), [0, 0, 0, 0, 0, 0, 0, 0]),
        ],
    )
    def test_by_hand(self, dtype, scales, expected):
        sides = [56, 111, 112, 224, 448, np.inf, 0, np.nan]
        boxes = jnp.asarray([[1, 1, 1 + s, 1 + s] for s in sides], dtype)
        np.testing.assert_array_equal(levels_jit(boxes, scales), expected)

    def test_matches_torch_on_many_areas(self):
        """torchvision's formula in torch itself, a million float32 areas of which most lie near a step.

        But for its square root, which torch takes from MKL: on an AMD processor (EPYC, AVX-512) 17% of the roots
        were a neighbour of the nearest float32, which moved 1481 boxes to another level. Intel's gave none.
        """
        torch = pytest.importorskip("torch")
        rng = np.random.default_rng(0)
        near = 224 * 2.0 ** rng.integers(-3, 3, 800_000) * (1 + rng.normal(0, 1e-6, 800_000))
        height = np.exp(rng.uniform(-0.7, 0.7, near.size)) * near
        size = np.concatenate([np.stack([near**2 / height, height], 1), rng.uniform(1, 1333, (200_000, 2))])
        boxes = np.concatenate([np.zeros_like(size), size], axis=1).astype(np.float32)
        area = torch.tensor(boxes[:, 2]) * torch.tensor(boxes[:, 3])
        root = torch.sqrt(area.double()).float()

        def levels(side):
            levels = torch.floor(4 + torch.log2(side / 224) + torch.tensor(1e-6, dtype=torch.float32))
            return torch.clamp(levels, 2, 5).int().numpy() - 2

        found = np.asarray(levels_jit(boxes, SCALES))
        np.testing.assert_array_equal(found, levels(root))
        exact = (torch.sqrt(area) == root).numpy()
        np.testing.assert_array_equal(found[exact], levels(torch.sqrt(area))[exact])


@pytest.mark.parametrize("vmapped", [False, True])
def test_lowers_for_every_platform(dtype, vmapped):
    def both(features, boxes, scales, extents):
        return (
            multiscale_roi_align(features, boxes, 7, scales=scales, sampling_ratio=2, extents=extents),
            roi_align(features[0], boxes, (2, 3), sampling_ratio=3, aligned=True),
        )

    def step(*args):
        return jax.grad(lambda *a: sum(x.sum() for x in both(*a)))(*args), both(*args)

    batch, function = ((2,), jax.vmap(step)) if vmapped else ((), step)
    levels = tuple(jax.ShapeDtypeStruct((*batch, *level.shape), dtype) for level in PYRAMID)
    shapes = [((10, 4), dtype), ((4,), dtype), ((4, 2), "int32")]
    args = [jax.ShapeDtypeStruct((*batch, *shape), kind) for shape, kind in shapes]
    exported = jax.export.export(jax.jit(function), platforms=("cpu", "cuda", "tpu"))(levels, *args)
    assert exported.out_avals[-1].shape == (*batch, 10, 2, 3, 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sampling_ratio": 0}, ValueError, "sampling_ratio must be 1 or more, got 0"),
        ({"sampling_ratio": -1}, ValueError, "sampling_ratio must be 1 or more, got -1"),
        ({"output_size": (0, 2)}, ValueError, r"output_size must be positive, got \(0, 2\)"),
        ({"boxes": np.zeros((3, 5), np.float32)}, ValueError, r"boxes must have shape \[N, 4\], got \[3, 5\]"),
        ({"boxes": np.zeros((3, 4), np.int32)}, TypeError, "boxes must be floating, got int32"),
        ({"features": ()}, ValueError, "features must have at least one level"),
        ({"features": PYRAMID[:3]}, ValueError, "scales must have one number for each of the 3 levels"),
        ({"features": [*PYRAMID[:3], PYRAMID[3][..., :1]]}, ValueError, "the same C"),
        ({"features": [*PYRAMID[:3], PYRAMID[3].astype(np.float16)]}, TypeError, "all of one dtype"),
        ({"extents": np.zeros((2, 4), np.int32)}, ValueError, r"extents must have shape \[4, 2\], got \[2, 4\]"),
    ],
)
def test_bad_input(change, error, message):
    good = {
        "features": PYRAMID,
        "boxes": np.zeros((3, 4), np.float32),
        "output_size": 2,
        "scales": SCALES,
        "sampling_ratio": 2,
    }
    with pytest.raises(error, match="multiscale_roi_align: .*" + message):
        multiscale_roi_align(**(good | change))


def test_bad_extent():
    with pytest.raises(ValueError, match=r"roi_align: extent must be \(rows, columns\), got shape \[3\]"):
        roi_align(PYRAMID[0], np.zeros((3, 4), np.float32), 2, sampling_ratio=2, extent=np.zeros(3, np.int32))


def test_samples_must_be_given():
    """torchvision's default is adaptive: a fixed one would give other numbers for the same call."""
    boxes = np.zeros((3, 4), np.float32)
    with pytest.raises(
        TypeError, match="roi_align: sampling_ratio must be given: torchvision's default samples by the"
    ):
        roi_align(PYRAMID[0], boxes, 2)
    with pytest.raises(TypeError, match="multiscale_roi_align: sampling_ratio must be given"):
        multiscale_roi_align(PYRAMID, boxes, 2, scales=SCALES)
