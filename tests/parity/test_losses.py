"""Losses, gradients of every parameter and BatchNorm's statistics against torchvision in training mode, float64.

The whole ResNet-50 detectors take one training step. Other targets differ from it only after the network: these cases
start from stored outputs of torchvision's network, and compare the losses and their gradients by these outputs.

Sampling is made exhaustive on both sides, so that no random choice takes part.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest
import torch

from flaxdet.convert import reference, stages, to_torchvision
from flaxdet.images.transform import transform, transform_targets
from flaxdet.models import FCOS, FasterRCNN
from flaxdet.models.levels import level_shapes
from flaxdet.structures import Proposals
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
    reference.see_ordinary_photo(model)
    tensors = [torch.from_numpy(image.copy()).permute(2, 0, 1).double() / 255 for image in images]
    with reference.exact_nms():
        losses = model(tensors, [{name: torch.from_numpy(value) for name, value in t.items()} for t in targets])
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    gradients = {name: np.zeros(1) if g is None else g.numpy() for name, g in gradients.items()}
    return {name: loss.item() for name, loss in losses.items()}, gradients, model.state_dict()


def close_gradient(found: Any, expected: Any, name: str) -> None:
    error, norm = np.linalg.norm(found - expected), np.linalg.norm(expected)
    assert error <= GRADIENT_F64 * norm + GRADIENT_FLOOR_F64, (name, error, norm)


def close_losses(found: dict[str, Any], expected: dict[str, float]) -> None:
    assert set(found) == set(expected)
    for key, value in expected.items():
        np.testing.assert_allclose(float(found[key]), value, rtol=LOSS_F64, atol=LOSS_F64, err_msg=key)


@pytest.mark.whole
@pytest.mark.repeated  # test_sgd_steps.py has steps of the small forms
def test_training_step_of_the_whole_resnet_50(name, x64, monkeypatch):
    """torchvision's canvas lies inside a larger bucket, and the targets have more slots than boxes."""
    options = {"min_size": 64, "max_size": 96} | sides.known(name, EXHAUSTIVE)
    model, variables, theirs = sides.both(name, small=False, dtype="float64", **options)
    images = [sides.crop(photo, *size) for photo, size in IMAGES.items()]
    targets = targets_of("several boxes")
    expected, expected_gradients, buffers = torch_step(theirs, images, targets, monkeypatch)

    batch = transform(images, model.transform, canvas="batch", bucket=(96, 128), dtype=np.float64)
    assert batch.canvas is not None
    padded = transform_targets(targets, batch, max_boxes=5, num_classes=11)

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

    gradients, (losses, updates) = step(variables, batch, padded)
    close_losses(losses, expected)
    # gradients under torchvision's keys; the statistics come along and are compared as well
    found = to_torchvision(model, {"params": gradients, "batch_stats": updates["batch_stats"]})
    # nearly all: the number of parameters differs by detector
    assert sum(bool(np.any(gradient)) for gradient in expected_gradients.values()) > 0.9 * len(expected_gradients)
    for key, gradient in expected_gradients.items():
        close_gradient(found[key], gradient, key)
    for key, buffer in buffers.items():
        if key.endswith(("running_mean", "running_var")):
            np.testing.assert_allclose(
                found[key], buffer.numpy(), rtol=BATCH_STATS_F64, atol=GRADIENT_FLOOR_F64, err_msg=key
            )


# The other cases of targets, from stored outputs on.


def torch_batch(model: Any, targets: list[dict[str, np.ndarray]]) -> tuple[Any, Any]:
    """torchvision's resized images and targets."""
    tensors = [
        torch.from_numpy(sides.crop(photo, *size).copy()).permute(2, 0, 1).double() / 255
        for photo, size in IMAGES.items()
    ]
    return model.transform(tensors, [{name: torch.from_numpy(value) for name, value in t.items()} for t in targets])


def leaves(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(array)).requires_grad_() for name, array in arrays.items()}


def gradients_of(losses: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    sum(losses.values()).backward()
    return {name: np.zeros(x.shape) if x.grad is None else x.grad.numpy() for name, x in inputs.items()}


def channels_first(maps: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [x.permute(0, 3, 1, 2) for x in maps.values()]


@pytest.fixture(scope="module")
def stored():
    """By the builder's name: our model, its variables, torchvision's model, its maps and its other stages."""
    made: dict[str, Any] = {}

    def get(name: str):
        if name not in made:
            options = SMALL | sides.known(name, EXHAUSTIVE | {"rpn_post_nms_top_n_test": 12})
            model, variables, theirs = sides.both(name, dtype="float64", **options)
            _, found = stages.run_reference(theirs, [sides.crop(photo, *size) for photo, size in IMAGES.items()])
            maps = {level: found[level] for level in sides.levels_of(model)}
            made[name] = model, variables, theirs, maps, found
        return made[name]

    return get


def our_batch(model: Any, case: str) -> tuple[Any, Any]:
    images = [sides.crop(photo, *size) for photo, size in IMAGES.items()]
    batch = transform(images, model.transform, canvas="batch", dtype=np.float64)
    return batch, transform_targets(targets_of(case), batch, max_boxes=4, num_classes=11)


@functools.partial(jax.jit, static_argnums=(0, 1))
def fcos_step(model, shapes, outputs, batch, targets):
    def loss(outputs):
        losses = model.apply({}, outputs, batch, targets, shapes, method="compute_loss")
        return sum(losses.values()), losses

    return jax.grad(loss, has_aux=True)(outputs)


def each_of(kind: type) -> Any:
    """Each detector of a class; all but one run before a release alone."""
    cases = []
    for name in sides.of_kind(kind):
        marks = [] if name == sides.representative(kind) else [pytest.mark.release]
        cases.append(pytest.param(name, marks=[pytest.mark.xdist_group(f"test_losses {name}"), *marks]))
    return pytest.mark.parametrize("detector", cases)


@each_of(FCOS)
@pytest.mark.parametrize("case", CASES)
def test_targets_of_fcos(detector, case, stored, x64):
    model, _, theirs, maps, found = stored(detector)
    outputs = {name: found[name] for name in ("cls_logits", "bbox_regression", "bbox_ctrness")}
    images, targets = torch_batch(theirs, targets_of(case))
    inputs, levels = leaves(outputs), channels_first(leaves(maps))
    anchors = theirs.anchor_generator(images, levels)
    expected = theirs.compute_loss(targets, inputs, anchors, [x.shape[2] * x.shape[3] for x in levels])
    expected_gradients = gradients_of(expected, inputs)

    gradients, losses = fcos_step(model, level_shapes(maps), outputs, *our_batch(model, case))
    close_losses(losses, {name: loss.item() for name, loss in expected.items()})
    for name, gradient in expected_gradients.items():
        close_gradient(gradients[name], gradient, name)


@functools.partial(jax.jit, static_argnums=0)
def faster_rcnn_step(model, variables, inputs, proposals, batch, targets):
    """Gradients by the pyramid's maps (through the box head) and by the RPN's outputs; losses; statistics."""

    def loss(inputs):
        losses, updates = model.apply(
            variables,
            *inputs,
            proposals,
            batch,
            targets,
            jax.random.split(jax.random.key(0), (2, len(batch.size))),
            train=True,
            method="compute_loss",
            mutable=["batch_stats"],
        )
        return sum(losses.values()), (losses, updates["batch_stats"].get("box_head"))

    return jax.grad(loss, has_aux=True)(inputs)


@each_of(FasterRCNN)
@pytest.mark.parametrize("case", CASES)
def test_targets_of_faster_rcnn(detector, case, stored, x64):
    model, variables, theirs, maps, found = stored(detector)
    boxes = [found["proposals"][found[stages.PROPOSAL_IMAGE] == i] for i in range(len(IMAGES))]
    images, targets = torch_batch(theirs, targets_of(case))
    rpn, heads = theirs.rpn, theirs.roi_heads.train()
    norms = [module for module in heads.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for i, norm in enumerate(norms):  # an earlier case has moved them
        ours = variables["batch_stats"]["box_head"][f"norm_{i}"]
        norm.running_mean.copy_(torch.from_numpy(np.array(ours["mean"])))
        norm.running_var.copy_(torch.from_numpy(np.array(ours["var"])))
    inputs = leaves(maps | {name: found[name] for name in ("objectness", "pred_bbox_deltas")})
    levels = channels_first({name: inputs[name] for name in maps})
    anchors = rpn.anchor_generator(images, levels)
    labels, matched = rpn.assign_targets_to_anchors(anchors, targets)
    objectness_loss, box_loss = rpn.compute_loss(
        inputs["objectness"].reshape(-1, 1),
        inputs["pred_bbox_deltas"].reshape(-1, 4),
        [label.double() for label in labels],  # torchvision's are float32 always, and so would be its loss
        rpn.box_coder.encode(matched, anchors),
    )
    reference.see_ordinary_photo(theirs)
    features = dict(zip(("0", "1", "2", "3", "pool"), levels, strict=True))
    _, expected = heads(features, [torch.from_numpy(own) for own in boxes], images.image_sizes, targets)
    expected |= {"loss_objectness": objectness_loss, "loss_rpn_box_reg": box_loss}
    expected_gradients = gradients_of(expected, inputs)

    slots = max(len(own) for own in boxes)
    padded = np.stack([np.pad(own, ((0, slots - len(own)), (0, 0))) for own in boxes])
    valid = np.stack([np.arange(slots) < len(own) for own in boxes])
    proposals = Proposals(boxes=padded, scores=np.zeros(valid.shape), valid=valid)
    ends = np.cumsum([3 * h * w for h, w in level_shapes(maps)])[:-1]
    outputs = [np.split(found[name], ends, axis=1) for name in ("objectness", "pred_bbox_deltas")]
    gradients, (losses, statistics) = faster_rcnn_step(
        model, variables, (maps, *outputs), proposals, *our_batch(model, case)
    )
    close_losses(losses, {name: loss.item() for name, loss in expected.items()})
    by_maps, *by_outputs = gradients
    by_outputs = [np.concatenate(parts, axis=1) for parts in by_outputs]
    found_gradients = by_maps | dict(zip(("objectness", "pred_bbox_deltas"), by_outputs, strict=True))
    for name, gradient in expected_gradients.items():
        close_gradient(found_gradients[name], gradient, name)
    for i, norm in enumerate(norms):
        for ours, buffer in (("mean", norm.running_mean), ("var", norm.running_var)):
            np.testing.assert_allclose(statistics[f"norm_{i}"][ours], buffer, rtol=BATCH_STATS_F64)
