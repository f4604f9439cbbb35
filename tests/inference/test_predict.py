"""``predict``: lists of images of any sizes, on a small detector with random weights."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxdet
from flaxdet.images.transform import transform
from flaxdet.inference import programs
from flaxdet.inference.detect import detect_program, jitted_detect, unpad
from flaxdet.models.detector import example_batch
from flaxdet.structures import Detections
from tests.tolerances import HAND_F32, LAYERS_F32

pytestmark = pytest.mark.xdist_group("predict")

SIZES = [(40, 60), (60, 40), (33, 90), (40, 60), (1, 1)]


class Backbone(nn.Module):
    """Two levels of strides 8 and 16: small, so that it compiles quickly."""

    dtype: jnp.dtype = jnp.float32
    out_channels: int = 32

    @nn.compact
    def __call__(self, pixels):
        options = {"dtype": self.dtype, "param_dtype": self.dtype}
        fine = nn.relu(nn.Conv(32, (8, 8), 8, name="fine", **options)(pixels))
        return {"fine": fine, "coarse": nn.Conv(32, (3, 3), 2, padding=1, name="coarse", **options)(fine)}


def detector(dtype=jnp.float32) -> flaxdet.FCOS:
    anchors = flaxdet.AnchorGenerator(((16,), (32,)), ((1.0,),) * 2)
    options = {"min_size": 64, "max_size": 96, "score_thresh": 0.02, "dtype": dtype}
    return flaxdet.FCOS(Backbone(dtype), 4, anchor_generator=anchors, **options)


@pytest.fixture(scope="session")
def variables():
    variables = {"params": jax.jit(detector().init)(jax.random.key(0), example_batch())["params"]}
    head = variables["params"]["head"]["classification_head"]
    head["cls_logits"]["kernel"] = head["cls_logits"]["kernel"] * 20  # fresh scores hardly differ
    return variables


@pytest.fixture(scope="session")
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]


def assert_equal(found, expected):
    assert found.keys() == expected.keys() == {"boxes", "scores", "labels"}
    for field in found:
        np.testing.assert_array_equal(found[field], expected[field], err_msg=field)


def test_a_list_is_each_image_alone(variables, images):
    model = detector()
    together = flaxdet.predict(model, variables, images)
    assert len(together) == len(images)
    for image, found in zip(images, together, strict=True):
        (alone,) = flaxdet.predict(model, variables, [image])
        assert_equal(found, alone)
    backwards = flaxdet.predict(model, variables, images[::-1])
    for found, expected in zip(backwards[::-1], together, strict=True):
        assert_equal(found, expected)


def test_what_comes_out(variables, images):
    for image, found in zip(images, flaxdet.predict(detector(), variables, images), strict=True):
        boxes, scores, labels = found["boxes"], found["scores"], found["labels"]
        assert all(type(value) is np.ndarray for value in found.values())
        assert (boxes.dtype, scores.dtype, labels.dtype) == (np.float32, np.float32, np.int32)
        assert boxes.shape == (len(scores), 4)
        assert 0 < len(scores) <= 100
        assert (np.diff(scores) <= 0).all()  # best first
        assert (scores > 0.02).all()
        assert (scores <= 1).all()
        assert ((labels >= 0) & (labels < 4)).all()
        rows, columns = image.shape[:2]
        assert (boxes >= 0).all()
        assert (boxes <= np.array([columns, rows, columns, rows]) * (1 + 1e-6)).all()
        assert (boxes[:, :2] <= boxes[:, 2:]).all()
        assert boxes[:, 2].max() > 0.5 * columns  # in the original image, not in the resized


def test_is_the_models_answer_in_the_original_image(variables, images):
    model = detector()
    batch = transform(images[:1], model.transform)
    (resized,) = unpad(jitted_detect(model, variables, batch.replace(original_size=batch.size)))
    (found,) = flaxdet.predict(model, variables, images[:1])
    scale = np.float32([60 / 96, 40 / 64] * 2)
    np.testing.assert_allclose(found["boxes"], resized["boxes"] * scale, rtol=HAND_F32)
    np.testing.assert_array_equal(found["scores"], resized["scores"])


def test_batch_shares_a_canvas(variables, images):
    model = detector()
    # these two share a canvas of 64x96 anyway, so that "image" and "batch" agree but for the order of sums
    pair = [images[0], images[3]]
    for found, expected in zip(
        flaxdet.predict(model, variables, pair, canvas="batch"),
        flaxdet.predict(model, variables, pair),
        strict=True,
    ):
        assert len(found["scores"]) == len(expected["scores"])
        np.testing.assert_allclose(found["scores"], expected["scores"], atol=LAYERS_F32)
    # with a portrait neighbour the canvas is 96x96: torchvision's answers change, and so do these
    mixed = flaxdet.predict(model, variables, images[:2], canvas="batch")
    (alone,) = flaxdet.predict(model, variables, images[:1], canvas="batch")
    batch = transform(images[:2], model.transform, canvas="batch")
    assert batch.pixels.shape == (2, 96, 96, 3)
    assert_equal(mixed[1], unpad(jitted_detect(model, variables, batch))[1])
    assert not np.array_equal(mixed[0]["scores"], alone["scores"])


@pytest.mark.parametrize("canvas", ["image", "batch"])
def test_no_images(variables, canvas):
    assert flaxdet.predict(detector(), variables, [], canvas=canvas) == []


def test_unknown_canvas(variables, images):
    for given in (images, []):
        with pytest.raises(ValueError, match='canvas should be "image" or "batch", got \'own\''):
            flaxdet.predict(detector(), variables, given, canvas="own")


def bad(number: int, image) -> list:
    images = [np.zeros((8, 9, 3), np.uint8)] * 5
    images[number] = image
    return images


@pytest.mark.parametrize("canvas", ["image", "batch"])
@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (bad(3, np.zeros((8, 9), np.uint8)), ValueError, r"^image 3: expected shape \[H, W, 3\], got \[8, 9\]"),
        (bad(4, np.zeros((0, 9, 3), np.uint8)), ValueError, "^image 4: expected at least one pixel"),
        (bad(1, np.zeros((8, 9, 3), np.int64)), TypeError, "^image 1: expected uint8.*got dtype int64"),
        (bad(2, np.zeros((8, 9, 3), np.float32)), TypeError, "^image 2: expected every image in one dtype"),
        (bad(4, np.zeros((1, 3000, 3), np.uint8)), ValueError, "^image 4 of 1x3000 .* elongated"),
        ([np.full((8, 9, 3), np.nan, np.float32)], ValueError, r"^image 0: expected floats in \[0, 1\]"),
        ([np.full((8, 9, 3), 2, np.float32)], ValueError, r"^image 0: expected floats in \[0, 1\]"),
        (np.zeros((8, 9, 3), np.uint8), TypeError, "^expected a list of images"),
    ],
)
def test_bad_images_are_named_and_nothing_is_computed(monkeypatch, images, error, message, canvas):
    def never(*_, **__):
        raise AssertionError("computed")

    monkeypatch.setattr(programs, "jitted_detect", never)
    monkeypatch.setattr(programs, "transform", never)
    with pytest.raises(error, match=message):
        flaxdet.predict(detector(), {}, images, canvas=canvas)


def test_the_same_shapes_do_not_compile_again(variables, images):
    flaxdet.predict(detector(), variables, images)
    before = detect_program(np.float32)._cache_size()
    flaxdet.predict(detector(), variables, images[::-1])  # an equal model, the same three canvases
    flaxdet.predict(detector(), variables, [images[0][:39].astype(np.float32) / 255])
    assert detect_program(np.float32)._cache_size() == before
    flaxdet.predict(detector(), variables, [images[0][:20]])
    assert detect_program(np.float32)._cache_size() == before + 1  # 32x96


@pytest.mark.ci  # tests/parity computes in float64 throughout
def test_float64(images, variables, x64):
    variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    (found,) = flaxdet.predict(detector(jnp.float64), variables, images[:1])
    assert (found["boxes"].dtype, found["scores"].dtype, found["labels"].dtype) == (np.float64, np.float64, np.int32)


def detections(valid) -> Detections:
    valid = np.array(valid)
    count = valid.shape
    return Detections(
        boxes=np.arange(np.prod(count) * 4, dtype=np.float32).reshape(*count, 4),
        scores=np.linspace(1, 0, int(np.prod(count)), dtype=np.float32).reshape(count),
        labels=np.arange(np.prod(count), dtype=np.int32).reshape(count),
        valid=valid,
    )


def test_unpad():
    first, second, third = unpad(detections([[True, True, False], [False] * 3, [True] * 3]))
    assert first["labels"].tolist() == [0, 1]
    assert first["boxes"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert second["boxes"].shape == (0, 4)
    assert second["scores"].shape == second["labels"].shape == (0,)
    assert third["labels"].tolist() == [6, 7, 8]
