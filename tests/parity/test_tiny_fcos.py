"""The tiny FCOS against the same network of torchvision's parts, float64: stages, detections, a training step."""

from __future__ import annotations

import contextlib

import jax
import numpy as np
import pytest

from flaxdet.convert import from_torchvision, to_torchvision, verify
from flaxdet.convert.lively import make_lively
from flaxdet.convert.reference_tiny import tiny_fcos
from flaxdet.images.transform import transform, transform_targets
from flaxdet.zoo._tiny_fcos import make_tiny_fcos
from tests.parity import sides
from tests.parity.test_losses import IMAGES, close_gradient, close_losses, targets_of, torch_step
from tests.tolerances import (
    BATCH_STATS_F64,
    BOXES_F32,
    BOXES_F64,
    GRADIENT_FLOOR_F64,
    SCORES_F32,
    SCORES_F64,
    STAGE_F32,
    STAGE_F64,
)

CLASSES = 11
BARS = {"float32": (STAGE_F32, BOXES_F32, SCORES_F32), "float64": (STAGE_F64, BOXES_F64, SCORES_F64)}


def both(dtype: str, frozen: bool = False, **options):
    """(our model, its variables, torchvision's model) with the same lively weights; x64 must fit the dtype."""
    theirs = make_lively(tiny_fcos(num_classes=CLASSES, frozen=frozen, **options))
    dtypes = {"dtype": np.dtype(dtype).type, "precision": jax.lax.Precision.HIGHEST}
    ours = make_tiny_fcos(num_classes=CLASSES, frozen_bn=frozen, **dtypes, **options)
    variables = from_torchvision(ours, theirs.state_dict())
    return ours, variables, theirs.double() if dtype == "float64" else theirs


@pytest.mark.parametrize("frozen", [False, True])
def test_round_trip(frozen):
    ours, variables, theirs = both("float32", frozen)
    state_dict = theirs.state_dict()
    found = to_torchvision(ours, variables)
    assert list(found) == list(state_dict)
    for key, expected in state_dict.items():
        if not key.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(found[key], expected.numpy(), err_msg=key)
    trained = sum(parameter.numel() for parameter in theirs.parameters())
    assert trained == sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


@pytest.mark.parametrize("dtype", BARS)
def test_detections(dtype):
    with jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext():
        ours, variables, theirs = both(dtype)
        found = verify.compare(ours, variables, theirs, [sides.photo("grace_hopper"), sides.photo("china")])
    stage_bar, box_bar, score_bar = BARS[dtype]
    names = ["pixels", "c2", "c3", "c4", "c5", "p3", "p4", "p5", "cls_logits", "bbox_regression", "bbox_ctrness"]
    assert [stage.name for stage in found.stages] == names
    assert not [stage for stage in found.stages if not stage.relative <= stage_bar]
    for match in found.matches:
        assert match.count > 20
        assert match.same, match
        assert match.box_error <= box_bar
        assert match.score_error <= score_bar


def test_training_step(x64, monkeypatch):
    """Losses, every gradient and BatchNorm's statistics; torchvision's canvas lies inside a larger bucket."""
    ours, variables, theirs = both("float64", min_size=64, max_size=96)
    images = [sides.crop(photo, *size) for photo, size in IMAGES.items()]
    targets = targets_of("several boxes")
    expected, expected_gradients, buffers = torch_step(theirs, images, targets, monkeypatch)
    batch = transform(images, ours.transform, canvas="batch", bucket=(96, 128), dtype=np.float64)
    assert batch.canvas is not None
    padded = transform_targets(targets, batch, max_boxes=5, model=ours)

    @jax.jit
    def step(params):
        def loss(params):
            options = {"train": True, "mutable": ["batch_stats"]}
            losses, updates = ours.apply(variables | {"params": params}, batch, padded, **options)
            return sum(losses.values()), (losses, updates)

        return jax.grad(loss, has_aux=True)(params)

    gradients, (losses, updates) = step(variables["params"])
    close_losses(losses, expected)
    found = to_torchvision(ours, {"params": gradients, "batch_stats": updates["batch_stats"]})
    assert sum(bool(np.any(gradient)) for gradient in expected_gradients.values()) > 80
    for key, gradient in expected_gradients.items():
        close_gradient(found[key], gradient, key)
    for key, buffer in buffers.items():
        if key.endswith(("running_mean", "running_var")):
            np.testing.assert_allclose(
                found[key], buffer.numpy(), rtol=BATCH_STATS_F64, atol=GRADIENT_FLOOR_F64, err_msg=key
            )
