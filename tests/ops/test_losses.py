from __future__ import annotations

from functools import partial

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

BOX_LOSSES = ("generalized_box_iou_loss", "distance_box_iou_loss", "complete_box_iou_loss")
REDUCTIONS = ("none", "mean", "sum")


@pytest.fixture
def rng():
    return np.random.default_rng(2)


def compare(ours, theirs, inputs, dtype, factor=1):
    """Values, and gradients with respect to the first input, for every reduction; one compile for all."""
    import torch

    leaf = torch.tensor(inputs[0], requires_grad=True)
    expected = [theirs(leaf, *map(torch.tensor, inputs[1:]), reduction=r) for r in REDUCTIONS]
    weights = [np.random.default_rng(0).normal(size=tuple(e.shape)).astype(dtype) for e in expected]
    gradients = [
        torch.autograd.grad((e * torch.tensor(w)).sum(), leaf, retain_graph=True)[0]
        for e, w in zip(expected, weights, strict=True)
    ]

    def weighted(first, *rest):
        losses = [ours(first, *rest, reduction=r) for r in REDUCTIONS]
        return [jnp.sum(loss * w) for loss, w in zip(losses, weights, strict=True)], losses

    arrays = [jnp.asarray(x) for x in inputs]
    jacobian, losses = jax.jit(jax.jacrev(weighted, has_aux=True))(*arrays)
    for i in range(len(REDUCTIONS)):
        assert_close(losses[i], expected[i], dtype, factor)
        assert_close(jacobian[i], gradients[i], dtype, factor)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2), (-1, 2.0), (0.9, 1.5), (0, 0), (0.5, 3)])
def test_focal_loss(alpha, gamma, dtype, rng):
    tv = torchvision()
    logits = np.concatenate((rng.normal(size=60) * 3, [-30, -8, 0, 8, 30])).astype(dtype)
    targets = (rng.random(65) < 0.3).astype(dtype)
    targets[:3] = 0.25
    ours, theirs = (partial(m.sigmoid_focal_loss, alpha=alpha, gamma=gamma) for m in (ops, tv.ops))
    compare(ours, theirs, (logits, targets), dtype)


def test_focal_gradient_is_finite_where_the_probability_saturates(dtype):
    logits = jnp.array([-1e4, 1e4, -1e4, 1e4], dtype)
    targets = jnp.array([0, 1, 1, 0], dtype)
    for gamma in (0, 0.5, 1, 2):
        run = jax.value_and_grad(partial(ops.sigmoid_focal_loss, gamma=gamma, reduction="sum"))
        loss, gradient = jax.jit(run)(logits, targets)
        assert np.isfinite(loss)
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", BOX_LOSSES)
@pytest.mark.parametrize("eps", [1e-7, pytest.param(1e-2, marks=pytest.mark.ci)])
def test_box_losses(name, eps, dtype, rng):
    tv = torchvision()
    # every size of overlap, then equal, touching, nested and far pairs, where min and max have ties
    special = adversarial_boxes(dtype)[:6]
    a = np.concatenate((random_boxes(rng, 20, dtype, 100), special, special))
    b = np.concatenate((random_boxes(rng, 20, dtype, 100), special, np.roll(special, 1, axis=0)))
    compare(*(partial(getattr(m, name), eps=eps) for m in (ops, tv.ops)), (a, b), dtype, factor=4)


@pytest.mark.parametrize("name", BOX_LOSSES)
def test_box_losses_without_area(name, dtype):
    tv = torchvision()
    import torch

    a = adversarial_boxes(dtype)
    b = np.roll(a, 2, axis=0)
    ours = jax.jit(getattr(ops, name))(jnp.asarray(a), jnp.asarray(b))
    assert_close(ours, getattr(tv.ops, name)(torch.tensor(a), torch.tensor(b)), dtype, factor=4)

    def masked(a, b):
        loss = getattr(ops, name)(a, b)
        return jnp.sum(jnp.where(jnp.isfinite(loss), loss, 0))

    gradients = jax.jit(jax.grad(masked, argnums=(0, 1)))
    for x, y in ((a, b), (np.zeros_like(a), b), (np.zeros_like(a), np.zeros_like(a))):
        for gradient in gradients(jnp.asarray(x), jnp.asarray(y)):
            assert np.isfinite(gradient).all()


@pytest.mark.parametrize("beta", [1 / 9, 1.0, 0.0])
def test_smooth_l1(beta, dtype, rng):
    torchvision()
    import torch.nn.functional as F

    a, b = rng.normal(size=(2, 30, 4)).astype(dtype)
    b[:5] = a[:5]
    b[5:10] = a[5:10] + dtype(0.05)
    compare(*(partial(m.smooth_l1_loss, beta=beta) for m in (ops, F)), (a, b), dtype)


def test_binary_cross_entropy(dtype, rng):
    torchvision()
    import torch.nn.functional as F

    logits = np.concatenate((rng.normal(size=40) * 4, [-100, 100, 0])).astype(dtype)
    targets = rng.random(43).astype(dtype)
    compare(ops.binary_cross_entropy_with_logits, F.binary_cross_entropy_with_logits, (logits, targets), dtype)


@pytest.mark.parametrize("ignored", [-100, 2])
def test_cross_entropy(ignored, dtype, rng):
    torchvision()
    import torch.nn.functional as F

    logits = (rng.normal(size=(30, 7)) * 5).astype(dtype)
    labels = rng.integers(0, 7, 30).astype(np.int32)
    labels[::5] = ignored

    def theirs(x, t, reduction):
        return F.cross_entropy(x, t.long(), ignore_index=ignored, reduction=reduction)

    compare(partial(ops.cross_entropy, ignore_index=ignored), theirs, (logits, labels), dtype)


def test_mean_of_nothing_as_in_torch(dtype):
    tv = torchvision()
    import torch
    import torch.nn.functional as F

    none = np.zeros((0, 4), dtype)
    for name in BOX_LOSSES:
        ours = jax.jit(partial(getattr(ops, name), reduction="mean"))(jnp.asarray(none), jnp.asarray(none))
        theirs = getattr(tv.ops, name)(torch.tensor(none), torch.tensor(none), reduction="mean")
        assert_close(ours, theirs, dtype)
    for name, module in (("smooth_l1_loss", F), ("binary_cross_entropy_with_logits", F)):
        ours = jax.jit(getattr(ops, name))(jnp.asarray(none), jnp.asarray(none))
        assert_close(ours, getattr(module, name)(torch.tensor(none), torch.tensor(none)), dtype)
    logits, ignored = np.zeros((2, 3), dtype), np.full(2, -100, np.int32)
    assert np.isnan(jax.jit(ops.cross_entropy)(logits, ignored))
    assert np.asarray(jax.jit(partial(ops.cross_entropy, reduction="sum"))(logits, ignored)) == 0


def test_half_precision_is_computed_in_float32(rng):
    logits = rng.normal(size=8).astype(jnp.bfloat16)
    targets = np.ones(8, jnp.bfloat16)
    for loss in (ops.sigmoid_focal_loss, ops.binary_cross_entropy_with_logits, ops.smooth_l1_loss):
        assert jax.eval_shape(loss, logits, targets).dtype == jnp.float32
    boxes = random_boxes(rng, 4, np.float32).astype(jnp.bfloat16)
    for name in BOX_LOSSES:
        np.testing.assert_allclose(jax.jit(getattr(ops, name))(boxes, boxes), 0, atol=HAND_F32)


def test_transforms(rng):
    logits, targets = rng.normal(size=(2, 6, 3)).astype(np.float32)
    for loss in (ops.sigmoid_focal_loss, ops.binary_cross_entropy_with_logits, ops.smooth_l1_loss):
        check_transforms(loss, logits, np.abs(targets) % 1)
    check_transforms(ops.cross_entropy, logits, rng.integers(0, 3, 6).astype(np.int32))
    a, b = random_boxes(rng, 6, np.float32), random_boxes(rng, 6, np.float32)
    for name in BOX_LOSSES:
        check_transforms(getattr(ops, name), a, b)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ops.sigmoid_focal_loss(x, x, alpha=1.5), r"alpha must lie in \[0, 1\].* found 1.5"),
        (lambda x: ops.sigmoid_focal_loss(x, x, reduction="avg"), "reduction must be .* found 'avg'"),
        (lambda x: ops.sigmoid_focal_loss(x, x[0]), r"one shape, found \[2, 4\] and \[4\]"),
        (lambda x: ops.generalized_box_iou_loss(x, x, "avg"), "reduction must be .* found 'avg'"),
        (lambda x: ops.distance_box_iou_loss(x, x[:1]), r"both be \[N, 4\], found \[2, 4\] and \[1, 4\]"),
        (lambda x: ops.complete_box_iou_loss(x[:, :3], x[:, :3]), r"both be \[N, 4\], found \[2, 3\]"),
        (lambda x: ops.smooth_l1_loss(x, x, beta=-1), "beta must not be negative, found -1"),
        (lambda x: ops.smooth_l1_loss(x, x, reduction=""), "reduction must be"),
        (lambda x: ops.binary_cross_entropy_with_logits(x, x[:, :1]), "one shape"),
        (lambda x: ops.cross_entropy(x, jnp.zeros(3, jnp.int32)), r"target \[N\], .* target \[3\]"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call, np.zeros((2, 4), np.float32))
