"""``flaxdet eval`` on checkpoints that torchvision trained: its detections, and the figures of its own evaluation."""

from __future__ import annotations

import importlib.util
import json

import jax
import numpy as np
import pytest

from flaxdet.cli.main import main
from flaxdet.data import read_image
from flaxdet.evaluation.evaluate import coco_results, evaluate_results
from tests.tiny import FCOS_NAME, V2_NAME
from tests.tolerances import AP_THREE_DECIMALS, BOXES_F32, SCORES_F32

pytest.importorskip("pycocotools")
if importlib.util.find_spec("torch") is None or importlib.util.find_spec("torchvision") is None:
    pytest.skip("torchvision is the reference", allow_module_level=True)

import torch

from flaxdet.convert import reference, stages, verify

torch.set_num_threads(1)  # as XLA in conftest.py: one thread a worker

SIZE = {"min_size": 256, "max_size": 342}  # as in training
COUNT = 2  # photos; each takes v2 seconds, here and in torchvision


def evaluated(shared, out, name, annotations, batch_size):
    """What the command writes: metrics and rows."""
    files = ["--weights", shared / "checkpoints" / f"{name}_bccd.pth", "--images", shared / "data" / "bccd" / "images"]
    sizes = ["--min-size", SIZE["min_size"], "--max-size", SIZE["max_size"], "--batch-size", batch_size]
    options = [*files, "--annotations", annotations, *sizes, "--out", out, "--no-progress"]
    with jax.default_matmul_precision("highest"):
        assert main(["eval", *map(str, options)]) == 0
    return (json.loads((out / f"{file}.json").read_text()) for file in ("metrics", "detections"))


# (detections, AP, AP50, AP75) by torchvision in float32, one image at a time: ../shared/checkpoints/README.md
TORCHVISION = {FCOS_NAME: (4198, 0.4951, 0.8349, 0.5307), V2_NAME: (2809, 0.5754, 0.8860, 0.6445)}


MODELS = [
    pytest.param(FCOS_NAME, marks=pytest.mark.xdist_group("fcos checkpoint")),
    pytest.param(V2_NAME, marks=pytest.mark.xdist_group("v2 checkpoint")),
]


@pytest.mark.ci
@pytest.mark.parametrize(
    "name",
    # v2 takes minutes here; in CI, the next test compares each of its detections on a few photos
    [MODELS[0], pytest.param(*MODELS[1].values, marks=[*MODELS[1].marks, pytest.mark.release])],
)
def test_figures_of_the_whole_set(shared, tmp_path, name):
    metrics, rows = evaluated(shared, tmp_path, name, shared / "data" / "bccd" / "val.json", batch_size=4)
    detections, *expected = TORCHVISION[name]
    assert metrics["images"] == 87
    assert metrics["detections"] == len(rows) == detections
    found = [metrics[key] for key in ("ap", "ap50", "ap75")]
    assert found == [pytest.approx(ap, abs=AP_THREE_DECIMALS) for ap in expected]
    assert [row["name"] for row in metrics["per_class"]] == ["Platelets", "RBC", "WBC"]


@pytest.mark.ci  # whole ResNet-50s; test_detect_demo.py evaluates the shipped weights everywhere
@pytest.mark.parametrize(
    "name",
    # in CI, the test before this one evaluates FCOS on the whole set
    [pytest.param(*MODELS[0].values, marks=[*MODELS[0].marks, pytest.mark.release]), MODELS[1]],
)
def test_every_detection_of_a_few_photos(shared, tmp_path, name):
    """Beside torchvision itself, whose detections also give the average precision to expect."""
    data, path = shared / "data" / "bccd", tmp_path / "few.json"
    content = json.loads((data / "val.json").read_text())
    images = content["images"][:COUNT]
    ids = [image["id"] for image in images]
    annotations = [row for row in content["annotations"] if row["image_id"] in ids]
    path.write_text(json.dumps({**content, "images": images, "annotations": annotations}))
    metrics, rows = evaluated(shared, tmp_path, name, path, batch_size=1)

    theirs = reference.build(name, num_classes=4, **SIZE)
    state = torch.load(shared / "checkpoints" / f"{name}_bccd.pth", weights_only=True)
    theirs.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()}, strict=True)
    photos = [read_image(data / "images" / image["file_name"]) for image in images]
    expected = [stages.run_reference(theirs, [photo], keep_stages=False)[0][0] for photo in photos]
    for image_id, detections in zip(ids, expected, strict=True):
        own = [row for row in rows if row["image_id"] == image_id]
        boxes = np.array([row["bbox"] for row in own])
        found = {
            "boxes": np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1),
            "scores": np.array([row["score"] for row in own]),
            "labels": np.array([row["category_id"] for row in own]),  # in this file the ids are the labels
        }
        match = verify.match_detections(found, detections, BOXES_F32, SCORES_F32)
        assert match.same, match
        assert match.count > 5
    figures = evaluate_results(coco_results(expected, ids), path)
    assert metrics["detections"] == figures.detections
    assert metrics["ap"] == pytest.approx(figures.ap, abs=AP_THREE_DECIMALS)
