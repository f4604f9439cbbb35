"""The resize, normalisation and padding: pixels and batches against torchvision."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdet.images.resize import resize_image
from flaxdet.images.transform import transform
from flaxdet.structures import TransformConfig
from tests.tolerances import HAND_F32, PIXELS_BF16, PIXELS_F32, PIXELS_F64, PIXELS_SCALED_F32
from tests.transforms import SMALL, needs_torch, noise, reference

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
    shared = transform(images, SMALL, canvas="batch")
    assert shared.canvas is None
    np.testing.assert_array_equal(shared.pixels, own.pixels)
    for batch in (own, shared):
        for field in (batch.size, batch.original_size):
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
    whole = transform([image], SMALL, canvas="bucket", bucket=(96, 128))
    assert whole.canvas is None
    np.testing.assert_array_equal(whole.pixels, larger.pixels)
    assert transform([image, image.swapaxes(0, 1)], SMALL, canvas="bucket").canvas is None


def test_bad_arguments():
    image = noise(40, 60)
    with pytest.raises(ValueError, match=r"bucket should hold 64x96 \(rows x columns\), got \(64, 64\)"):
        transform([image], SMALL, bucket=(64, 64))
    with pytest.raises(ValueError, match='canvas should be "image", "batch" or "bucket", got \'own\''):
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
