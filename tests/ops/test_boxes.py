from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdet import ops
from tests.ops.cases import (
    adversarial_boxes,
    assert_close,
    check_transforms,
    random_boxes,
    torchvision,
)
from tests.tolerances import HAND_F32

PAIRWISE = ("box_iou", "generalized_box_iou", "distance_box_iou", "complete_box_iou")
FORMATS = ("xyxy", "xywh", "cxcywh")

# Shared, so that cases of one shape share a compiled program.
area_jit = jax.jit(ops.box_area, static_argnames="fmt")
iou_jit = jax.jit(ops.box_iou, static_argnames="fmt")
convert_jit = jax.jit(ops.box_convert, static_argnames=("in_fmt", "out_fmt"))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("name", PAIRWISE)
@pytest.mark.parametrize("kind", ["random", "adversarial"])
def test_pairwise_matches_torchvision(name, kind, dtype, rng):
    tv = torchvision()
    import torch

    a, b = random_boxes(rng, 40, dtype), random_boxes(rng, 30, dtype)
    if kind == "adversarial":
        a, b = adversarial_boxes(dtype), np.flip(adversarial_boxes(dtype), axis=0).copy()
    theirs = getattr(tv.ops, name)(torch.tensor(a), torch.tensor(b))
    # areas of up to 1e10 cancel against each other: a few more roundings than the usual handful
    ours = jax.jit(getattr(ops, name))(jnp.asarray(a), jnp.asarray(b))
    assert_close(ours, theirs, dtype, factor=4)


@pytest.mark.parametrize("name", PAIRWISE)
def test_pairwise_gradients_match_torch(name, dtype, rng):
    tv = torchvision()
    import torch

    # equal and touching boxes as well: ties in min and max split the gradient on both sides
    a = np.concatenate((random_boxes(rng, 12, dtype), adversarial_boxes(dtype)[:4]))
    b = np.concatenate((random_boxes(rng, 9, dtype), adversarial_boxes(dtype)[:4]))
    weight = rng.normal(size=(len(a), len(b))).astype(dtype)
    inputs = [torch.tensor(x, requires_grad=True) for x in (a, b)]
    (getattr(tv.ops, name)(*inputs) * torch.tensor(weight)).sum().backward()
    gradients = jax.jit(jax.grad(lambda a, b: jnp.sum(getattr(ops, name)(a, b) * weight), argnums=(0, 1)))
    for gradient, theirs in zip(gradients(jnp.asarray(a), jnp.asarray(b)), inputs, strict=True):
        assert_close(gradient, theirs.grad, dtype, factor=4)


@pytest.mark.parametrize("name", PAIRWISE)
def test_masked_gradients_are_finite(name, dtype):
    boxes = jnp.asarray(adversarial_boxes(dtype))

    def masked_sum(boxes):
        values = getattr(ops, name)(boxes, boxes)
        return jnp.sum(jnp.where(jnp.isfinite(values), values, 0))

    value, gradient = jax.jit(jax.value_and_grad(masked_sum))(boxes)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", PAIRWISE)
def test_pairwise_transforms(name, rng):
    check_transforms(getattr(ops, name), random_boxes(rng, 6, np.float32), random_boxes(rng, 5, np.float32))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("kind", ["float", "int32", "uint8", "bfloat16"])
def test_area_and_iou_in_every_format(fmt, kind, dtype, rng):
    tv = torchvision()
    import torch

    boxes = rng.integers(0, 60, (12, 4)) + np.array([0, 0, 60, 60] if fmt == "xyxy" else [0, 0, 1, 1])
    # of integers its answers for int64, since differences of its narrow ones wrap around
    own = {"float": str(np.dtype(dtype)), "bfloat16": "bfloat16"}.get(kind, "int64")
    theirs = torch.tensor(boxes, dtype=getattr(torch, own))
    ours = boxes.astype(np.int32).astype(dtype if kind == "float" else jnp.dtype(kind))
    area = area_jit(ours, fmt)
    np.testing.assert_array_equal(area, tv.ops.box_area(theirs, fmt).numpy())
    integer = jnp.int64 if dtype == np.float64 else jnp.float32  # the float64 cases run with 64-bit types
    assert area.dtype == {"float": dtype, "bfloat16": jnp.float32}.get(kind, integer)
    result = iou_jit(ours, ours[::2], fmt)
    assert_close(result, tv.ops.box_iou(theirs, theirs[::2], fmt), dtype if kind == "float" else np.float32)


@pytest.mark.parametrize("kind", ["int32", "uint16"])
def test_large_integer_boxes(kind):
    """A square of 50,000 pixels: its area, 2.5e9, is no int32."""
    boxes = np.array([[0, 0, 50_000, 50_000], [25_000, 0, 60_000, 1], [55_000, 5, 60_000, 9]], kind)
    np.testing.assert_array_equal(area_jit(boxes), np.float32([2.5e9, 35_000, 20_000]))
    assert float(np.asarray(iou_jit(boxes[:1], boxes[2:]))[0, 0]) == 0.0
    squares = np.array([[0, 0, 50_000, 50_000], [25_000, 0, 65_000, 50_000]], kind)
    # 25,000 x 50,000 of 65,000 x 50,000
    np.testing.assert_allclose(iou_jit(squares[:1], squares[1:]), [[25 / 65]], rtol=HAND_F32)
    generalized = jax.jit(ops.generalized_box_iou)(squares[:1], squares[1:])
    np.testing.assert_allclose(generalized, [[25 / 65]], rtol=HAND_F32)
    with jax.enable_x64(True):
        wide = area_jit(boxes)
        assert wide.dtype == jnp.int64
        np.testing.assert_array_equal(wide, [2_500_000_000, 35_000, 20_000])


def test_reversed_unsigned_boxes_are_small():
    boxes = jnp.asarray([[10, 10, 30, 30], [30, 10, 10, 30]], jnp.uint8)
    np.testing.assert_array_equal(ops.remove_small_boxes(boxes, 1), [True, False])


@pytest.mark.parametrize("in_fmt", FORMATS)
@pytest.mark.parametrize("out_fmt", FORMATS)
def test_convert_matches_torchvision(in_fmt, out_fmt, dtype, rng):
    tv = torchvision()
    import torch

    boxes = random_boxes(rng, 20, dtype)
    ours = convert_jit(jnp.asarray(boxes), in_fmt, out_fmt)
    assert_close(ours, tv.ops.box_convert(torch.tensor(boxes), in_fmt, out_fmt), dtype)
    assert_close(convert_jit(ours, out_fmt, in_fmt), torch.tensor(boxes), dtype)
    whole = rng.integers(0, 60, (7, 4))
    theirs = tv.ops.box_convert(torch.tensor(whole, dtype=torch.int32), in_fmt, out_fmt).numpy()
    ours = convert_jit(jnp.asarray(whole.astype(np.int32)), in_fmt, out_fmt)
    np.testing.assert_array_equal(ours, theirs)
    assert ours.dtype == theirs.dtype


def test_clip_matches_torchvision(dtype, rng):
    tv = torchvision()
    import torch

    boxes = np.concatenate((random_boxes(rng, 50, dtype), np.array([[np.nan, -1, np.inf, 90]], dtype)))
    theirs = torch.tensor(boxes, requires_grad=True)
    expected = tv.ops.clip_boxes_to_image(theirs, (120, 200))
    expected.sum().backward()
    assert theirs.grad is not None
    for size in ((120, 200), np.array([120, 200]), jnp.array([120, 200], jnp.int32)):
        clipped = jax.jit(ops.clip_boxes_to_image)(jnp.asarray(boxes), size)
        np.testing.assert_array_equal(clipped, expected.detach().numpy())
        assert clipped.dtype == dtype
    on_border = np.array([[0, 0, 200, 120]], dtype)
    gradient = jax.jit(jax.grad(lambda b: jnp.sum(ops.clip_boxes_to_image(b, (120, 200)))))
    np.testing.assert_array_equal(np.asarray(gradient(jnp.asarray(boxes)))[:-1], theirs.grad.numpy()[:-1])
    np.testing.assert_array_equal(gradient(jnp.asarray(on_border)), np.ones((1, 4)))


def test_clip_sizes_differ_under_vmap(rng):
    boxes = random_boxes(rng, 8, np.float32)
    sizes = jnp.array([[100, 50], [30, 300]], jnp.int32)
    clipped = np.asarray(jax.jit(jax.vmap(ops.clip_boxes_to_image, in_axes=(None, 0)))(boxes, sizes))
    for i, (rows, columns) in enumerate([(100, 50), (30, 300)]):
        limit = np.array([columns, rows, columns, rows], np.float32)
        np.testing.assert_array_equal(clipped[i], np.clip(boxes, 0, limit))


def test_small_boxes_match_torchvision(dtype, rng):
    tv = torchvision()
    import torch

    boxes = random_boxes(rng, 60, dtype)
    boxes[::3, 2] = boxes[::3, 0] + dtype(1e-3)
    boxes[1::3, 3] = boxes[1::3, 1] + dtype(1e-2)
    exact = np.array([[0, 0, 1e-3, 1], [0, 0, 1e-2, 1e-2], [0, 0, 0, 5], [np.nan, 0, 1, 1]], dtype)
    boxes = np.concatenate((boxes, exact))
    for min_size in (1e-3, 1e-2, 50.0):
        kept = jax.jit(ops.remove_small_boxes)(jnp.asarray(boxes), min_size)
        theirs = tv.ops.remove_small_boxes(torch.tensor(boxes), min_size)
        np.testing.assert_array_equal(np.flatnonzero(kept), theirs.numpy())


def test_resize_boxes_matches_torchvision(dtype, rng):
    torchvision()
    import torch
    from torchvision.models.detection.transform import resize_boxes

    boxes = random_boxes(rng, 30, dtype)
    for original, new in (((480, 640), (800, 1066)), ((97, 131), (800, 1080)), ((1, 1), (800, 800))):
        theirs = resize_boxes(torch.tensor(boxes), list(original), list(new)).numpy()
        for kind in (tuple, lambda size: jnp.array(size, jnp.int32)):
            ours = jax.jit(ops.resize_boxes)(jnp.asarray(boxes), kind(original), kind(new))
            # one product, so bit for bit: a double quotient would differ by 3e-8
            np.testing.assert_array_equal(ours, theirs)
            assert ours.dtype == dtype


def test_no_boxes():
    none, some = np.zeros((0, 4), np.float32), np.zeros((3, 4), np.float32)
    for name in PAIRWISE:
        assert jax.jit(getattr(ops, name))(none, some).shape == (0, 3)
    assert area_jit(none).shape == (0,)
    assert jax.jit(ops.remove_small_boxes)(none, 1).shape == (0,)
    assert jax.jit(ops.clip_boxes_to_image)(none, (5, 5)).shape == (0, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.box_iou(jnp.zeros((2, 5)), jnp.zeros((2, 4))), r"boxes1 .* 4 coordinates .*\[2, 5\]"),
        (
            lambda: ops.box_area(jnp.zeros((2, 4)), "yxyx"),
            "fmt must be one of xyxy, xywh, cxcywh, found 'yxyx'",
        ),
        (lambda: ops.box_convert(jnp.zeros((2, 4)), "xyxy", "xywhr"), "out_fmt .* found 'xywhr'"),
        (
            lambda: ops.clip_boxes_to_image(jnp.zeros((2, 4)), (1, 2, 3)),
            r"\(rows, columns\), found shape \[3\]",
        ),
        (lambda: ops.remove_small_boxes(jnp.zeros((2, 3)), 1), r"4 coordinates .*\[2, 3\]"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
