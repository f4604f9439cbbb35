"""``freeze_bn`` against torchvision with its BatchNorm modules in evaluation mode during a training step, float64."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import torch

from flaxdet.convert import to_torchvision
from flaxdet.transform import transform, transform_targets
from tests.parity import sides
from tests.parity.test_losses import EXHAUSTIVE, IMAGES, SMALL, flax_step, targets_of, torch_step
from tests.tolerances import GRADIENT_F64, GRADIENT_FLOOR_F64, LOSS_F64


def freeze(model: Any) -> Any:
    """The model with ``freeze_bn`` wherever it has BatchNorm, as ``make_model`` sets it."""
    backbone = model.backbone
    backbone = backbone.clone(body=backbone.body.clone(freeze_bn=True), fpn=backbone.fpn.clone(freeze_bn=True))
    parts = {"backbone": backbone}
    if hasattr(model, "box_head"):
        parts["box_head"] = model.box_head.clone(freeze_bn=True)
    return model.clone(**parts)


def freeze_torch(model: Any) -> None:
    """From now on ``model.train()`` leaves its BatchNorm modules in evaluation mode."""

    def train(mode: bool = True) -> Any:
        type(model).train(model, mode)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        return model

    model.train = train


def test_training_step(name, x64, monkeypatch):
    model, variables, theirs = sides.both(
        name, 18, 11, dtype="float64", **SMALL, **(EXHAUSTIVE if name == sides.V2_NAME else {})
    )
    model = freeze(model)
    freeze_torch(theirs)
    images = [sides.crop(photo, *size) for photo, size in IMAGES.items()]
    targets = targets_of("several boxes")
    expected, expected_gradients, _ = torch_step(theirs, images, targets, monkeypatch)

    batch = transform(images, model.transform, canvas="batch", dtype=np.float64)
    padded = transform_targets(targets, batch, max_boxes=4, num_classes=11)
    gradients, (losses, updates) = flax_step(model, variables, batch, padded)
    for key, value in expected.items():
        np.testing.assert_allclose(float(losses[key]), value, rtol=LOSS_F64, err_msg=key)
    jax.tree.map(np.testing.assert_array_equal, updates["batch_stats"], variables["batch_stats"])
    found = to_torchvision(model, {"params": gradients, "batch_stats": variables["batch_stats"]})
    for key, gradient in expected_gradients.items():
        norm = np.linalg.norm(gradient)
        assert norm > 0, key
        assert np.linalg.norm(found[key] - gradient) <= GRADIENT_F64 * norm + GRADIENT_FLOOR_F64, key
    # the norms' own parameters train all the same
    assert np.any(found["backbone.body.bn1.weight"])
