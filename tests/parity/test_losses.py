"""Losses, gradients of every parameter and BatchNorm's statistics against torchvision in training mode, float64.

Sampling is made exhaustive on both sides, so that no random choice takes part.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import torch

from flaxdet.convert import reference, to_torchvision
from flaxdet.transform import transform, transform_targets
from tests.parity import sides
from tests.tolerances import BATCH_STATS_F64, GRADIENT_F64, GRADIENT_FLOOR_F64, LOSS_F64

SMALL = {"min_size": 96, "max_size": 160}
EXHAUSTIVE = {
    "rpn_pre_nms_top_n_train": 100,
    "rpn_post_nms_top_n_train": 40,
    "rpn_batch_size_per_image": 1_000_000,
    "box_batch_size_per_image": 400,
}
IMAGES = {"china": (100, 150), "grace_hopper": (150, 100)}
CASES = {
    "several boxes": [
        [[10, 12, 60, 70], [30.5, 20.25, 140, 90], [70, 10, 80, 31]],
        [[5, 5, 95, 145], [20, 30, 50, 44]],
    ],
    "one empty image": [[[10, 12, 60, 70], [30, 20, 140, 90]], []],
    "one box": [[], [[20, 30, 60, 90]]],
    "smaller than a cell": [[[40, 40, 42, 43], [10, 12, 60, 70]], [[7, 9, 8, 10]]],
    "on the border": [[[0, 0, 150, 100], [130, 80, 150, 100]], [[0, 100, 100, 150], [0, 0, 1, 150]]],
    "no box at all": [[], []],
}


def targets_of(case: str) -> list[dict[str, np.ndarray]]:
    return [
        {
            "boxes": np.asarray(boxes, np.float64).reshape(-1, 4),
            "labels": 1 + np.arange(len(boxes), dtype=np.int64) % 9,
        }
        for boxes in CASES[case]
    ]


def torch_step(model: Any, images: list[np.ndarray], targets: list[dict[str, np.ndarray]], monkeypatch: Any):
    """Losses, gradients and buffers of one training step of torchvision's model."""
    rpn = reference.torchvision().models.detection.rpn.RegionProposalNetwork
    assign = rpn.assign_targets_to_anchors

    def in_double(*args: Any) -> Any:  # torchvision's labels are float32 always, and so is its loss_objectness
        labels, boxes = assign(*args)
        return [label.double() for label in labels], [box.double() for box in boxes]

    monkeypatch.setattr(rpn, "assign_targets_to_anchors", in_double)
    model.train()
    reference.reset_roi_scales(model)
    tensors = [torch.from_numpy(image.copy()).permute(2, 0, 1).double() / 255 for image in images]
    with reference.exact_nms():
        losses = model(tensors, [{name: torch.from_numpy(value) for name, value in t.items()} for t in targets])
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    gradients = {name: np.zeros(1) if g is None else g.numpy() for name, g in gradients.items()}
    return {name: loss.item() for name, loss in losses.items()}, gradients, model.state_dict()


def flax_step(model: Any, variables: Any, batch: Any, targets: Any):
    @jax.jit
    def step(variables, batch, targets):
        def loss(params):
            losses, updates = model.apply(
                variables | {"params": params},
                batch,
                targets,
                train=True,
                rngs={"sampling": jax.random.key(0)},
                mutable=["batch_stats"],
            )
            return sum(losses.values()), (losses, updates)

        return jax.grad(loss, has_aux=True)(variables["params"])

    return step(variables, batch, targets)


def check(name: str, case: str, monkeypatch: Any, depth: int = 18) -> None:
    options = SMALL | (EXHAUSTIVE if name == sides.V2_NAME else {})
    model, variables, theirs = sides.both(name, depth, 11, dtype="float64", **options)
    images = [sides.crop(photo, *size) for photo, size in IMAGES.items()]
    targets = targets_of(case)
    expected, expected_gradients, buffers = torch_step(theirs, images, targets, monkeypatch)

    batch = transform(images, model.transform, canvas="batch", dtype=np.float64)
    padded = transform_targets(targets, batch, max_boxes=4, num_classes=11)
    gradients, (losses, updates) = flax_step(model, variables, batch, padded)

    assert set(losses) == set(expected)
    for key, value in expected.items():
        np.testing.assert_allclose(float(losses[key]), value, rtol=LOSS_F64, atol=LOSS_F64, err_msg=key)
    # gradients under torchvision's keys; the statistics come along and are compared as well
    found = to_torchvision(model, {"params": gradients, "batch_stats": updates["batch_stats"]})
    moving = [key for key, gradient in expected_gradients.items() if np.any(gradient)]
    assert len(moving) > 60 or not any(len(target["boxes"]) for target in targets)
    for key, expected_gradient in expected_gradients.items():
        norm = np.linalg.norm(expected_gradient)
        error = np.linalg.norm(found[key] - expected_gradient)
        assert error <= GRADIENT_F64 * norm + GRADIENT_FLOOR_F64, (key, error, norm)
    for key, buffer in buffers.items():
        if key.endswith(("running_mean", "running_var")):
            np.testing.assert_allclose(
                found[key], buffer.numpy(), rtol=BATCH_STATS_F64, atol=GRADIENT_FLOOR_F64, err_msg=key
            )


@pytest.mark.parametrize("case", CASES)
def test_training_step(name, case, x64, monkeypatch):
    check(name, case, monkeypatch)


@pytest.mark.slow
def test_training_step_of_the_whole_resnet_50(name, x64, monkeypatch):
    check(name, "several boxes", monkeypatch, depth=50)
