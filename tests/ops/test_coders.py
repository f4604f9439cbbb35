from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdet.ops import BoxCoder, BoxLinearCoder
from tests.ops.cases import assert_close, check_transforms, random_boxes, torchvision
from tests.tolerances import DECODED_F32, DECODED_F64

WEIGHTS = ((1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0))


@pytest.fixture
def rng():
    return np.random.default_rng(1)


def reference():
    torchvision()
    from torchvision.models.detection import _utils

    return _utils


@pytest.mark.parametrize("weights", WEIGHTS)
def test_encode_matches_torchvision(weights, dtype, rng):
    coder = reference().BoxCoder(weights)
    import torch

    boxes, anchors = random_boxes(rng, 60, dtype), random_boxes(rng, 60, dtype)
    anchors[:10] = boxes[:10]  # offsets of exactly 0
    ours = jax.jit(BoxCoder(weights).encode)(jnp.asarray(boxes), jnp.asarray(anchors))
    assert_close(ours, coder.encode_single(torch.tensor(boxes), torch.tensor(anchors)), dtype)
    assert not np.asarray(ours)[:10].any()


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("classes", [1, 3])
def test_decode_matches_torchvision(weights, classes, dtype, rng):
    coder = reference().BoxCoder(weights)
    import torch

    anchors = random_boxes(rng, 40, dtype)
    codes = (rng.normal(size=(40, classes, 4)) * 2 * weights[2]).astype(dtype)
    codes[:8, :, 2:] = [40 * weights[2], -300 * weights[2]]  # far beyond the clip, and vanishing
    codes[8:16, :, 2] = np.float32(coder.bbox_xform_clip * weights[2])
    theirs = coder.decode(torch.tensor(codes.reshape(40, -1)), [torch.tensor(anchors)])
    decode = jax.jit(BoxCoder(weights).decode)
    assert_close(decode(jnp.asarray(codes), jnp.asarray(anchors)), theirs, dtype)
    assert_close(decode(jnp.asarray(codes[:, 0]), jnp.asarray(anchors)), theirs[:, 0], dtype)


def test_decode_gradient_matches_torch(dtype, rng):
    coder = reference().BoxCoder(WEIGHTS[1])
    import torch

    anchors = random_boxes(rng, 12, dtype)
    codes = rng.normal(size=(12, 4)).astype(dtype)
    codes[0] = 500  # clipped: no gradient to the size
    codes[1, 2:] = dtype(coder.bbox_xform_clip) * 5  # at the clip itself: still a gradient
    leaf = torch.tensor(codes, requires_grad=True)
    (coder.decode_single(leaf, torch.tensor(anchors)) ** 2).sum().backward()
    gradient = jax.jit(jax.grad(lambda c: jnp.sum(BoxCoder(WEIGHTS[1]).decode(c, jnp.asarray(anchors)) ** 2)))
    ours = gradient(jnp.asarray(codes))
    assert_close(ours, leaf.grad, dtype, factor=2)
    assert not np.asarray(ours)[0, 2:].any()
    assert np.asarray(ours)[1, 2:].all()


@pytest.mark.parametrize("normalize", [True, False])
def test_linear_coder_matches_torchvision(normalize, dtype, rng):
    coder = reference().BoxLinearCoder(normalize)
    import torch

    anchors, boxes = random_boxes(rng, 60, dtype), random_boxes(rng, 60, dtype)
    codes = np.abs(rng.normal(size=(60, 4))).astype(dtype)
    ours = BoxLinearCoder(normalize)
    encoded = jax.jit(ours.encode)(jnp.asarray(anchors), jnp.asarray(boxes))
    assert_close(encoded, coder.encode(torch.tensor(anchors), torch.tensor(boxes)), dtype)
    decoded = jax.jit(ours.decode)(jnp.asarray(codes), jnp.asarray(anchors))
    assert_close(decoded, coder.decode(torch.tensor(codes), torch.tensor(anchors)), dtype)


@pytest.mark.parametrize("coder", [BoxCoder(), BoxCoder(WEIGHTS[1]), BoxLinearCoder(), BoxLinearCoder(False)])
def test_decode_inverts_encode(coder, dtype, rng):
    anchors, boxes = random_boxes(rng, 30, dtype), random_boxes(rng, 30, dtype)
    anchors[:, 2:] += 10  # no box is more than 62.5 anchors long, where decoding clips
    arguments = (anchors, boxes) if isinstance(coder, BoxLinearCoder) else (boxes, anchors)
    codes = jax.jit(coder.encode)(*map(jnp.asarray, arguments))
    back = jax.jit(coder.decode)(codes, jnp.asarray(anchors))
    # offsets of many anchor lengths come back with their rounding in pixels
    np.testing.assert_allclose(back, boxes, rtol=0, atol=DECODED_F32 if dtype is np.float32 else DECODED_F64)


@pytest.mark.parametrize("coder", [BoxCoder(WEIGHTS[1]), BoxLinearCoder()])
def test_transforms(coder, rng):
    a, b = random_boxes(rng, 6, np.float32), random_boxes(rng, 6, np.float32)
    check_transforms(coder.encode, a, b)
    check_transforms(coder.decode, rng.normal(size=(6, 2, 4)).astype(np.float32), b)


def test_boxes_follow_the_dtype_of_the_codes_and_half_precision_is_float32(x64):
    codes = np.ones((2, 4))
    boxes = random_boxes(np.random.default_rng(0), 2, np.float64)
    narrow = boxes.astype(jnp.bfloat16)
    for coder in (BoxCoder(), BoxLinearCoder()):
        decode = jax.jit(coder.decode)
        assert decode(codes.astype(np.float32), boxes).dtype == jnp.float32
        assert decode(codes, boxes).dtype == jnp.float64
        assert decode(codes.astype(jnp.bfloat16), boxes).dtype == jnp.float32
        assert jax.jit(coder.encode)(narrow, narrow).dtype == jnp.float32


def test_padding_encodes_to_infinity_as_documented():
    codes = jax.jit(BoxCoder().encode)(jnp.zeros((1, 4)), jnp.array([[0.0, 0, 8, 8]]))
    np.testing.assert_array_equal(codes, [[-0.5, -0.5, -np.inf, -np.inf]])


def test_coders_are_static_arguments():
    assert BoxCoder([10, 10, 5, 5]) == BoxCoder(WEIGHTS[1])  # pyright: ignore
    assert len({BoxCoder(), BoxCoder((1, 1, 1, 1)), BoxLinearCoder()}) == 2


@pytest.mark.parametrize("weights", [(1, 1, 1), (0, 1, 1, 1)])
def test_bad_weights(weights):
    with pytest.raises(ValueError, match="weights must be four numbers other than 0"):
        BoxCoder(weights)


@pytest.mark.parametrize("coder", [BoxCoder(), BoxLinearCoder()])
@pytest.mark.parametrize("shape", [(5, 8), (4, 4), (5, 2, 3), (), (5, 2, 2, 4)])
def test_bad_shapes(coder, shape):
    with pytest.raises(ValueError, match=r"rel_codes must be \[N, 4\] or \[N, k, 4\] and boxes \[N, 4\], found"):
        coder.decode(jnp.zeros(shape), jnp.zeros((5, 4)))
