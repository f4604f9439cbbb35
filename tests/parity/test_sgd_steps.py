"""Ten steps of SGD with momentum and weight decay against torch.optim.SGD on torchvision's model, float64.

Detectors of one stage train three stages of the backbone, with live BatchNorm. Those of two train everything under
``freeze_bn``, and torchvision's BatchNorm modules are in evaluation mode. The trained models then go back to
torchvision and detect the same there.

Sampling is exhaustive on both sides, as in test_losses.py. Two batches alternate.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import torch

from flaxdet import registry
from flaxdet.convert import reference, stages, to_torchvision, verify
from flaxdet.images.transform import transform, transform_targets
from flaxdet.inference.predict import predict
from flaxdet.train import (
    create_state,
    evaluation_variables,
    make_train_step,
    sgd,
    shard_batch,
    warmup_multistep_schedule,
)
from tests.parity import sides
from tests.parity.test_losses import EXHAUSTIVE
from tests.tolerances import BOXES_F64, SCORES_F64, TEN_STEPS_F64

STEPS = 10
BATCHES = (
    {
        "images": [("china", 96, 144), ("grace_hopper", 120, 96)],
        "boxes": [[[10, 12, 60, 70], [30.5, 20.25, 140, 90]], [[5, 5, 90, 115], [20, 30, 50, 44], [40, 60, 80, 100]]],
    },
    {"images": [("flower", 96, 150), ("china", 100, 96)], "boxes": [[[20, 8, 100, 90]], []]},
)
SMALL = {"min_size": 48, "max_size": 64}
CANVAS = (64, 64)  # of both batches
FEW_PROPOSALS = EXHAUSTIVE | {
    "rpn_pre_nms_top_n_train": 40,
    "rpn_post_nms_top_n_train": 16,
    "rpn_post_nms_top_n_test": 40,
}
# ten times this learning rate makes detectors of two stages diverge, to NaN on both sides
SCHEDULE = warmup_multistep_schedule(2e-4, 5, [1], warmup_factor=0.1)
DECAY = 1e-2  # large, so that a wrong decay would show


def targets_of(boxes: list[Any]) -> list[dict[str, np.ndarray]]:
    return [
        {"boxes": np.asarray(own, np.float64).reshape(-1, 4), "labels": 1 + np.arange(len(own), dtype=np.int64)}
        for own in boxes
    ]


def torch_steps(model: Any, frozen: bool, batches: list[tuple[Any, Any]], monkeypatch: Any) -> dict[str, np.ndarray]:
    """torchvision's state_dict after the steps, its BatchNorm modules in evaluation mode if frozen."""
    rpn = reference.torchvision().models.detection.rpn.RegionProposalNetwork
    assign = rpn.assign_targets_to_anchors

    def in_double(*args: Any) -> Any:  # torchvision's labels are float32 always, and so is its loss_objectness
        labels, boxes = assign(*args)
        return [label.double() for label in labels], [box.double() for box in boxes]

    monkeypatch.setattr(rpn, "assign_targets_to_anchors", in_double)
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0, momentum=0.9, weight_decay=DECAY)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train(not frozen)
    for step in range(STEPS):
        images, targets = batches[step % len(batches)]
        reference.see_ordinary_photo(model)
        tensors = [torch.from_numpy(image.copy()).permute(2, 0, 1).double() / 255 for image in images]
        with reference.exact_nms():
            losses = model(tensors, [{name: torch.from_numpy(value) for name, value in t.items()} for t in targets])
        optimizer.param_groups[0]["lr"] = float(SCHEDULE(step))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    return {key: value.numpy() for key, value in model.state_dict().items() if "num_batches" not in key}


def each() -> list[Any]:
    """In CI the tiny detector, since a step of a whole ResNet-50 is in test_losses.py; before a release all.

    Outside of CI, test_losses.py compares losses, and their gradients by what the network gives.
    """
    marks = {name: pytest.mark.ci if name == sides.TINY_NAME else pytest.mark.release for name in sides.NAMES}
    return [
        pytest.param(name, marks=[pytest.mark.xdist_group(f"test_sgd_steps {name}"), marks[name]]) for name in marks
    ]


@pytest.mark.parametrize("detector", each())
def test_ten_steps_and_back(detector, x64, monkeypatch):
    name = detector
    frozen = sides.has_proposals(name)
    layers = 5 if frozen else 3
    low = {registry.get(name).kind.score_field: 0.02}  # so that small images have detections to compare
    options = SMALL | low | sides.known(name, FEW_PROPOSALS)
    _, variables, theirs = sides.both(name, dtype="float64", **options)
    training = {"freeze_bn": frozen, "trainable_backbone_layers": layers}
    model = sides.flax_detector(name, dtype=np.float64, **training, **options)
    for key, value in theirs.backbone.body.named_parameters():
        value.requires_grad_(layers == 5 or key.startswith(("layer2", "layer3", "layer4")))

    batches = [
        ([sides.crop(photo, *size) for photo, *size in batch["images"]], targets_of(batch["boxes"]))
        for batch in BATCHES
    ]
    before = {key: value.numpy().copy() for key, value in theirs.state_dict().items()}
    expected = torch_steps(theirs, frozen, batches, monkeypatch)

    tx = sgd(SCHEDULE, weight_decay=DECAY)
    state = create_state(model, variables, tx, key=jax.random.key(0))
    train_step = make_train_step(model, tx)
    losses = []
    for step in range(STEPS):
        images, targets = batches[step % len(batches)]
        batch = transform(images, model.transform, canvas="batch", bucket=CANVAS, dtype=np.float64)
        assert batch.canvas is None
        padded = transform_targets(targets, batch, max_boxes=4, num_classes=11)
        state, metrics = train_step(state, shard_batch({**vars(batch), **vars(padded)}, None))
        losses.append(float(metrics["loss"]))
    assert train_step.jitted._cache_size() == 1
    assert losses[8] < losses[0]  # of the same batch
    assert losses[9] < losses[1]

    trained = jax.device_get(evaluation_variables(state))
    found = to_torchvision(model, trained)
    moved = 0
    for key, value in expected.items():
        error, norm = np.linalg.norm(found[key] - value), np.linalg.norm(value)
        assert error <= TEN_STEPS_F64 * norm, (key, error, norm)
        still = stays(key, layers, frozen)
        assert np.array_equal(value, before[key]) == still, key
        moved += not still
        if still:
            np.testing.assert_array_equal(found[key], value, err_msg=key)
    assert moved > 50

    theirs.eval().load_state_dict({key: torch.from_numpy(value) for key, value in found.items()}, strict=True)
    image = sides.crop("china", 100, 150)
    (detected,), _ = stages.run_reference(theirs, [image], keep_stages=False)
    found_here = predict(model, trained, [image])[0]
    match = verify.match_detections(found_here, detected, BOXES_F64, SCORES_F64)
    assert match.same, match
    assert match.count > 5


def stays(key: str, layers: int, frozen: bool) -> bool:
    """Whether torchvision leaves a tensor alone; live BatchNorm's statistics move in frozen layers too."""
    if key.endswith(("running_mean", "running_var")):
        return frozen
    trained = tuple(f"backbone.body.layer{i}" for i in (2, 3, 4))
    return layers != 5 and key.startswith("backbone.body.") and not key.startswith(trained)
