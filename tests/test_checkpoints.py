"""Trained checkpoints of torchvision on the photos that they were trained for: the same detections, all of them."""

from __future__ import annotations

import importlib.util

import pytest

import flaxdet
from flaxdet.data import read_image
from tests.tolerances import BOXES_F32, SCORES_F32

if importlib.util.find_spec("torch") is None or importlib.util.find_spec("torchvision") is None:
    pytest.skip("torchvision is the reference", allow_module_level=True)

import torch

from flaxdet.convert import reference, stages, verify

torch.set_num_threads(1)  # as XLA in conftest.py: one thread a worker

SIZE = {"min_size": 256, "max_size": 342}  # as in training
COUNT = 6


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param("fcos_resnet50_fpn", flaxdet.FCOS, marks=pytest.mark.xdist_group("fcos")),
        pytest.param("fasterrcnn_resnet50_fpn_v2", flaxdet.FasterRCNN, marks=pytest.mark.xdist_group("v2")),
    ],
)
def test_every_detection_matches(shared, name, kind):
    path = shared / "checkpoints" / f"{name}_bccd.pth"
    model, variables = flaxdet.load(path, **SIZE, precision="highest")
    assert type(model) is kind  # told by the keys
    assert model.num_classes == 4
    theirs = reference.build(name, num_classes=4, **SIZE)
    state = torch.load(path, weights_only=True)
    theirs.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()}, strict=True)

    paths = sorted((shared / "data" / "bccd" / "images").glob("*"))
    images = [read_image(path) for path in paths[:: len(paths) // COUNT][:COUNT]]
    found = flaxdet.predict(model, variables, images)
    counts = []
    for image, ours in zip(images, found, strict=True):
        (expected,), _ = stages.run_reference(theirs, [image], keep_stages=False)
        match = verify.match_detections(ours, expected, BOXES_F32, SCORES_F32)
        assert match.same, match
        counts.append(match.count)
    assert len(images) == COUNT
    assert min(counts) > 5
