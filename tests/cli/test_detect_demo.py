"""``flaxdet detect --demo``: it finds the blood cells that people marked, and downloads nothing."""

from __future__ import annotations

import socket

import jax
import numpy as np
import pytest
from PIL import Image

from flaxdet.cli.demo import load_demo
from flaxdet.cli.detect import Detect
from flaxdet.data import read_coco
from flaxdet.evaluation.evaluate import evaluate
from flaxdet.ops import box_iou
from flaxdet.zoo._tiny import DEMO_PHOTOS
from tests.cli.conftest import files, results

pytestmark = pytest.mark.xdist_group("detect")

# Some of BCCD's own annotations of the two photos, xyxy; not every cell in them is marked
MARKED = {
    "BloodImage_00222.jpg": {
        "WBC": [(140, 27, 340, 230)],
        "RBC": [(397, 1, 512, 117), (136, 270, 251, 386), (335, 335, 469, 452), (38, 78, 150, 175)],
        "Platelets": [(43, 411, 111, 472), (609, 121, 640, 169)],
    },
    "BloodImage_00396.jpg": {
        "WBC": [(235, 138, 477, 355)],
        "RBC": [(474, 110, 596, 231), (429, 259, 537, 382), (121, 141, 214, 245), (543, 286, 640, 386)],
        "Platelets": [(437, 426, 492, 479)],
    },
}


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_finds_blood_cells_and_says_what_next(run, no_network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run("detect", "--demo", "--no-progress")
    assert (found.status, found.err) == (0, "")
    folder = tmp_path / "detections"
    assert files(folder) == ["BloodImage_00222.jpg", "BloodImage_00396.jpg", "detections.json"]
    content = results(folder)
    assert content["weights"] == "demo"
    assert [record["file"] for record in content["images"]] == [str(path) for path in DEMO_PHOTOS]
    for path, record in zip(DEMO_PHOTOS, content["images"], strict=True):
        boxes = np.asarray([row["box"] for row in record["detections"]], np.float32)
        marked = np.asarray([box for group in MARKED[path.name].values() for box in group], np.float32)
        overlap = np.asarray(jax.jit(box_iou)(boxes, marked))  # of all categories in one program
        columns = np.repeat(list(MARKED[path.name]), [len(group) for group in MARKED[path.name].values()])
        for category in MARKED[path.name]:
            rows = [row["category"] == category for row in record["detections"]]
            alike = overlap[rows][:, columns == category]
            assert (alike.max(axis=0) > 0.5).all(), (category, alike)
        assert sum(row["category"] == "WBC" for row in record["detections"]) == 1

        with Image.open(path) as photo, Image.open(folder / path.name) as picture:
            assert picture.size == photo.size
            changed = np.abs(np.asarray(picture, np.int16) - np.asarray(photo, np.int16)).max(axis=2) > 60
        assert 0.01 < changed.mean() < 0.3  # boxes and captions, and the photo between them
        assert f"detections/{path.name}\n" in found.out
    for command in ("flaxdet verify", "flaxdet detect photo.jpg"):
        assert f"\n  {command} " in found.out


def test_takes_the_options_of_detect(run, no_network, out):
    options = ("--classes", "wbc", "--no-pictures", "--out", out, "--no-progress")
    assert run("detect", "--demo", *options).status == 0
    assert files(out) == ["detections.json"]
    rows = [row for record in results(out)["images"] for row in record["detections"]]
    assert [row["category"] for row in rows] == ["WBC", "WBC"]


@pytest.mark.ci  # the test of what the demonstration finds uses the same weights
def test_the_weights_find_the_cells_of_the_whole_validation_set(shared):
    pytest.importorskip("pycocotools")
    data = shared / "data" / "bccd"
    model, variables, names = load_demo(Detect((), demo=True, threshold=0.2))
    result = evaluate(model, variables, read_coco(data / "images", data / "val.json", categories=names), batch_size=8)
    assert result.images == 87
    assert result.ap50 is not None
    assert result.ap50 >= 0.7


def test_threshold_and_sizes_reach_the_model():
    model, _, names = load_demo(Detect((), demo=True))
    assert (model.score_thresh, model.min_size, model.max_size) == (0.4, 256, 352)
    assert names == ["__background__", "Platelets", "RBC", "WBC"]
    model, _, _ = load_demo(Detect((), demo=True, threshold=0.0, min_size=64, max_size=96, dtype="bfloat16"))
    assert (model.score_thresh, model.min_size, model.max_size, model.dtype) == (0.0, 64, 96, "bfloat16")


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["photo.jpg"], "IMAGE"),
        (["--weights", "model.pth"], "--weights"),
        (["--model", "fcos_resnet50_fpn"], "--model"),
        (["--categories", "names.txt"], "--categories"),
    ],
)
def test_brings_its_own_photos_and_weights(run, out, arguments, option):
    found = run("detect", *arguments, "--demo", "--out", out)
    assert found.status == 2
    assert f"expected no {option} beside it" in found.error
    assert not out.exists()
