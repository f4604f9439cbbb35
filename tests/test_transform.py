"""The resize, normalisation and padding: sizes and pixels against torchvision, and every kind of bad image."""

from __future__ import annotations

import contextlib
import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdet.structures import Detections, TransformConfig
from flaxdet.transform import (
    canvas_size,
    check_image,
    check_images,
    resize_image,
    resized_size,
    to_original,
    transform,
    transform_targets,
)
from tests.tolerances import HAND_F32, PIXELS_BF16, PIXELS_F32, PIXELS_F64, PIXELS_SCALED_F32

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None or importlib.util.find_spec("torchvision") is None,
    reason="torchvision is the reference",
)

RNG = np.random.default_rng(0)
SMALL = TransformConfig(min_size=48, max_size=80)


def reference(config: TransformConfig):
    """torchvision's transform with the same options, in evaluation mode."""
    from flaxdet.convert import reference

    reference.torchvision()
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    return GeneralizedRCNNTransform(
        config.min_size,
        config.max_size,
        config.image_mean,
        config.image_std,
        config.size_divisible,
        config.fixed_size,
    ).eval()


def noise(rows: int, columns: int, dtype=np.uint8) -> np.ndarray:
    if dtype == np.uint8:
        return RNG.integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    return RNG.random((rows, columns, 3)).astype(dtype)


# Sizes


@needs_torch
@pytest.mark.parametrize(("min_size", "max_size"), [(800, 1333), (256, 342), (97, 4000), (1, 7)])
def test_resized_size_is_torchvisions(min_size, max_size):
    import torch

    config = TransformConfig(min_size, max_size)
    theirs = reference(config)
    rng = np.random.default_rng(1)
    sides = np.arange(1, 2001)
    pairs = np.concatenate(
        [
            np.stack([sides, sides], axis=1)[::16],
            np.stack([sides, np.minimum(sides * 3 // 2, 2000)], axis=1)[::16],
            [(97, 97), (97, 160), (160, 97), (1, 1), (1, 1333), (1333, 1), (67, 1333), (1333, 40)],
            rng.integers(1, 2001, (600, 2)),
        ]
    )
    impossible = 0
    for rows, columns in pairs.tolist():
        image = torch.empty((1, rows, columns), dtype=torch.uint8)  # only shapes count, and these are quick
        try:
            expected = tuple(theirs.resize(image)[0].shape[1:])
        except RuntimeError:  # "Input and output sizes should be greater than 0"
            impossible += 1
            with pytest.raises(ValueError, match=f"{rows}x{columns}.*too elongated"):
                resized_size((rows, columns), config)
            continue
        assert resized_size((rows, columns), config) == expected, (rows, columns)
    assert impossible < len(pairs) / 2


def test_sizes_known_by_hand():
    config = TransformConfig()
    assert resized_size((600, 800), config) == (800, 1066)
    assert resized_size((480, 640), config) == (800, 1066)
    assert resized_size((97, 97), config) == (799, 799)  # 97 * (800 / 97) is 799.9999999999999
    assert resized_size((67, 1333), config) == (67, 1333)
    assert resized_size((1, 1), config) == (800, 800)
    assert resized_size((1, 1333), config) == (1, 1333)
    assert canvas_size((800, 1066), config) == (800, 1088)
    assert canvas_size((800, 1066), TransformConfig(size_divisible=1)) == (800, 1066)


@pytest.mark.parametrize("size", [(1, 1334), (1334, 1), (1, 2000)])
def test_a_side_without_pixels_is_an_error(size):
    with pytest.raises(
        ValueError, match=rf"image 3 of {size[0]}x{size[1]} .*0.*elongated for min_size=800, max_size=1333"
    ):
        resized_size(size, TransformConfig(), name="image 3")
    with pytest.raises(ValueError, match=r"image 1 of .* elongated"):
        transform([noise(4, 4), noise(1, 90)], TransformConfig(min_size=48, max_size=80))


def test_options_of_the_size():
    assert resized_size((10, 999), TransformConfig(fixed_size=(160, 96))) == (96, 160)  # (width, height)
    several = TransformConfig(min_size=(480, 512, 640))
    assert resized_size((100, 100), several) == (640, 640)  # the last, in evaluation
    assert resized_size((100, 100), several, min_size=480) == (480, 480)
    assert resized_size((100, 1000), TransformConfig(), min_size=600) == (133, 1333)


# Pixels

CASES = {
    "up": ((20, 30), {}),
    "down": ((120, 170), {}),
    "down a lot": ((480, 640), {}),
    "max_size binds": ((30, 200), {}),
    "portrait": ((90, 40), {}),
    "1x1": ((1, 1), {}),
    "one row": ((1, 60), {}),
    "raw bucket filled exactly": ((128, 256), {}),
    "one over a raw bucket": ((129, 257), {}),
    "97 gives one less": ((97, 97), {"min_size": 800, "max_size": 1333}),
    "unchanged": ((48, 64), {}),
    "fixed_size": ((33, 57), {"fixed_size": (90, 40)}),
    "normalisation": ((33, 57), {"image_mean": (0.2, 0.5, 0.7), "image_std": (0.5, 0.4, 0.3)}),
    "size_divisible": ((33, 57), {"size_divisible": 50}),
}


@needs_torch
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("given", [np.uint8, np.float32])
@pytest.mark.parametrize("case", CASES)
def test_pixels_are_torchvisions(case, given, dtype):
    import torch

    shape, options = CASES[case]
    config = TransformConfig(**{"min_size": 48, "max_size": 80} | options)
    image = noise(*shape, given)
    tensor = torch.from_numpy(image).permute(2, 0, 1).to(getattr(torch, dtype))
    expected, _ = reference(config)([tensor / 255 if given == np.uint8 else tensor])
    with jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext():
        batch = transform([image], config, dtype=dtype)
    assert batch.pixels.dtype == dtype
    assert batch.canvas is None
    assert batch.size.tolist() == [list(expected.image_sizes[0])]
    assert batch.original_size.tolist() == [list(shape)]
    found = np.asarray(batch.pixels)
    theirs = expected.tensors.permute(0, 2, 3, 1).numpy()
    assert found.shape == theirs.shape
    np.testing.assert_allclose(found, theirs, rtol=0, atol=PIXELS_F64 if dtype == "float64" else PIXELS_F32)
    rows, columns = expected.image_sizes[0]
    assert not found[:, rows:].any()
    assert not found[:, :, columns:].any()


def test_uint8_and_its_floats_are_the_same_image():
    image = noise(30, 50)
    whole = transform([image], SMALL)
    for floats in (image.astype(np.float32) / 255, image.astype(np.float64) / 255):
        np.testing.assert_allclose(transform([floats], SMALL).pixels, whole.pixels, rtol=0, atol=PIXELS_SCALED_F32)
    half = transform([(image / 255).astype(jnp.bfloat16)], SMALL)  # 8 bits of mantissa, normalised by .22
    np.testing.assert_allclose(half.pixels, whole.pixels, rtol=0, atol=PIXELS_BF16)
    assert half.pixels.dtype == jnp.float32


def test_float64_input_loses_nothing(x64):
    image = noise(30, 50, np.float64)
    found = transform(
        [image], TransformConfig(min_size=30, max_size=50, image_mean=(0, 0, 0), image_std=(1, 1, 1)), dtype=np.float64
    )
    np.testing.assert_array_equal(found.pixels[0, :30, :50], image)


def test_a_constant_image_stays_constant():
    for shape in ((1, 1), (7, 5), (300, 200)):
        batch = transform([np.full((*shape, 3), 255, np.uint8)], SMALL)
        rows, columns = batch.size[0].tolist()
        expected = (1 - np.array(SMALL.image_mean)) / np.array(SMALL.image_std)
        inside = np.asarray(batch.pixels[0, :rows, :columns], np.float64)
        np.testing.assert_allclose(inside, np.broadcast_to(expected, inside.shape), atol=HAND_F32)


@pytest.mark.parametrize("new_size", [(48, 60), (11, 13), (64, 64)])
def test_what_lies_beyond_the_image_is_not_read(new_size):
    """Rubbish in the raw padding, even NaN, neither leaks in over the border nor stays in the result."""
    image = noise(20, 30, np.float32)
    padded = np.full((64, 64, 3), np.nan, np.float32)
    padded[:20, :30] = image
    options = {"bucket": (64, 64), "mean": SMALL.image_mean, "std": SMALL.image_std, "dtype": np.float32}
    found, expected = (
        resize_image(array, np.array([20, 30], np.int32), np.array(new_size, np.int32), **options)
        for array in (padded, image)
    )
    np.testing.assert_array_equal(found, expected)
    assert not np.asarray(found)[new_size[0] :].any()
    assert not np.asarray(found)[:, new_size[1] :].any()


def test_sizes_within_a_bucket_share_one_compile():
    before = resize_image._cache_size()
    for shape in ((130, 140), (200, 250), (250, 140), (256, 256)):
        transform([noise(*shape)], SMALL, bucket=(96, 96))
    assert resize_image._cache_size() == before + 1


# Batches


@needs_torch
def test_canvas_batch_is_torchvisions_batch():
    import torch

    images = [noise(20, 60), noise(50, 30), noise(48, 48)]
    tensors = [torch.from_numpy(image).permute(2, 0, 1) / 255 for image in images]
    expected, _ = reference(SMALL)(tensors)
    batch = transform(images, SMALL, canvas="batch")
    assert batch.canvas is None
    assert batch.size.tolist() == [list(size) for size in expected.image_sizes]
    np.testing.assert_allclose(batch.pixels, expected.tensors.permute(0, 2, 3, 1).numpy(), rtol=0, atol=PIXELS_F32)


def test_canvases():
    images = [noise(20, 60), noise(50, 30), noise(48, 48)]
    sizes = [[26, 80], [80, 48], [48, 48]]
    own = transform(images, SMALL)
    assert own.size.tolist() == sizes
    assert own.original_size.tolist() == [[20, 60], [50, 30], [48, 48]]
    assert own.canvas.tolist() == [[32, 96], [96, 64], [64, 64]]
    assert own.pixels.shape == (3, 96, 96, 3)
    assert own.roi_reference_height.tolist() == [26, 80, 48]  # its own
    shared = transform(images, SMALL, canvas="batch")
    assert shared.canvas is None
    assert shared.roi_reference_height.tolist() == [80, 80, 80]  # the largest that shares the canvas
    np.testing.assert_array_equal(shared.pixels, own.pixels)
    for batch in (own, shared):
        for field in (batch.size, batch.original_size, batch.roi_reference_height):
            assert field.dtype == np.int32


def test_bucket():
    image = noise(40, 60)  # 48x72 after the resize
    alone = transform([image], SMALL)
    assert alone.pixels.shape == (1, 64, 96, 3)
    exact = transform([image], SMALL, bucket=(64, 96))
    assert alone.canvas is None
    assert exact.canvas is None
    larger = transform([image], SMALL, bucket=(96, 128))
    assert larger.canvas.tolist() == [[64, 96]]
    assert larger.pixels.shape == (1, 96, 128, 3)
    np.testing.assert_array_equal(larger.pixels[:, :64, :96], alone.pixels)
    assert not np.asarray(larger.pixels)[:, 64:].any()
    same = transform([image, image[::-1]], SMALL)  # equal canvases fill their bucket
    assert same.canvas is None
    batch = transform([image], SMALL, canvas="batch", bucket=[96, 128])
    assert batch.canvas.tolist() == [[64, 96]]


def test_bad_arguments():
    image = noise(40, 60)
    with pytest.raises(ValueError, match=r"bucket should hold 64x96 \(rows x columns\), got \(64, 64\)"):
        transform([image], SMALL, bucket=(64, 64))
    with pytest.raises(ValueError, match='canvas should be "image" or "batch", got \'own\''):
        transform([image], SMALL, canvas="own")
    with pytest.raises(ValueError, match="at least one image, got an empty list"):
        transform([], SMALL)
    odd = TransformConfig(min_size=48, max_size=80, size_divisible=50)
    assert transform([image], odd).pixels.shape == (1, 50, 100, 3)
    assert transform([image, noise(60, 10)], odd, canvas="batch").canvas is None
    with pytest.raises(ValueError, match="multiples of 32, got size_divisible=50"):
        transform([image], odd, bucket=(150, 150))
    with pytest.raises(ValueError, match="multiples of 32, got size_divisible=50"):
        transform([noise(10, 60), noise(60, 60)], odd)
    with pytest.raises(ValueError, match=r"multiples of 32.* bucket \(100, 128\)"):
        transform([image], SMALL, bucket=(100, 128))


def test_multiples_of_32_are_no_fault():
    wide = TransformConfig(min_size=48, max_size=80, size_divisible=64)
    assert transform([noise(40, 60)], wide, bucket=(64, 192)).canvas.tolist() == [[64, 128]]


# Back to the original


def detections(boxes) -> Detections:
    count = boxes.shape[:2]
    return Detections(
        boxes=jnp.asarray(boxes),
        scores=jnp.zeros(count, boxes.dtype),
        labels=jnp.zeros(count, jnp.int32),
        valid=jnp.ones(count, bool),
        overflow=jnp.zeros(count[:1], bool),
    )


@needs_torch
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_to_original_is_torchvisions(dtype):
    import torch

    images = [noise(20, 60), noise(53, 31), noise(97, 97)]
    boxes = (RNG.random((3, 6, 4)) * 90).astype(dtype)
    with jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext():
        batch = transform(images, SMALL, dtype=dtype)
        found = to_original(detections(boxes), batch)
    results = [{"boxes": torch.from_numpy(rows.copy())} for rows in boxes]
    sizes, originals = ([tuple(size) for size in array.tolist()] for array in (batch.size, batch.original_size))
    expected = np.stack([row["boxes"].numpy() for row in reference(SMALL).postprocess(results, sizes, originals)])
    assert found.boxes.dtype == dtype
    np.testing.assert_array_equal(found.boxes, expected)  # to the bit: its quotient is a float32 in float64 too
    if dtype == "float64":
        exact = (
            boxes * np.array([[o[1] / s[1], o[0] / s[0]] * 2 for s, o in zip(sizes, originals, strict=True)])[:, None]
        )
        assert np.abs(exact - expected).max() > 1e-9


# TransformConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_size": 0}, "min_size should be one or more positive numbers, got"),
        ({"min_size": ()}, "min_size"),
        ({"min_size": (800, -1)}, "min_size"),
        ({"max_size": 0}, "max_size should be positive, got 0"),
        ({"image_mean": (0.5,)}, "should have 3 values"),
        ({"image_std": (1, 1, 1, 1)}, "should have 3 values"),
        ({"image_std": (1, 0, 1)}, "image_std should be positive"),
        ({"size_divisible": 0}, "size_divisible should be a positive integer, got 0"),
        ({"size_divisible": 1.5}, "size_divisible"),
        ({"fixed_size": (100,)}, r"fixed_size should be \(width, height\)"),
        ({"fixed_size": (100, 0)}, "fixed_size"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        TransformConfig(**options)


def test_options_are_hashable_and_equal():
    lists = TransformConfig(min_size=[480, 800], image_mean=[0, 0, 0], image_std=[1, 1, 1], fixed_size=[5, 6])
    tuples = TransformConfig(min_size=(480, 800), image_mean=(0, 0, 0), image_std=(1, 1, 1), fixed_size=(5, 6))
    assert lists == tuples
    assert hash(lists) == hash(tuples)
    assert TransformConfig(800) == TransformConfig((800,))


# Bad images: each is named by its number

GOOD = np.zeros((4, 5, 3), np.uint8)
FLOATS = np.full((4, 5, 3), 0.5, np.float32)


def changed(value) -> np.ndarray:
    image = FLOATS.copy()
    image[2, 3, 1] = value
    return image


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (GOOD[..., 0], ValueError, r"expected shape \[H, W, 3\], got \[4, 5\]"),
        (GOOD[None], ValueError, r"\[H, W, 3\], got \[1, 4, 5, 3\]"),
        (np.uint8(3), ValueError, r"\[H, W, 3\], got \[\]"),
        (GOOD[..., :1], ValueError, r"\[H, W, 3\], got \[4, 5, 1\]"),
        (np.zeros((4, 5, 4), np.uint8), ValueError, r"\[H, W, 3\], got \[4, 5, 4\]"),
        (np.moveaxis(GOOD, -1, 0), ValueError, r"\[H, W, 3\], got \[3, 4, 5\]"),
        (GOOD[:0], ValueError, r"at least one pixel, got shape \[0, 5, 3\]"),
        (GOOD[:, :0], ValueError, r"at least one pixel, got shape \[4, 0, 3\]"),
        (changed(np.nan), ValueError, "floats in \\[0, 1\\], got .*nan"),
        (changed(np.inf), ValueError, r"floats in \[0, 1\], got values from 0.5 to inf"),
        (changed(-0.25), ValueError, r"floats in \[0, 1\], got values from -0.25 to 0.5"),
        (changed(1.5), ValueError, r"floats in \[0, 1\], got values from 0.5 to 1.5"),
        (GOOD.astype(np.float32) + 255, ValueError, r"floats in \[0, 1\], got values from 255 to 255"),
        (GOOD.astype(np.int32), TypeError, r"expected uint8, or floats in \[0, 1\], got dtype int32"),
        (GOOD.astype(np.uint16), TypeError, "got dtype uint16"),
        (GOOD.astype(np.int8), TypeError, "got dtype int8"),
        (GOOD.astype(bool), TypeError, "got dtype bool"),
        (GOOD.astype(np.complex64), TypeError, "got dtype complex64"),
        ("photo.jpg", TypeError, "got dtype <U9"),
        (None, TypeError, "got dtype object"),
        ([[1, 2], [3]], ValueError, r"expected an array \[H, W, 3\]"),
    ],
)
def test_bad_images_are_named(image, error, message):
    with pytest.raises(error, match=f"^photo: .*{message}"):
        check_image(image, "photo")
    good = FLOATS if getattr(image, "dtype", None) == np.float32 else GOOD
    with pytest.raises(error, match=f"^image 2: .*{message}"):
        check_images([good, good, image])
    with pytest.raises(error, match=r"^image 2: "):
        transform([good, good, image], SMALL)


def test_mixed_dtypes_are_named():
    with pytest.raises(TypeError, match="image 1: expected every image in one dtype, got float32 after uint8"):
        check_images([GOOD, FLOATS])
    with pytest.raises(TypeError, match=r"image 2: .* got float64 after float32"):
        check_images([FLOATS, FLOATS, FLOATS.astype(np.float64)])


@pytest.mark.parametrize("image", [GOOD, GOOD[..., 0], FLOATS], ids=["colour", "grey", "floats"])
def test_one_array_instead_of_a_list(image):
    with pytest.raises(TypeError, match=f"expected a list of images, got one array of rank {image.ndim}"):
        check_images(image)


@pytest.mark.parametrize("images", [None, 3, "photo.jpg", {"image": GOOD}])
def test_something_else_instead_of_a_list(images):
    with pytest.raises(TypeError, match=f"expected a list of images, got {type(images).__name__}"):
        check_images(images)


def test_good_images_pass():
    from PIL import Image

    for image in (GOOD, FLOATS, FLOATS.astype(np.float64), FLOATS.astype(np.float16), jnp.asarray(GOOD)):
        assert check_image(image, "image").shape == (4, 5, 3)
    assert check_image(changed(1.0) * 0, "image").dtype == np.float32
    assert check_images([]) == []
    assert len(check_images(np.stack([GOOD, GOOD]))) == 2  # a batch of equal sizes is a list of images
    assert check_images(image for image in [GOOD, GOOD])[1].shape == (4, 5, 3)
    np.testing.assert_array_equal(check_image(Image.fromarray(GOOD + 7), "image"), GOOD + 7)
    one = math.nextafter(1, 2)
    with pytest.raises(ValueError, match="expected floats in"):
        check_image(np.full((1, 1, 3), one), "image")


def target(boxes, labels):
    return {"boxes": np.asarray(boxes, np.float32), "labels": np.asarray(labels, np.int64)}


def test_targets_are_resized_and_padded():
    batch = transform([noise(40, 60), noise(30, 30)], TransformConfig(min_size=80, max_size=200))
    targets = transform_targets([target([[0, 0, 30, 20], [6, 4, 60, 40]], [1, 2]), target([], [])], batch, max_boxes=3)
    np.testing.assert_array_equal(targets.valid, [[True, True, False], [False] * 3])
    np.testing.assert_array_equal(targets.labels, [[1, 2, 0], [0, 0, 0]])
    np.testing.assert_allclose(targets.boxes[0], [[0, 0, 60, 40], [12, 8, 120, 80], [0] * 4], rtol=HAND_F32)
    assert transform_targets([target([], []), target([], [])], batch).boxes.shape == (2, 1, 4)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (target([[1, 1, 5, 5], [3, 3, 3, 9]], [1, 1]), r"positive height and width. Found invalid box \[3.0, 3.0, 3.0"),
        (target([[1, 1, np.nan, 5]], [1]), "Found invalid box .* for target at index 1"),
        (target([[1, 1, 5]], [1]), r"of shape \[N, 4\], got \[1, 3\] for target at index 1"),
        (target([[1, 1, 5, 5]], [1, 2]), r"image 1: expected a label for each of 1 boxes, got \[2\]"),
        (target([[1, 1, 5, 5]], [7]), "image 1: label 7 should be from 0 to 7 - 1"),
        (target([[1, 1, 5, 5]], [-1]), "image 1: label -1 should be"),
        (target([[1, 1, 5, 5]] * 4, [1] * 4), "image 1 has 4 boxes, more than max_boxes=3"),
    ],
)
def test_bad_targets(bad, message):
    batch = transform([noise(40, 60), noise(30, 30)], TransformConfig(min_size=80, max_size=200))
    with pytest.raises(ValueError, match=message):
        transform_targets([target([[0, 0, 30, 20]], [1]), bad], batch, max_boxes=3, num_classes=7)


def test_targets_need_one_for_each_image_and_integer_labels():
    batch = transform([noise(40, 60)], TransformConfig(min_size=80, max_size=200))
    with pytest.raises(ValueError, match="a target for each of 1 images, got 2"):
        transform_targets([target([], [])] * 2, batch)
    with pytest.raises(TypeError, match="image 0: target labels should be integers, got float32"):
        transform_targets([{"boxes": np.array([[1, 1, 2, 2]]), "labels": np.ones(1, np.float32)}], batch)
