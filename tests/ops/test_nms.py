"""NMS against golden results of torchvision's C++ ops (tests/golden/make_ops_golden.py), and by hand."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdet.ops.nms import batched_nms, nms
from flaxdet.xla.routes import routes_for

with np.load(Path(__file__).parents[1] / "golden" / "nms.npz") as _file:
    GOLDEN = dict(_file)
CASES = sorted({key.split("/")[0] for key in GOLDEN})


@pytest.fixture(params=[pytest.param("float32", marks=pytest.mark.ci), "float64"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


def load(name, dtype):
    """(arguments of nms or batched_nms, threshold, indices kept) of one golden case."""
    case = {key.split("/")[1]: value for key, value in GOLDEN.items() if key.startswith(name + "/")}
    args = [jnp.asarray(case[key].astype(dtype)) for key in ("boxes", "scores")]
    if "idxs" in case:
        args.append(jnp.asarray(case["idxs"]))
    return args, float(case["threshold"]), case[dtype]


def run(args, threshold, **options):
    return (nms if len(args) == 2 else batched_nms)(*args, threshold, **options)


def _run_options(args, threshold, valid, size):
    return run(args, threshold, valid=valid, max_output=size)


# Shared, so that cases of one shape share a compiled program.
run_jit = jax.jit(_run_options, static_argnums=3)
run_vmap = jax.jit(
    lambda args, threshold, valid, size: jax.vmap(lambda a, v: _run_options(a, threshold, v, size))(args, valid),
    static_argnums=3,
)


def run_among_padding(args, threshold, valid):
    """Three boxes behind that must not count, two more output slots than boxes, and a traced threshold."""
    n, fill = len(args[0]) + 3, (np.nan, np.inf, 1)
    args = [np.concatenate([a, np.full((3, *a.shape[1:]), v, a.dtype)]) for a, v in zip(args, fill, strict=False)]
    with jax.enable_x64(True):  # in float32 a traced threshold would be its rounding
        valid = jnp.asarray(np.concatenate([valid, np.zeros(3, bool)]))
        return run_jit(args, jnp.asarray(threshold, jnp.float64), valid, n + 2)


def padded(kept, size):
    return np.concatenate([kept[:size], np.full(max(0, size - len(kept)), -1)])


def naive(boxes, scores, idxs, threshold):
    """The textbook loop, in NumPy, for small sets of ordinary boxes."""
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept = []
    for i in np.argsort(-scores, kind="stable"):
        j = [j for j in kept if idxs[i] == idxs[j]]
        side = np.minimum(boxes[i, 2:], boxes[j, 2:]) - np.maximum(boxes[i, :2], boxes[j, :2])
        common = np.prod(np.maximum(side, 0), axis=1)
        if not np.any(common / (area[i] + area[j] - common) > threshold):
            kept.append(i)
    return np.array(kept, np.int32)


@pytest.mark.parametrize("name", CASES)
class TestGolden:
    def test_matches_torchvision(self, name, dtype):
        args, threshold, kept = load(name, dtype)
        result = run(args, threshold)
        assert result.dtype == jnp.int32
        np.testing.assert_array_equal(result, padded(kept, len(args[0])))

    def test_jit(self, name, dtype):
        args, threshold, kept = load(name, dtype)
        result = run_among_padding(args, threshold, np.ones(len(args[0]), bool))
        np.testing.assert_array_equal(result, padded(kept, len(args[0]) + 5))

    def test_vmap(self, name, dtype):
        """Beside an image that is empty and one that lacks the best box; fewer output slots than boxes; large tiles."""
        args, threshold, kept = load(name, dtype)
        n = len(args[0])
        size = max(1, n // 4)
        batch = [np.stack([a, a, a]) for a in args]
        valid = np.ones((3, n), bool)
        valid[1] = False
        valid[2, kept[:1]] = False
        with jax.enable_x64(True), routes_for("gpu"):
            result = np.asarray(run_vmap(batch, jnp.asarray(threshold, jnp.float64), jnp.asarray(valid), size))
        np.testing.assert_array_equal(result[0], padded(kept, size))
        np.testing.assert_array_equal(result[1], np.full(size, -1))
        alone = np.asarray(run_among_padding(args, threshold, valid[2]))
        np.testing.assert_array_equal(result[2], alone[:size])
        assert not np.isin(kept[:1], result[2]).any()


@pytest.mark.parametrize("name", ["crowd", "classes_few"])
def test_images_do_not_meet(name):
    """A batch in which one image is done long before the others, and one has no box: each has its own answer."""
    args, threshold, kept = load(name, "float32")
    args = [np.asarray(a) for a in args]
    n = len(args[0])
    batch = [np.stack([a, a, a, a[::-1]]) for a in args]
    valid = np.ones((4, n), bool)
    valid[1] = False
    valid[2, kept[1:]] = False
    found = np.asarray(run_vmap(batch, threshold, jnp.asarray(valid), n))
    alone = np.asarray(run_among_padding(args, threshold, valid[2]))[:n]
    turned = np.asarray(run_among_padding([a[::-1] for a in args], threshold, valid[3]))[:n]
    for row, expected in zip(found, (padded(kept, n), np.full(n, -1), alone, turned), strict=True):
        np.testing.assert_array_equal(row, expected)


def test_golden_has_the_hard_cases():
    """The goldens would not tell much if no IoU fell on the threshold, or nothing was suppressed."""
    differing = [name for name in CASES if not np.array_equal(GOLDEN[name + "/float32"], GOLDEN[name + "/float64"])]
    assert {"integers_0.6", "classes_integers"} <= set(differing)
    assert len(GOLDEN["many_kept/float32"]) > 1024  # several blocks of kept boxes
    assert len(GOLDEN["crowd/float32"]) < 256


class TestByHand:
    # a; b, IoU 0.6 with a; c, far away; d, IoU 0.5 with a and 5/6 with b
    BOXES = ((0, 0, 10, 10), (0, 0, 10, 6), (50, 50, 60, 60), (0, 0, 10, 5))

    @pytest.mark.parametrize(
        ("threshold", "kept"),
        [
            (0.55, [0, 3, 2]),
            (0.5, [0, 3, 2]),  # equal does not suppress
            (0.49, [0, 2]),
            (0.9, [0, 1, 3, 2]),
            (0.0, [0, 2]),
            (1.0, [0, 1, 3, 2]),
        ],
    )
    def test_threshold(self, dtype, threshold, kept):
        boxes = jnp.asarray(self.BOXES, dtype)
        scores = jnp.asarray([0.9, 0.8, 0.1, 0.7], dtype)
        np.testing.assert_array_equal(nms(boxes, scores, threshold), padded(np.array(kept), 4))

    @pytest.mark.parametrize(
        ("iou", "suppressed"),
        [(0.6, {"float32": True, "float64": False}), (0.7, {"float32": False, "float64": False})],
    )
    def test_threshold_is_a_double(self, dtype, iou, suppressed):
        """The float32 nearest to 0.6 lies above 0.6, that nearest to 0.7 below 0.7."""
        boxes = jnp.asarray([[0, 0, 10, 10], [0, 0, 10, 10 * iou]], dtype)
        kept = [0, -1] if suppressed[dtype] else [0, 1]
        np.testing.assert_array_equal(nms(boxes, jnp.asarray([1, 0.5], dtype), iou), kept)

    def test_suppressed_boxes_suppress_nothing(self, dtype):
        boxes = jnp.asarray([[0, 0, 10, 1], [4, 0, 14, 1], [8, 0, 18, 1]], dtype)  # IoU 3/7 with the next
        np.testing.assert_array_equal(nms(boxes, jnp.asarray([3, 2, 1], dtype), 0.4), [0, 2, -1])

    def test_categories_do_not_meet(self, dtype):
        boxes = jnp.asarray([[0, 0, 10, 10]] * 4, dtype)
        scores = jnp.asarray([0.1, 0.4, 0.3, 0.2], dtype)
        np.testing.assert_array_equal(batched_nms(boxes, scores, jnp.array([7, 7, -1, 7]), 0.5), [1, 2, -1, -1])

    def test_order_of_special_scores(self, dtype):
        """NaN, +inf, ..., 0.0 and -0.0 as equals, ..., -inf, as torch.sort has them."""
        boxes = jnp.asarray([[20 * i, 0, 20 * i + 10, 10] for i in range(8)], dtype)
        scores = jnp.asarray([-np.inf, -0.0, 0.0, np.inf, np.nan, 3, -1, -np.nan], dtype)
        np.testing.assert_array_equal(nms(boxes, scores, 0.5), [4, 7, 3, 5, 1, 2, 6, 0])


class TestSizes:
    @pytest.mark.parametrize("max_output", [None, 0, 1, 300])
    def test_all_padding(self, dtype, max_output):
        (boxes, scores), *_ = load("random", dtype)
        n = len(boxes)
        result = nms(boxes, scores, 0.5, max_output=max_output, valid=jnp.zeros(n, bool))
        np.testing.assert_array_equal(result, np.full(n if max_output is None else max_output, -1))

    @pytest.mark.parametrize("max_output", [None, 3])
    def test_no_boxes(self, dtype, max_output):
        result = nms(jnp.zeros((0, 4), dtype), jnp.zeros(0, dtype), 0.5, max_output=max_output)
        np.testing.assert_array_equal(result, np.full(max_output or 0, -1))
        mapped = jax.vmap(lambda b, s: nms(b, s, 0.5, max_output=max_output))
        assert mapped(jnp.zeros((2, 0, 4), dtype), jnp.zeros((2, 0), dtype)).shape == (2, max_output or 0)

    @pytest.mark.parametrize(
        ("n", "size", "platform"), [(65, 65, "cpu"), (513, 100, "cpu"), (1025, 1100, "cpu"), (1025, 100, "gpu")]
    )
    def test_edges_of_tiles_and_chunks(self, n, size, platform):
        """Ties and -inf at the very places where one chunk ends and the next begins."""
        rng = np.random.default_rng(n)
        boxes = np.repeat(rng.integers(0, 200, (-(-n // 8), 2)), 8, axis=0)[:n] + rng.integers(0, 2, (n, 2))
        boxes = np.concatenate([boxes, boxes + 12], axis=1).astype(np.float32)
        scores = rng.choice([0.5, 0.5, 0.25, -np.inf], n).astype(np.float32)
        idxs = rng.integers(0, 2, n).astype(np.int32)
        kept = naive(boxes, scores, idxs, 0.5)
        with routes_for(platform):
            result = batched_nms(*map(jnp.asarray, (boxes, scores, idxs)), 0.5, max_output=size)
        np.testing.assert_array_equal(result, padded(kept, size))

    @pytest.mark.parametrize("platform", ["cpu", "gpu"])
    def test_mostly_invalid(self, platform):
        """Few valid candidates among many, in several chunks; the invalid ones have the best scores."""
        rng = np.random.default_rng(3)
        n, some = 20_000, 900
        where = np.sort(rng.choice(n, some, replace=False))
        corner = rng.uniform(0, 60, (n, 2))
        boxes = np.concatenate([corner, corner + 30], axis=1).astype(np.float32)
        scores = rng.uniform(1, 2, n).astype(np.float32)
        scores[where] -= 1
        valid = np.isin(np.arange(n), where)
        kept = where[naive(boxes[where], scores[where], np.zeros(some), 0.5)]
        with routes_for(platform):
            result = jax.jit(lambda *a: nms(*a[:2], 0.5, max_output=100, valid=a[2]))(boxes, scores, valid)
        np.testing.assert_array_equal(result, padded(kept, 100))


class TestTransformations:
    def test_gradient_passes_by(self):
        """Code that gathers by the indices has a gradient; the choice itself has none."""
        (boxes, scores, idxs), threshold, kept = load("classes_few", "float32")

        def loss(boxes, scores):
            index = batched_nms(boxes, scores, idxs, threshold, max_output=50)
            return jnp.sum(jnp.where(index >= 0, scores[index], 0)) + jnp.sum(boxes[index[0]])

        by_boxes, by_scores = jax.jit(jax.grad(loss, argnums=(0, 1)))(boxes, scores)
        np.testing.assert_array_equal(np.flatnonzero(by_scores), np.sort(kept[:50]))
        np.testing.assert_array_equal(np.flatnonzero(by_boxes.sum(1)), kept[:1])

    @pytest.mark.parametrize("vmapped", [False, True])
    def test_lowers_for_every_platform(self, dtype, vmapped):
        def both(boxes, scores, idxs, valid):
            kept = nms(boxes, scores, 0.5, valid=valid)
            return kept, batched_nms(boxes, scores, idxs, 0.5, max_output=100, valid=valid)

        batch, function = ((2,), jax.vmap(both)) if vmapped else ((), both)
        shapes = [((1500, 4), dtype), ((1500,), dtype), ((1500,), "int32"), ((1500,), "bool")]
        args = [jax.ShapeDtypeStruct((*batch, *shape), kind) for shape, kind in shapes]
        exported = jax.export.export(jax.jit(function), platforms=("cpu", "cuda", "tpu"))(*args)
        assert [a.shape[-1] for a in exported.out_avals] == [1500, 100]

    @pytest.mark.parametrize("narrow", ["bfloat16", "float16"])
    def test_narrow_floats_are_computed_in_float32(self, narrow):
        (boxes, scores), threshold, _ = load("random", "float32")
        boxes, scores = (np.asarray(a, jnp.dtype(narrow)) for a in (boxes, scores))
        expected = nms(boxes.astype(np.float32), scores.astype(np.float32), threshold)
        np.testing.assert_array_equal(nms(boxes, scores, threshold), expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"boxes": np.zeros((3, 5), np.float32)},
            ValueError,
            r"boxes must have shape \[N, 4\], got \[3, 5\]",
        ),
        ({"boxes": np.zeros((3, 4), np.int32)}, TypeError, "boxes must be floating, got int32"),
        ({"scores": np.zeros(2, np.float32)}, ValueError, r"scores must have shape \[3\] .* got \[2\]"),
        ({"scores": np.zeros(3, np.int32)}, TypeError, "scores must be floating"),
        ({"idxs": np.zeros(3, np.float32)}, TypeError, "idxs must be integer, got float32"),
        ({"valid": np.zeros(3, np.int32)}, TypeError, "valid must be bool, got int32"),
        ({"max_output": -1}, ValueError, "max_output must not be negative, got -1"),
        ({"iou_threshold": np.zeros(2, np.float32)}, ValueError, "iou_threshold must be one"),
    ],
)
def test_bad_input(change, error, message):
    good = {
        "boxes": np.zeros((3, 4), np.float32),
        "scores": np.zeros(3, np.float32),
        "idxs": np.zeros(3, np.int32),
        "iou_threshold": 0.5,
    }
    with pytest.raises(error, match="batched_nms: " + message if "iou" not in message else message):
        batched_nms(**(good | change))
