"""One photo and one training step through the commands on the builder's own ResNet-50.

What the other tests of ``detect`` and ``train`` show, they show on small models. ``convert``, ``verify``, ``eval`` and
``export`` have their passes at full size in test_convert.py, test_verify.py, test_evaluate_checkpoints.py (Faster R-CNN
too, as ``verify``) and test_exported.py.
"""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from PIL import Image

import flaxdet
from flaxdet.data import read_image
from tests.cli.conftest import NAMES, files, results
from tests.tiny import write_coco
from tests.tolerances import HAND_F32

# in CI, test_evaluate_checkpoints.py detects with whole ResNet-50s, and parity/test_losses.py compares their steps
pytestmark = pytest.mark.release


@pytest.mark.xdist_group("full_size_detect")
def test_detect(run, real_weights, photo, out):
    found = run("detect", photo, "--weights", real_weights, "--out", out)
    assert (found.status, found.err) == (0, "")
    content = results(out)
    assert content.keys() == {"weights", "images", "failed", "skipped"}
    assert content["weights"] == str(real_weights)
    assert content["failed"] == content["skipped"] == []
    (record,) = content["images"]
    assert record["file"] == str(photo)
    assert (record["height"], record["width"]) == (60, 80)

    model, variables = flaxdet.load(real_weights)
    assert (model.min_size, model.max_size) == (96, 160)
    (expected,) = flaxdet.Predictor(model, variables)([read_image(photo)])
    rows = record["detections"]
    assert len(rows) == len(expected["scores"]) > 3
    assert f"{len(rows)} detections in 1 images -> {out / 'detections.json'}" in found.out
    np.testing.assert_allclose([row["box"] for row in rows], expected["boxes"], rtol=HAND_F32)
    np.testing.assert_allclose([row["score"] for row in rows], expected["scores"], rtol=HAND_F32)
    assert [row["label"] for row in rows] == expected["labels"].tolist()
    assert [row["category"] for row in rows] == [NAMES[label] for label in expected["labels"]]

    assert record["picture"] == str(out / "photo.jpg")
    with Image.open(record["picture"]) as picture:
        assert (picture.format, picture.size) == ("JPEG", (80, 60))
        assert np.abs(np.asarray(picture, int) - read_image(photo)).max() > 50  # something is drawn
    assert files(out) == ["detections.json", "photo.jpg"]


@pytest.mark.xdist_group("full_size_train")
def test_train(run, real_weights, tmp_path):
    for package in ("pycocotools", "orbax", "matplotlib", "tensorboardX"):
        pytest.importorskip(package)
    images, annotations = write_coco(tmp_path, count=2)
    options = ["--train", images, annotations, "--out", tmp_path / "run", "--weights", real_weights]
    options += ["--min-size", 64, "--max-size", 96, "--epochs", 1, "--batch-size", 2, "--log-every", 1, "--no-progress"]
    with jax.numpy_dtype_promotion("standard"):
        assert run("train", *options).status == 0
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1]
    assert np.isfinite(log[0]["loss"])
    _, before = flaxdet.load(real_weights)
    _, after = flaxdet.load(tmp_path / "run" / "model.pth")
    moved = {
        name: not np.array_equal(*(v["params"]["backbone"]["body"][name]["conv3"]["kernel"] for v in (before, after)))
        for name in ("layer1_2", "layer2_3", "layer3_5", "layer4_2")
    }
    assert moved == {"layer1_2": False, "layer2_3": True, "layer3_5": True, "layer4_2": True}
