"""Which boxes and images of a COCO file are kept: as by pycocotools and torchvision, and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flaxdet.data import read_coco
from tests.data.coco_files import changed, one_image


def messy(folder: Path, seed: int) -> tuple[Path, Path]:
    """Random boxes as real files have them: outside, flat, crowds, fields missing, and nothing in order."""
    rng = np.random.default_rng(seed)
    content: dict[str, list[Any]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": key, "name": f"kind {key}"} for key in (90, 0, 3)],
    }
    for key in rng.permutation(40).tolist():
        rows, columns = (int(side) for side in rng.integers(5, 40, 2))
        name = f"{'deep/er/' if key % 3 == 0 else ''}{key}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (columns, rows)).save(folder / name)
        content["images"].append({"id": key, "file_name": name, "width": columns, "height": rows})
        for _ in range(int(rng.integers(0, 5))):
            box = [*rng.uniform(-15, 40, 2), *rng.choice([0, 0.5, 1, 1.5, 8.25, 30], 2)]
            annotation = {
                "id": len(content["annotations"]),
                "image_id": key,
                "category_id": int(rng.choice([0, 3, 90])),
                "bbox": [float(value) for value in box],
                "iscrowd": int(rng.random() < 0.2),
            }
            if annotation["iscrowd"] == 0 and rng.random() < 0.5:
                del annotation["iscrowd"]
            content["annotations"].append(annotation)
    rng.shuffle(content["annotations"])
    path = folder / "messy.json"
    path.write_text(json.dumps(content))
    return folder, path


def recomputed(path: Path, remove_empty: bool) -> dict[int, tuple[np.ndarray, list[int]]]:
    """torchvision's filtering by pycocotools, one box at a time."""
    coco = pytest.importorskip("pycocotools.coco").COCO(path)
    result = {}
    for key in sorted(coco.imgs):
        annotations = coco.imgToAnns[key]
        if remove_empty and all(min(annotation["bbox"][2:]) <= 1 for annotation in annotations):
            continue
        rows, columns = coco.imgs[key]["height"], coco.imgs[key]["width"]
        boxes, categories = [], []
        for annotation in annotations:
            if annotation.get("iscrowd", 0):
                continue
            x, y, w, h = (np.float32(value) for value in annotation["bbox"])
            x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + w, columns), min(y + h, rows)
            x1, y1, x2, y2 = min(x1, columns), min(y1, rows), max(x2, 0), max(y2, 0)
            if x2 > x1 and y2 > y1:
                boxes.append((x1, y1, x2, y2))
                categories.append(annotation["category_id"])
        result[key] = np.array(boxes, np.float32).reshape(-1, 4), categories
    return result


def check_against_pycocotools(images: Path, path: Path, remove_empty: bool) -> int:
    expected = recomputed(path, remove_empty)
    found = read_coco(images, path, remove_empty=remove_empty)
    assert [found[i].image_id for i in range(len(found))] == list(expected)
    assert found.report["images"] == len(expected)
    assert found.report["boxes"] == sum(len(boxes) for boxes, _ in expected.values())
    for record, (boxes, categories) in zip(found, expected.values(), strict=True):
        np.testing.assert_array_equal(record.boxes, boxes)
        assert record.boxes.dtype == np.float32
        assert [found.category_ids[label] for label in record.labels.tolist()] == categories
    return len(found)


@pytest.mark.filterwarnings("ignore:.*boxes reach out of their image")
@pytest.mark.parametrize("remove_empty", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_messy_files_are_filtered_as_torchvision_does(seed, remove_empty, tmp_path):
    images, path = messy(tmp_path, seed)
    left = check_against_pycocotools(images, path, remove_empty)
    assert left < 40 if remove_empty else left == 40


@pytest.mark.parametrize(("split", "images", "boxes"), [("train", 205, 2804), ("val", 87, 1137)])
def test_real_photos(shared, split, images, boxes):
    """3943 boxes in both, of which two have no area."""
    folder = shared / "data" / "bccd"
    assert check_against_pycocotools(folder / "images", folder / f"{split}.json", split == "train") == images
    found = read_coco(folder / "images", folder / f"{split}.json", remove_empty=True)
    nothing = dict.fromkeys(("removed_images", "crowd", "outside", "clipped", "tiny", "doubled", "repeated_ids"), 0)
    nothing |= {"skipped_images": 0, "oriented": 0, "repeated_files": 0}
    assert found.report == {"images": images, "boxes": boxes, "no_area": 1, **nothing}
    assert found.categories == ["__background__", "Platelets", "RBC", "WBC"]
    assert found[-1].size == found.read_image(images - 1).shape[:2] == (480, 640)


def test_what_is_dropped_is_counted(tmp_path):
    boxes = [
        [1, 2, 10, 5],
        [0, 0, 0, 5],  # no area
        [3, 3, 4, 0],
        [3, 3, -4, 6],
        [25, 15, 10, 10],  # clipped
        [-5, -5, 6, 6],
        [30, 5, 4, 4],  # outside
        [-9, 3, 9, 4],
        {"bbox": [1, 1, 5, 5], "iscrowd": 1},
        {"bbox": [1, 1, 6, 6], "iscrowd": None},
        [1, 2, 10, 5],
        {"bbox": [1, 2, 10, 5], "iscrowd": 1},
    ]
    found = read_coco(*one_image(tmp_path, boxes))
    assert found.report == {
        "images": 1,
        "boxes": 5,
        "removed_images": 0,
        "crowd": 2,
        "no_area": 3,
        "outside": 2,
        "clipped": 2,
        "tiny": 1,
        "doubled": 1,
        "repeated_ids": 0,
        "repeated_files": 0,
        "skipped_images": 0,
        "oriented": 0,
    }
    np.testing.assert_array_equal(
        found[0].boxes, [[1, 2, 11, 7], [25, 15, 30, 20], [0, 0, 1, 1], [1, 1, 7, 7], [1, 2, 11, 7]]
    )


@pytest.mark.parametrize(
    ("boxes", "kept"),
    [
        ([], False),
        ([[1, 1, 1, 9]], False),  # a side of one pixel
        ([[1, 1, 0.5, 9], [2, 2, 9, 0]], False),
        ([[1, 1, 1.01, 9]], True),
        ([[1, 1, 1, 9], [1, 1, 3, 3]], True),
        ([{"bbox": [1, 1, 9, 9], "iscrowd": 1}], True),  # kept there, without a box
    ],
)
def test_which_images_are_of_no_use(boxes, kept, tmp_path):
    images, path = one_image(tmp_path, boxes)
    Image.new("RGB", (9, 9)).save(tmp_path / "b.png")

    def with_another(content):
        content["images"].append({"id": 99, "file_name": "b.png", "height": 9, "width": 9})
        content["annotations"].append({"id": 99, "image_id": 99, "category_id": 4, "bbox": [1, 1, 4, 4]})

    changed(path, with_another)
    found = read_coco(images, path, remove_empty=True)
    assert [record.image_id for record in found] == ([7, 99] if kept else [99])
    assert found.report["removed_images"] == 1 - kept
    assert len(read_coco(images, path)) == 2


@pytest.mark.parametrize("value", ["missing", None, []])
def test_images_without_annotations(value, tiny):
    images, path = tiny
    changed(path, lambda content: {**content, "annotations": value})
    if value == "missing":
        changed(path, lambda content: {key: content[key] for key in ("images", "categories")})
    found = read_coco(images, path)
    assert (len(found), found.report["boxes"]) == (5, 0)
    assert found[0].boxes.shape == (0, 4)
    with pytest.raises(ValueError, match="none of its 5 images has a box"):
        read_coco(images, path, remove_empty=True)
