"""What the transform is given: options, images and targets, and every way in which they can be bad."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from flaxdet.images.transform import check_image, check_images, transform, transform_targets
from flaxdet.structures import TransformConfig
from tests.tiny import FCOS_NAME, V2_NAME, tiny_model
from tests.tolerances import HAND_F32
from tests.transforms import SMALL, noise

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
        (changed(1.00012), ValueError, r"floats in \[0, 1\], got values from 0.5 to 1.00012"),  # in full
        (GOOD.astype(np.float32) + 255, ValueError, r"floats in \[0, 1\], got values from 255.\d+ to 255.\d+"),
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


@pytest.mark.parametrize("value", [1.0000001, 1.00009, -0.00009])
def test_a_rounding_outside_the_range_is_taken_as_it_is(value):
    """As torchvision's own resize of floats gives them."""
    image = changed(value)
    assert image[2, 3, 1] != 0.5
    np.testing.assert_array_equal(check_image(image, "photo"), image)


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
    assert check_image(np.full((1, 1, 3), math.nextafter(1, 2)), "image").max() > 1  # and not clipped


# Targets


def target(boxes, labels):
    return {
        "boxes": np.asarray(boxes, np.float32),
        "labels": labels if isinstance(labels, np.ndarray) else np.asarray(labels, np.int64),
    }


def test_targets_are_resized_and_padded():
    batch = transform([noise(40, 60), noise(30, 30)], TransformConfig(min_size=80, max_size=200))
    truth = [target([[0, 0, 30, 20], [6, 4, 60, 40]], [1, 2]), target([], [])]
    targets = transform_targets(truth, batch, num_classes=3, max_boxes=3)
    np.testing.assert_array_equal(targets.valid, [[True, True, False], [False] * 3])
    np.testing.assert_array_equal(targets.labels, [[1, 2, 0], [0, 0, 0]])
    np.testing.assert_allclose(targets.boxes[0], [[0, 0, 60, 40], [12, 8, 120, 80], [0] * 4], rtol=HAND_F32)
    assert transform_targets([target([], []), target([], [])], batch, num_classes=3).boxes.shape == (2, 1, 4)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (target([[1, 1, 5, 5], [3, 3, 3, 9]], [1, 1]), r"positive height and width. Found invalid box \[3.0, 3.0, 3.0"),
        (target([[1, 1, np.nan, 5]], [1]), "Found invalid box .* for target at index 1"),
        (target([[1, 1, 5]], [1]), r"of shape \[N, 4\], got \[1, 3\] for target at index 1"),
        (target([[1, 1, 5, 5]], [1, 2]), r"image 1: expected a label for each of 1 boxes, got \[2\]"),
        (target([[1, 1, 5, 5]], [7]), "image 1, box 0: label 7 should be from 1 to 6: num_classes=7 counts the back"),
        (target([[1, 1, 5, 5]] * 2, [1, 0]), "image 1, box 1: label 0 should be from 1 .* is label 0 and no box's"),
        (target([[1, 1, 5, 5]], [-1]), "image 1, box 0: label -1 should be"),
        (target([[1, 1, 5, 5]], np.uint64([2**63])), "image 1, box 0: label 9223372036854775808 should be"),
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
        transform_targets([target([], [])] * 2, batch, num_classes=3)
    with pytest.raises(TypeError, match="image 0, box 0: labels should be integers, got float32"):
        transform_targets([{"boxes": np.array([[1, 1, 2, 2]]), "labels": np.ones(1, np.float32)}], batch, num_classes=3)


def test_which_labels_there_are_is_told():
    """By the model, or by the number of classes; a box of FCOS may have label 0, as in torchvision."""
    batch = transform([noise(40, 60)], TransformConfig(min_size=80, max_size=200))
    zero, three = (target([[1, 1, 5, 5]], [label]) for label in (0, 3))
    fcos, rcnn = tiny_model(FCOS_NAME, num_classes=4), tiny_model(V2_NAME, num_classes=4)
    for options in ({"model": fcos}, {"num_classes": 4, "background": False}):
        assert transform_targets([zero], batch, **options).labels.tolist() == [[0]]
    for options in ({"model": fcos}, {"model": rcnn}, {"num_classes": 4}):
        assert transform_targets([three], batch, **options).labels.tolist() == [[3]]
    for options in ({"model": rcnn}, {"num_classes": 4}):
        with pytest.raises(ValueError, match="image 0, box 0: label 0 should be from 1 to 3"):
            transform_targets([zero], batch, **options)
    for options in ({"model": tiny_model(FCOS_NAME, num_classes=3)}, {"num_classes": 3, "background": False}):
        with pytest.raises(ValueError, match="label 3 should be from 0 to 2: num_classes=3 counts the background"):
            transform_targets([three], batch, **options)
    for options in ({}, {"model": fcos, "num_classes": 4}, {"model": fcos, "background": False}, {"background": False}):
        with pytest.raises(TypeError, match="expected either model, or num_classes"):
            transform_targets([three], batch, **options)
