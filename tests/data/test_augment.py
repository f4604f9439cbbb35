"""Augmentation: answers worked out by hand, and torchvision's functions of the same purpose."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from flaxdet.data.augment import choose_min_size, fixed_size_crop, horizontal_flip, scale_jitter
from tests.tolerances import HAND_F32, JITTER_LEVEL

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None or importlib.util.find_spec("torchvision") is None,
    reason="torchvision is the reference",
)

RNG = np.random.default_rng(0)

IMAGE = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
BOXES = np.array([[0, 0, 30, 20], [3, 4, 10, 9], [25.5, 1, 30, 2.25]], np.float32)


def test_horizontal_flip():
    image, boxes = horizontal_flip(IMAGE, BOXES)
    np.testing.assert_array_equal(image, np.fliplr(IMAGE))
    np.testing.assert_array_equal(boxes, [[0, 0, 30, 20], [20, 4, 27, 9], [0, 1, 4.5, 2.25]])
    for found, expected in zip(horizontal_flip(image, boxes), (IMAGE, BOXES), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert boxes.dtype == np.float32


def test_choose_min_size():
    sizes = (480, 512, 640)
    chosen = [choose_min_size(sizes, chance) for chance in np.arange(0, 1, 1 / 300)]
    assert [chosen.count(size) for size in sizes] == [100, 100, 100]
    assert choose_min_size(sizes, np.nextafter(1, 0)) == 640


@pytest.mark.parametrize(
    ("size", "target", "scale", "expected"),
    [
        ((20, 30), (64, 64), 1.0, (42, 64)),  # 30 -> 64, and 20 * 64 / 30 = 42.67
        ((30, 20), (64, 64), 0.1, (6, 4)),
        ((20, 30), (64, 64), 2.0, (85, 128)),
        ((20, 30), (40, 90), 1.0, (40, 60)),  # the rows bind
        ((1, 200), (64, 64), 0.1, (1, 6)),  # no side is lost
    ],
)
def test_scale_jitter_sizes(size, target, scale, expected):
    image = np.zeros((*size, 3), np.uint8)
    whole = np.array([[0, 0, size[1], size[0]]], np.float32)
    found, boxes = scale_jitter(image, whole, target=target, scale=scale)
    assert found.shape == (*expected, 3)
    np.testing.assert_allclose(boxes, [[0, 0, expected[1], expected[0]]], rtol=HAND_F32)
    assert boxes.dtype == np.float32


@needs_torch
@pytest.mark.parametrize("scale", [0.1, 0.37, 1.0, 1.9])
def test_scale_jitter_pixels_are_torchvisions(scale):
    import torch

    from flaxdet.convert import reference

    reference.torchvision()
    from torchvision.transforms.v2 import functional

    image = RNG.integers(0, 256, (61, 83, 3), dtype=np.uint8)
    found, _ = scale_jitter(image, BOXES, target=(48, 48), scale=scale)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    expected = functional.resize(tensor, list(found.shape[:2]), antialias=True).permute(1, 2, 0).numpy()
    assert np.abs(found.astype(int) - expected).max() <= JITTER_LEVEL


def test_crop_of_a_larger_image():
    fill = (1, 2, 3)
    for chance, (top, left) in ((0.0, (0, 0)), (0.5, (4, 6)), (0.999, (7, 11))):  # rest 8 rows, 12 columns
        image, boxes, keep = fixed_size_crop(IMAGE, BOXES, size=(12, 18), chance=chance, fill=fill)
        np.testing.assert_array_equal(image, IMAGE[top : top + 12, left : left + 18])
        expected = BOXES - np.array([left, top, left, top], np.float32)
        np.testing.assert_array_equal(boxes[:, ::2], expected[:, ::2].clip(0, 18))
        np.testing.assert_array_equal(boxes[:, 1::2], expected[:, 1::2].clip(0, 12))
        np.testing.assert_array_equal(keep, (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]))
    _, boxes, keep = fixed_size_crop(IMAGE, BOXES, size=(12, 18), chance=0.5, fill=fill)
    np.testing.assert_array_equal(keep, [True, True, False])  # the last lies above the cut
    np.testing.assert_array_equal(boxes[:2], [[0, 0, 18, 12], [0, 0, 4, 5]])


def test_padding_of_a_smaller_image():
    image, boxes, keep = fixed_size_crop(IMAGE, BOXES, size=(25, 40), chance=0.7, fill=(1, 2, 3))
    np.testing.assert_array_equal(image[:20, :30], IMAGE)
    assert (image[20:] == (1, 2, 3)).all()
    assert (image[:, 30:] == (1, 2, 3)).all()
    np.testing.assert_array_equal(boxes, BOXES)
    assert keep.all()


def test_larger_in_one_direction_only():
    image, boxes, keep = fixed_size_crop(IMAGE, BOXES, size=(25, 10), chance=0.5, fill=(0, 0, 0))
    np.testing.assert_array_equal(image[:20], IMAGE[:, 10:20])
    assert not image[20:].any()
    np.testing.assert_array_equal(boxes, [[0, 0, 10, 20], [0, 4, 0, 9], [10, 1, 10, 2.25]])
    np.testing.assert_array_equal(keep, [True, False, False])


def test_no_boxes():
    none = np.zeros((0, 4), np.float32)
    assert horizontal_flip(IMAGE, none)[1].shape == (0, 4)
    assert scale_jitter(IMAGE, none, target=(8, 8), scale=1.0)[1].shape == (0, 4)
    _, boxes, keep = fixed_size_crop(IMAGE, none, size=(8, 8), chance=0.5, fill=(0, 0, 0))
    assert boxes.shape == (0, 4)
    assert keep.shape == (0,)


def test_arguments_are_not_written_to():
    image, boxes = IMAGE.copy(), BOXES.copy()
    horizontal_flip(image, boxes)
    scale_jitter(image, boxes, target=(8, 8), scale=1.0)
    fixed_size_crop(image, boxes, size=(8, 8), chance=0.5, fill=(0, 0, 0))
    np.testing.assert_array_equal(image, IMAGE)
    np.testing.assert_array_equal(boxes, BOXES)
