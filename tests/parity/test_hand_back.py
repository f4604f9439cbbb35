"""A model that trained here goes back to torchvision, and detects the same there."""

from __future__ import annotations

import jax
import numpy as np
import torch

from flaxdet.convert import stages, to_torchvision, verify
from flaxdet.data import read_coco, train_batches
from flaxdet.predict import predict
from flaxdet.train import create_state, evaluation_variables, fit, make_train_step, sgd
from tests.parity import sides
from tests.tiny import write_coco
from tests.tolerances import BOXES_F32, SCORES_F32

STEPS = 4


def test_trained_model_in_torchvision(name, tmp_path):
    model, variables, theirs = sides.both(name, num_classes=4, min_size=96, max_size=160)
    dataset = read_coco(*write_coco(tmp_path, count=4, size=(96, 128)))
    tx = sgd(1e-4, weight_decay=1e-4)
    state = create_state(model, variables, tx, key=jax.random.key(0))
    batches = train_batches(dataset, model.transform, batch_size=2, steps=STEPS)
    state = fit(make_train_step(model, tx), state, batches, steps=STEPS, progress=False)

    trained = jax.device_get(evaluation_variables(state))
    state_dict = to_torchvision(model, trained)
    before = theirs.state_dict()
    moved = [key for key, value in state_dict.items() if not np.array_equal(value, before[key].numpy())]
    assert len(moved) > 100  # kernels, biases, and statistics of BatchNorm
    theirs.load_state_dict({key: torch.from_numpy(value) for key, value in state_dict.items()}, strict=True)
    images = [sides.crop("china", 100, 150), sides.crop("grace_hopper", 150, 100)]
    counts = []
    for image, ours in zip(images, predict(model, trained, images), strict=True):
        (expected,), _ = stages.run_reference(theirs, [image], keep_stages=False)
        match = verify.match_detections(ours, expected, BOXES_F32, SCORES_F32)
        assert match.same, match
        counts.append(match.count)
    assert min(counts) > 5
