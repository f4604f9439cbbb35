"""Sizes after the resize and of the canvas, and boxes back at the original size, as torchvision's."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdet.images.transform import canvas_size, resized_size, to_original, transform
from flaxdet.structures import Detections, TransformConfig
from tests.transforms import RNG, SMALL, needs_torch, noise, reference

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


# Back to the original


def detections(boxes) -> Detections:
    count = boxes.shape[:2]
    return Detections(
        boxes=jnp.asarray(boxes),
        scores=jnp.zeros(count, boxes.dtype),
        labels=jnp.zeros(count, jnp.int32),
        valid=jnp.ones(count, bool),
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
