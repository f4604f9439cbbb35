from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdet import ops
from flaxdet.ops.matching import match_boxes
from flaxdet.xla.routes import routes_for
from tests.ops.cases import adversarial_boxes, check_transforms, random_boxes, torchvision

RPN = {"high_threshold": 0.7, "low_threshold": 0.3, "allow_low_quality_matches": True}
ROI = {"high_threshold": 0.5, "low_threshold": 0.5}

# Shared, so that cases of one shape share a compiled program.
match_jit = jax.jit(ops.match, static_argnames=("high_threshold", "low_threshold", "allow_low_quality_matches"))
fcos_match_jit = jax.jit(ops.fcos_match, static_argnums=2, static_argnames="center_sampling_radius")


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def torchvision_match(iou, **kwargs):
    torchvision()
    import torch
    from torchvision.models.detection._utils import Matcher

    return Matcher(**kwargs)(torch.tensor(iou)).numpy()


@pytest.mark.parametrize("kwargs", [RPN, ROI], ids=["rpn", "roi"])
@pytest.mark.parametrize("kind", ["random", "ties", "thresholds", "zeros", "nan"])
def test_match_equals_torchvision(kwargs, kind, dtype, rng):
    iou = rng.random((7, 90)).astype(dtype)
    if kind == "ties":
        iou = np.round(iou, 1).astype(dtype)
    elif kind == "thresholds":
        # the thresholds' own values and their neighbours: compared as float32 where the IoU is
        values = [dtype(t) for t in (0.3, 0.5, 0.7)]
        values += [np.nextafter(v, dtype(d)) for v in values for d in (0, 1)]
        iou = rng.choice(np.array(values, dtype), (3, 90))
    elif kind == "zeros":
        iou[rng.random(iou.shape) < 0.6] = 0
        iou[2] = 0  # its "best" anchors are all of those without overlap
    elif kind == "nan":
        iou[1, ::9] = np.nan
    ours = match_jit(jnp.asarray(iou), **kwargs)
    assert ours.dtype == jnp.int32
    np.testing.assert_array_equal(ours, torchvision_match(iou, **kwargs))


@pytest.mark.parametrize("kwargs", [RPN, ROI], ids=["rpn", "roi"])
def test_padding_changes_no_match(kwargs, dtype, rng):
    iou = rng.random((5, 60)).astype(dtype)
    iou[rng.random(iou.shape) < 0.6] = 0
    iou[3] = 0  # the low-quality rule makes every zero-overlap anchor its own
    expected = torchvision_match(iou, **kwargs)
    rows = np.array([1, 2, 4, 5, 8])  # padding comes first, between and (by its IoU) before all others
    padded = np.zeros((9, 80), dtype)
    padded[rows, :60] = iou
    padded[:, 60:] = 0.9  # an anchor beyond the canvas may overlap a box; it doesn't count
    padded[7] = 1  # what padding overlaps doesn't count either
    valid_gt, valid = np.isin(np.arange(9), rows), np.arange(80) < 60
    run = jax.jit(lambda iou, valid_gt, valid: ops.match(iou, valid_gt=valid_gt, valid=valid, **kwargs))
    ours = np.asarray(run(jnp.asarray(padded), jnp.asarray(valid_gt), jnp.asarray(valid)))
    np.testing.assert_array_equal(ours[:60], np.where(expected < 0, expected, rows[expected]))
    assert (ours[60:] == ops.BETWEEN_THRESHOLDS).all()
    none = run(jnp.asarray(padded), jnp.zeros(9, bool), jnp.asarray(valid))
    np.testing.assert_array_equal(none, np.where(valid, ops.BELOW_LOW_THRESHOLD, ops.BETWEEN_THRESHOLDS))


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("kwargs", [RPN, ROI], ids=["rpn", "roi"])
def test_boxes_are_matched_as_their_iou(kwargs, platform, dtype, rng):
    """Every route: anchors on a grid, which tie, boxes that nothing overlaps, and 0 / 0; a second image has padding."""
    tv = torchvision()
    import torch

    corner = np.stack(np.meshgrid(np.arange(0, 96, 8), np.arange(0, 64, 8)), axis=-1).reshape(-1, 2)
    anchors = np.concatenate([np.concatenate([corner, corner + side], axis=1) for side in (16, 47.5, 80)])
    anchors = np.concatenate([anchors, adversarial_boxes(np.float64)]).astype(dtype)
    gt = np.concatenate([random_boxes(rng, 4, dtype, 90), [[12, 12, 28, 28], [200, 200, 210, 220], [25, 25, 25, 25]]])
    gt = gt.astype(dtype)  # the last but two lies in the middle of four anchors
    valid = np.ones((2, len(anchors)), bool)
    valid_gt = np.ones((2, len(gt)), bool)
    valid[1, ::3] = valid_gt[1, ::2] = False
    with routes_for(platform):
        found = jax.jit(jax.vmap(partial(_match_boxes, gt, anchors, **kwargs)))(valid_gt, valid)
    iou = tv.ops.box_iou(torch.tensor(gt), torch.tensor(anchors)).numpy()
    assert np.isnan(iou).any()
    best = iou[4].max()
    assert (iou[4] == best).sum() >= 4
    assert best < RPN["high_threshold"]
    np.testing.assert_array_equal(found[0], torchvision_match(iou, **kwargs))
    fewer = torchvision_match(iou[1::2][:, valid[1]], **kwargs)
    np.testing.assert_array_equal(np.asarray(found[1])[valid[1]], np.where(fewer < 0, fewer, 2 * fewer + 1))
    assert (np.asarray(found[1])[~valid[1]] == ops.BETWEEN_THRESHOLDS).all()


def _match_boxes(gt, anchors, valid_gt, valid, **kwargs):
    return match_boxes(gt, anchors, valid_gt=valid_gt, valid=valid, **kwargs)


def test_no_ground_truth_and_no_predictions():
    np.testing.assert_array_equal(match_jit(jnp.zeros((0, 3)), **RPN), [-1, -1, -1])
    assert match_jit(jnp.zeros((3, 0)), **RPN).shape == (0,)


def test_match_transforms(rng):
    check_transforms(partial(ops.match, **RPN), rng.random((4, 20)).astype(np.float32))


def test_bad_thresholds_and_shapes():
    with pytest.raises(ValueError, match=r"low_threshold must not exceed high_threshold, found 0\.6"):
        ops.match(jnp.zeros((1, 1)), high_threshold=0.5, low_threshold=0.6)
    with pytest.raises(ValueError, match=r"iou must be \[G, N\], found shape \[3\]"):
        ops.match(jnp.zeros(3), **ROI)


def torchvision_fcos_match(anchors, boxes, counts, radius):
    """The matches that torchvision's FCOS hands to its head."""
    torchvision()
    from types import SimpleNamespace

    import torch
    from torchvision.models.detection import FCOS

    class Head:
        def compute_loss(self, targets, head_outputs, anchors, matched_idxs):
            return matched_idxs[0].numpy()

    model = SimpleNamespace(center_sampling_radius=radius, head=Head())
    target = {"boxes": torch.tensor(boxes), "labels": torch.zeros(len(boxes), dtype=torch.int64)}
    return FCOS.compute_loss(model, [target], {}, [torch.tensor(anchors)], counts)


@pytest.fixture(scope="module")
def fcos_anchors():
    shapes = [(20, 28), (10, 14), (5, 7), (3, 4), (2, 2)]
    generator = ops.AnchorGenerator((8, 16, 32, 64, 128), (1.0,))
    levels = jax.jit(lambda: generator((160, 224), shapes, shapes))()
    return np.concatenate(levels), [len(level) for level in levels]


@pytest.mark.parametrize("radius", [1.5, 2.5])
@pytest.mark.parametrize("kind", ["random", "whole", "ties", "adversarial"])
def test_fcos_match_equals_torchvision(radius, kind, fcos_anchors, dtype, rng):
    anchors, counts = fcos_anchors[0].astype(dtype), fcos_anchors[1]
    boxes = random_boxes(rng, 25, dtype, 220)
    if kind == "whole":  # whole pixels: locations lie on sides, and distances on the limits of the levels
        boxes = np.round(boxes / 4).astype(dtype) * 4
    elif kind == "ties":  # in float32 areas within 8 of each other tie, and the first box wins
        shift = rng.integers(0, 2, (25, 4)).astype(dtype)
        boxes = np.array([[40, 30, 110, 101]], dtype) + shift * np.array([0, 0, 1, 1], dtype)
    elif kind == "adversarial":
        boxes = np.concatenate((adversarial_boxes(dtype), boxes[:5], boxes[:5]))
    ours = fcos_match_jit(jnp.asarray(anchors), jnp.asarray(boxes), tuple(counts), center_sampling_radius=radius)
    expected = torchvision_fcos_match(anchors, boxes, counts, radius)
    assert ours.dtype == jnp.int32
    np.testing.assert_array_equal(ours, expected)
    assert len(np.unique(expected)) > 1


def test_float32_ties_are_not_float64_ties(fcos_anchors):
    """The smaller box comes second: float64 tells it apart, float32 does not (areas 5003 and 5000)."""
    anchors, counts = fcos_anchors
    boxes = np.array([[60, 40, 60 + 5003 / 50, 90], [60, 40, 160, 90]])
    for dtype, winner in ((np.float32, 0), (np.float64, 1)):
        with jax.enable_x64(dtype is np.float64):
            run = jax.jit(lambda a, b: ops.fcos_match(a, b, counts))
            matches = run(jnp.asarray(anchors.astype(dtype)), jnp.asarray(boxes.astype(dtype)))
            found = np.unique(matches)
            assert winner in found
            np.testing.assert_array_equal(
                matches, torchvision_fcos_match(anchors.astype(dtype), boxes.astype(dtype), counts, 1.5)
            )


def test_fcos_padding_changes_no_match(fcos_anchors, rng):
    anchors, counts = fcos_anchors
    boxes = random_boxes(rng, 8, np.float32, 220)
    expected = torchvision_fcos_match(anchors, boxes, counts, 1.5)
    padded = np.concatenate((boxes, np.array([[0, 0, 300, 300], [20, 20, 60, 60]], np.float32)))
    # a bucket one row higher on the first level; its extra locations would match the padding boxes
    extra = anchors[:28] + np.array([0, 160, 0, 160], np.float32)
    more = np.concatenate((anchors[: counts[0]], extra, anchors[counts[0] :]))
    valid = np.ones(len(more), bool)
    valid[counts[0] : counts[0] + 28] = False
    run = jax.jit(
        lambda a, b, valid_gt, valid: ops.fcos_match(
            a, b, [counts[0] + 28, *counts[1:]], valid_gt=valid_gt, valid=valid
        )
    )
    ours = np.asarray(run(jnp.asarray(more), jnp.asarray(padded), jnp.arange(10) < 8, jnp.asarray(valid)))
    np.testing.assert_array_equal(ours[valid], expected)
    assert (ours[~valid] == -1).all()
    assert (np.asarray(run(more, padded, jnp.zeros(10, bool), jnp.asarray(valid))) == -1).all()


def test_fcos_without_boxes(fcos_anchors):
    matches = ops.fcos_match(jnp.asarray(fcos_anchors[0]), jnp.zeros((0, 4)), fcos_anchors[1])
    assert matches.dtype == jnp.int32
    assert (np.asarray(matches) == -1).all()


def test_fcos_transforms(fcos_anchors, rng):
    anchors, counts = fcos_anchors
    check_transforms(
        lambda boxes: ops.fcos_match(jnp.asarray(anchors), boxes, counts),
        random_boxes(rng, 6, np.float32, 200),
    )


def test_fcos_bad_input():
    with pytest.raises(ValueError, match="num_anchors_per_level must add up to 3 anchors, found"):
        ops.fcos_match(jnp.zeros((3, 4)), jnp.zeros((1, 4)), [1, 1])
    with pytest.raises(ValueError, match=r"boxes must be \[G, 4\], found"):
        ops.fcos_match(jnp.zeros((3, 4)), jnp.zeros((1, 5)), [3])
