"""What a data set says of itself: counts, boxes a class, and loud words where most boxes look wrong."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from flaxdet.data import DatasetWarning, read_coco
from tests.data.coco_files import changed, one_image

GOOD = [[2, 3, 4, 5], [10, 5, 8, 9], [20, 10, 9, 9], [12, 12, 10, 6]]  # in 20x30 pixels (rows x columns)


def test_lines(tmp_path):
    boxes = [
        *GOOD,
        GOOD[0],
        [25, 15, 9, 2],
        [5, 5, 1, 9],
        [3, 3, 0, 4],
        [40, 3, 4, 4],
        {"bbox": [1, 1, 3, 3], "iscrowd": 1},
    ]
    images, path = one_image(tmp_path, boxes)

    def two_ids(content):
        content["annotations"][1]["id"] = 0
        content["annotations"][2]["category_id"] = 9
        content["categories"].append({"id": 9, "name": "other"})

    found = read_coco(images, changed(path, two_ids))
    assert str(found.summary).splitlines() == [
        "1 image, 7 boxes of 2 classes; left out: 1 box without an area, 1 box outside their image, 1 box of crowds",
        "boxes a class: thing 6, other 1",
        "boxes: 1 clipped to their image, 1 tiny (a side of at most 1 pixel), 1 doubled (box and class of another "
        "one), 1 with the id of another annotation",
    ]


def test_many_classes_are_shortened(tmp_path):
    own = [{"id": i, "name": f"c{i:03}"} for i in range(50)]
    boxes = [{"bbox": [1, 1, 5 + i / 100, 5], "category_id": i} for i in range(50) for _ in range(50 - i)]
    found = read_coco(*one_image(tmp_path, boxes, categories=own))
    line = str(found.summary).splitlines()[1]
    assert line.startswith("boxes a class: c000 50, c001 49, ")
    assert "c009 41, ... (30 classes between), c040 10" in line
    assert line.endswith("c049 1")


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (
            [[x, y, x + w, y + h] for x, y, w, h in GOOD],
            r"2 of 4 boxes reach out .*, and 4 fit as corners x1, y1, x2, y2",
        ),
        ([[-5, 2, 30, 30], [-6, -6, 20, 20], GOOD[0]], r"2 of 3 boxes reach out of their image; COCO's bbox is \[x, y"),
        ([[400, 300, 50, 60], [500, 20, 9, 9]], "2 of 2 boxes reach out of their image"),
        ([[0.1, 0.2, 0.5, 0.5], [0.5, 0.5, 0.2, 0.3], GOOD[0]], "2 of 3 boxes lie between 0 and 1, as normalised"),
        ([{"bbox": box, "iscrowd": 1} for box in GOOD], "all 4 boxes are crowds .*CVAT"),
        ([[9, 9, 3, -4], [5, 5, 0, 0], GOOD[0]], "2 of 3 boxes have no area: their width or height is 0 or less"),
    ],
)
def test_loud_words(boxes, message, tmp_path):
    pair = one_image(tmp_path, boxes)
    with pytest.warns(DatasetWarning, match=rf"a\.json: {message}"):
        found = read_coco(*pair)
    (warning,) = found.summary.warnings
    assert str(found.summary).splitlines()[-1] == f"warning: {warning}"


@pytest.mark.parametrize(
    "boxes",
    [
        GOOD,
        [*GOOD, [25, 15, 9, 9]],  # one of five is clipped
        [[0, 0, 30.9, 20.9]] * 3,  # by rounding
        [[0, 0, 30, 20]],  # also fits as corners
        [{"bbox": GOOD[0], "iscrowd": 1}, GOOD[1]],
        [[5, 5, 0, 0], GOOD[0]],
        [],
    ],
)
def test_no_loud_words(boxes, tmp_path):
    assert read_coco(*one_image(tmp_path, boxes)).summary.warnings == ()


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (
            [{"bbox": box, "iscrowd": 1} for box in GOOD],
            "none of its 1 images has a box that counts: all 4 boxes are crowds",
        ),
        ([[0.1, 0.1, 0.5, 0.5]], "none of its 1 images has a box that counts: 1 of 1 boxes lie between 0 and 1"),
        ([[0, 0, 0, 0]], "none of its 1 images has a box that counts: 1 of 1 boxes have no area"),
        ([], "none of its 1 images has a box that counts$"),
    ],
)
def test_nothing_to_train_on_says_why(boxes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_coco(*one_image(tmp_path, boxes), remove_empty=True)


def background(folder):
    own = [{"id": 0, "name": "_background_"}, {"id": 4, "name": "thing"}]
    return one_image(folder, GOOD, categories=own)


def test_a_category_that_nothing_uses_stays_a_class(tmp_path):
    found = read_coco(*background(tmp_path))
    assert found.categories == ["__background__", "_background_", "thing"]
    assert found.summary.unused is not None
    assert str(found.summary).splitlines()[-1] == (
        "warning: 1 category (_background_) that no annotation uses will be a class all the same, unless --drop-unused "
        "(drop_unused=True)"
    )


def test_unless_it_is_dropped(tmp_path):
    found = read_coco(*background(tmp_path), drop_unused=True)
    assert found.categories == ["__background__", "thing"]
    assert found.category_ids == {1: 4}
    assert found[0].labels.tolist() == [1] * 4
    assert str(found.summary).splitlines()[0] == (
        "1 image, 4 boxes of 1 class; left out: 1 category (_background_) that no annotation uses"
    )


def test_evaluation_says_it_too(tmp_path):
    found = read_coco(*background(tmp_path), categories=["__background__", "thing"])
    assert "no annotation uses 1 category (_background_)" in str(found.summary).splitlines()
    assert found.summary.unused is None
    with pytest.raises(ValueError, match="drop_unused changes the labels: expected it without categories"):
        read_coco(*background(tmp_path), categories=["__background__", "thing"], drop_unused=True)


def test_an_image_that_occurs_twice(tmp_path):
    images, path = one_image(tmp_path, GOOD)
    changed(path, lambda content: content["images"].append({**content["images"][0], "id": 8}))
    assert "1 image with the file of another image" in str(read_coco(images, path).summary).splitlines()


def test_repeated_ids_lose_nothing(tmp_path):
    """Merged files repeat ids of annotations; nothing needs them."""
    images, path = one_image(tmp_path, GOOD)
    for own in ("0", None, 0):
        changed(path, lambda content, own=own: [entry.update(id=own) for entry in content["annotations"]] and None)
        found = read_coco(images, path)
        assert (found.report["boxes"], found.report["repeated_ids"]) == (4, 0 if own is None else 3)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("xyxy", "38 of 49 boxes reach out of their image, and 49 fit as corners"),
        ("cvat-masks-crowd", "all 49 boxes are"),
    ],
)
def test_real_cases(case, message, shared):
    folder = shared / "cases" / case
    with pytest.warns(DatasetWarning, match=message):
        read_coco(folder / "images", folder / "train.json")


@pytest.mark.parametrize("case", ["iscrowd-string", "via-minus1", "labelme-background"])
def test_real_cases_that_are_well(case, shared):
    folder = shared / "cases" / case
    found = read_coco(folder / "images", folder / "train.json")
    assert (found.report["boxes"], found.report["crowd"], found.summary.warnings) == (49, 0, ())
    assert {record.size for record in found} == {(480, 640)}
    assert json.loads((folder / "train.json").read_text())["images"]
    Image.open(found[0].path).close()
