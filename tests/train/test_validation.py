"""Validation losses: each image with boxes counts once, whatever its bucket."""

from __future__ import annotations

import json
import math

from flaxdet.data import read_coco
from flaxdet.train.validation import ValidationLosses
from tests.tiny import FCOS_NAME, tiny_model, write_coco


def without_boxes_of(dataset, image_ids):
    content = json.loads(dataset.annotations.read_text())
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] not in image_ids]
    dataset.annotations.write_text(json.dumps(content))
    return read_coco(dataset.images, dataset.annotations)


def test_the_mean_over_images_with_boxes(tmp_path):
    dataset = read_coco(*write_coco(tmp_path, count=4))
    dataset = without_boxes_of(dataset, [dataset[1].image_id])
    losses = ValidationLosses(tiny_model(FCOS_NAME), dataset)
    seen = []

    def step(variables, batch):
        assert variables == "variables"
        assert batch["pixels"].shape[0] == 1
        assert batch["valid"].any()
        seen.append(int(batch["valid"].sum()))
        return {"loss": float(seen[-1]), "bbox": 1.0}

    losses._step = step
    boxes = [len(dataset[i].boxes) for i in range(4)]
    assert boxes[1] == 0
    assert losses("variables") == {"loss": sum(boxes) / 3, "bbox": 1.0}
    assert sorted(seen) == sorted(boxes)[1:]


def test_without_any_box_there_is_no_loss(tmp_path):
    dataset = read_coco(*write_coco(tmp_path, count=2))
    dataset = without_boxes_of(dataset, [dataset[i].image_id for i in range(2)])
    found = ValidationLosses(tiny_model(FCOS_NAME), dataset)({})
    assert list(found) == ["loss"]
    assert math.isnan(found["loss"])
