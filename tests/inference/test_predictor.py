"""``Predictor``: the answers of ``predict`` from few programs, whatever the bucket, the batch and the order."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import flaxdet
from flaxdet.data import ImageError
from flaxdet.train import make_mesh
from flaxdet.xla.routes import routes_for
from tests.detections import assert_same_in_any_order
from tests.tiny import FCOS_NAME, V2_NAME, tiny_model, tiny_variables
from tests.tolerances import INVARIANCE_F64

pytestmark = pytest.mark.xdist_group("predictor")
BUCKETS = [(64, 96), (96, 96)]
OPTIONS = {
    FCOS_NAME: {"score_thresh": 0.05, "detections_per_img": 20},
    V2_NAME: {"box_score_thresh": 0.2, "box_detections_per_img": 20},
}


def noise(*sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


# canvases of 64x96, 96x64, 96x64, 64x96, 32x96, 64x96 and 96x64; with raw sizes of 70 and 100 some are resized on the
# host
SIZES = [(64, 80), (80, 64), (70, 62), (40, 55), (30, 99), (130, 190), (210, 180)]
ONE_CANVAS = [(64, 80), (40, 55), (130, 190)]  # of those


def same(found, expected, tolerance=INVARIANCE_F64):
    """With a tolerance of float32 in any order: two scores that nearly tie may change places between programs."""
    assert len(found) == len(expected)
    for own, other in zip(found, expected, strict=True):
        assert own["boxes"].dtype == other["boxes"].dtype
        if tolerance > INVARIANCE_F64:
            assert_same_in_any_order(own, other, tolerance)
            continue
        np.testing.assert_array_equal(own["labels"], other["labels"])
        np.testing.assert_allclose(own["boxes"], other["boxes"], rtol=0, atol=tolerance)
        np.testing.assert_allclose(own["scores"], other["scores"], rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def fcos():
    model = tiny_model(FCOS_NAME, **OPTIONS[FCOS_NAME])
    return model, tiny_variables(model)


@pytest.mark.ci  # test_engine has the order and the batches, parity/test_invariance the buckets
@pytest.mark.parametrize(("name", "sizes"), [(FCOS_NAME, SIZES), (V2_NAME, ONE_CANVAS)])
def test_the_answers_of_predict(name, sizes, x64):
    """In float64: every image as it is alone, in batches of three, as a list, as floats, and as a stream.

    Without a mesh, a CPU has no batches.
    """
    model = tiny_model(name, dtype=np.float64, **OPTIONS[name])
    variables = tiny_variables(model)
    images = noise(*sizes)
    expected = flaxdet.predict(model, variables, images)
    assert sum(len(own["scores"]) for own in expected) > 3 * len(images)
    mesh = make_mesh(jax.devices()[:1])
    predictor = flaxdet.Predictor(model, variables, buckets=BUCKETS, batch_size=3, raw_sizes=(70, 100), mesh=mesh)
    same(predictor(images), expected)
    same(predictor([image / np.float64(255) for image in images]), expected)
    same(list(predictor.stream(image for image in images)), expected)
    same(predictor(images[:1]), expected[:1])
    assert predictor([]) == []
    assert predictor.model_compile_count <= len(BUCKETS)


def test_a_new_size_compiles_nothing(fcos):
    predictor = flaxdet.Predictor(*fcos, buckets=BUCKETS, raw_sizes=(128,))
    assert predictor.compile_count == 0
    predictor.warmup()
    models = len(BUCKETS) if jax.default_backend() == "cpu" else 2 * len(BUCKETS)
    assert (predictor.compile_count, predictor.model_compile_count) == (models + len(BUCKETS), models)
    for size in itertools.product((20, 33, 47, 90, 300), (21, 40, 64, 71, 128)):
        (found,) = predictor(noise(size))
        assert set(found) == {"boxes", "scores", "labels"}
    assert predictor.compile_count == models + len(BUCKETS)


@pytest.mark.ci  # compiles two programs more
def test_on_a_gpu_a_batch_that_fills_the_bucket_has_no_masks(fcos):
    """The second and third image have canvases of 64x96, which is the bucket; the first canvas is 32x96."""
    images = noise((30, 99), (64, 80), (40, 55))
    expected = flaxdet.predict(*fcos, images)
    with routes_for("gpu"):
        predictor = flaxdet.Predictor(*fcos, buckets=[(64, 96)], batch_size=2)
        same(predictor(images[1:]), expected[1:], 1e-4)
        assert [masked for _, masked in predictor._programs.detects] == [False]
        same(predictor(images[:2]), expected[:2], 1e-4)
        assert [masked for _, masked in predictor._programs.detects] == [False, True]
        predictor.warmup()
    assert predictor.model_compile_count == 2


def test_programs_are_compiled_when_first_needed(fcos):
    predictor = flaxdet.Predictor(*fcos)
    predictor(noise((64, 80), (60, 75)))
    assert (predictor.compile_count, predictor.model_compile_count) == (2, 1)


def test_one_size_for_all_traces_no_masks(fcos):
    model = tiny_model(FCOS_NAME, fixed_size=(96, 64), **OPTIONS[FCOS_NAME])
    predictor = flaxdet.Predictor(model, fcos[1])
    assert predictor.buckets == [(64, 96)]
    images = noise((64, 80), (200, 30))
    same(predictor(images), flaxdet.predict(model, fcos[1], images), 1e-4)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere the images of a batch run together")
def test_on_a_cpu_a_batch_costs_what_its_images_cost(fcos):
    """One image a call, whatever the batch: nothing fills it up, and a neighbour changes no bit."""
    predictor = flaxdet.Predictor(*fcos, buckets=BUCKETS[1:], batch_size=4)
    predictor.warmup()
    calls = []
    for bucket, program in predictor._programs.detects.items():
        predictor._programs.detects[bucket] = lambda variables, batch, program=program: (
            calls.append(batch.pixels.shape),
            program(variables, batch),
        )[1]
    images = noise(*SIZES[:4])
    found = predictor(images)
    same(predictor(images[:1] + images[3:]), [found[0], found[3]], 0)
    assert calls == [(1, 96, 96, 3)] * 6
    assert predictor.model_compile_count == 1


def test_bfloat16(fcos):
    model = tiny_model(FCOS_NAME, dtype=jnp.bfloat16, **OPTIONS[FCOS_NAME])
    (found,) = flaxdet.Predictor(model, fcos[1], buckets=BUCKETS)(noise((64, 80)))
    assert found["boxes"].dtype == found["scores"].dtype == np.float32
    assert len(found["scores"])


# Streams


def test_a_stream_of_files_and_arrays_in_order(fcos, tmp_path):
    images = noise(*SIZES)
    for i in (1, 4):
        Image.fromarray(images[i]).save(tmp_path / f"{i}.png")
    mixed = list(images)
    mixed[1], mixed[4], mixed[5] = tmp_path / "1.png", str(tmp_path / "4.png"), lambda: images[5]
    predictor = flaxdet.Predictor(*fcos, buckets=BUCKETS, batch_size=2, raw_sizes=(100,))
    same(list(predictor.stream(mixed)), predictor(images), 0)


def test_what_fails_is_reported_in_its_place(fcos, tmp_path):
    good, other = noise((64, 80), (70, 70))
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"nothing")
    predictor = flaxdet.Predictor(*fcos, buckets=[(64, 96)], batch_size=2)
    stream = [good, broken, other, np.zeros((3, 3)), tmp_path / "none.png", np.zeros((90, 60, 3), np.uint8), good]
    found = list(predictor.stream(stream))
    (one, two) = predictor([good, other])
    same([found[0], found[2], found[6]], [one, two, one], 0)
    messages = {i: str(error) for i, error in enumerate(found) if isinstance(error, Exception)}
    assert set(messages) == {1, 3, 4, 5}
    assert isinstance(found[1], ImageError)
    assert "broken.png" in messages[1]
    assert "none.png" in messages[4]
    assert messages[3].startswith("image 3: expected shape [H, W, 3]")
    assert messages[5].startswith("image 5: its canvas of 96x64 (rows x columns) fits none of the buckets 64x96")


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buckets": [(64, 100)]}, r"bucket 64x100 \(rows x columns\) should have multiples of 32"),
        ({"buckets": []}, "expected at least one bucket"),
        ({"buckets": [(64,)]}, r"a bucket should be \(rows, columns\)"),
        ({"batch_size": 0}, "should be at least 1, got 0"),
        ({"raw_sizes": (0,)}, r"should be at least 1, got 1 and \(0,\)"),
    ],
)
def test_bad_options(fcos, options, message):
    with pytest.raises(ValueError, match=message):
        flaxdet.Predictor(*fcos, **options)


def test_a_model_whose_canvases_fit_no_bucket(fcos):
    with pytest.raises(ValueError, match="size_divisible=8 gives canvases that don't fit into buckets"):
        flaxdet.Predictor(tiny_model(FCOS_NAME, size_divisible=8), fcos[1], buckets=BUCKETS)


def test_bad_images_are_named_and_nothing_is_computed(fcos):
    predictor = flaxdet.Predictor(*fcos, buckets=[(64, 96)])
    good, tall = noise((64, 80), (90, 60))
    with pytest.raises(ValueError, match=r"image 1: its canvas of 96x64 .* fits none of the buckets 64x96"):
        predictor([good, tall])
    with pytest.raises(TypeError, match="image 1: expected every image in one dtype"):
        predictor([good, good / 255])
    with pytest.raises(ValueError, match=r"image 0 of 1x300 .* too elongated"):
        predictor(noise((1, 300)))
    with pytest.raises(ValueError, match="workers should be at least 1, got 0"):
        next(predictor.stream([good], workers=0))
    assert predictor.compile_count == 0
