"""COCO's figures of rows: answers worked out by hand, and pycocotools' own on random data."""

from __future__ import annotations

import copy
import json
import sys

import numpy as np
import pytest

from flaxdet.evaluation.coco_metrics import evaluate_results, read_annotations
from tests.tolerances import AP_HAND, AP_SAME

pytest.importorskip("pycocotools")
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

CATEGORIES = [{"id": 2, "name": "red"}, {"id": 5, "name": "green"}, {"id": 9, "name": "blue"}]
BOX = [10.0, 20.0, 100.0, 100.0]


def truth(*annotations, images=1, categories=CATEGORIES):
    """Annotations (image, category, box, further keys)."""
    rows = [
        {"id": i + 1, "image_id": image, "category_id": category, "bbox": box, **(rest[0] if rest else {})}
        for i, (image, category, box, *rest) in enumerate(annotations)
    ]
    return {"images": [{"id": i} for i in range(1, images + 1)], "annotations": rows, "categories": categories}


def found(image, category, box, score):
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


def close(value):
    return pytest.approx(value, abs=AP_HAND)


# Worked out by hand


def test_perfect():
    boxes = [[0, 0, 10, 20], [50, 0, 60, 50], [0, 200, 150, 150]]  # one of each size
    annotations = truth(*((1, 2 + 3 * (i > 0), box) for i, box in enumerate(boxes)))
    result = evaluate_results([found(1, 2 + 3 * (i > 0), box, 0.5) for i, box in enumerate(boxes)], annotations)
    assert (result.ap, result.ap50, result.ap75) == (close(1), close(1), close(1))
    assert (result.ap_small, result.ap_medium, result.ap_large) == (close(1), close(1), close(1))
    assert (result.ar_small, result.ar_medium, result.ar_large) == (close(1), close(1), close(1))
    assert (result.ar1, result.ar10, result.ar100) == (close(0.75), close(1), close(1))  # green has two boxes
    assert (result.images, result.boxes, result.detections) == (1, 3, 3)
    assert [(row.name, row.category_id, row.boxes) for row in result.per_class] == [
        ("red", 2, 1),
        ("green", 5, 2),
        ("blue", 9, 0),
    ]
    assert [row.ap for row in result.per_class] == [close(1), close(1), None]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        pytest.param([found(1, 2, [10, 20, 62, 100], 0.9)], (0.3, 1, 0), id="IoU .62: at .5, .55 and .6"),
        pytest.param([found(1, 2, [10, 20, 80, 100], 0.9)], (0.7, 1, 1), id="IoU .8: up to .8"),
        pytest.param(
            [found(1, 2, [300, 0, 9, 9], 0.9), found(1, 2, BOX, 0.8)], (0.5, 0.5, 0.5), id="a wrong one first"
        ),
        pytest.param([found(1, 2, BOX, 0.9), found(1, 2, [300, 0, 9, 9], 0.8)], (1, 1, 1), id="a wrong one last"),
        pytest.param([found(1, 2, BOX, 0.9), found(1, 2, BOX, 0.8)], (1, 1, 1), id="twice"),
        pytest.param([found(1, 5, BOX, 0.9)], (0, 0, 0), id="as another category"),
        pytest.param([found(2, 2, BOX, 0.9)], (0, 0, 0), id="in another image"),
        pytest.param([], (0, 0, 0), id="nothing found"),
    ],
)
def test_one_box(rows, expected):
    result = evaluate_results(rows, truth((1, 2, BOX), images=2))
    assert (result.ap, result.ap50, result.ap75) == tuple(map(close, expected))
    assert result.per_class[0].ap == close(expected[0])
    assert (result.per_class[0].ap50, result.per_class[0].ap75) == (close(expected[1]), close(expected[2]))
    assert (result.per_class[1].ap, result.per_class[2].ap) == (None, None)


def test_half_of_the_boxes():
    """Precision is 1 at the 51 of 101 recalls up to .5."""
    annotations = truth((1, 2, BOX), (2, 2, BOX), images=2)
    result = evaluate_results([found(1, 2, BOX, 0.9)], annotations)
    assert (result.ap, result.ar100) == (close(51 / 101), close(0.5))
    one = evaluate_results([found(1, 2, BOX, 0.9)], annotations, image_ids=[1])
    assert (one.ap, one.images, one.boxes, one.detections) == (close(1), 1, 1, 1)
    other = evaluate_results([found(1, 2, BOX, 0.9)], annotations, image_ids=[2])
    assert (other.ap, other.images, other.boxes, other.detections) == (0, 1, 1, 0)


def test_crowds():
    """What is found in a crowd counts neither for nor against, and a crowd need not be found."""
    crowd = (1, 2, [200, 200, 200, 200], {"iscrowd": 1})
    rows = [found(1, 2, [250, 250, 50, 50], 0.9), found(1, 2, [300, 300, 60, 60], 0.8), found(1, 2, BOX, 0.7)]
    result = evaluate_results(rows, truth((1, 2, BOX), crowd))
    assert (result.ap, result.boxes, result.per_class[0].boxes) == (close(1), 1, 1)
    assert evaluate_results(rows, truth((1, 2, BOX))).ap == close(1 / 3)
    assert evaluate_results(rows, truth(crowd)).ap is None


def test_boxes_without_an_area_cannot_be_found():
    result = evaluate_results([found(1, 2, BOX, 0.9)], truth((1, 2, BOX), (1, 2, [5, 5, 0, 0])))
    assert (result.ap, result.boxes) == (close(51 / 101), 2)


def test_area():
    """That of the annotation, which is a mask's, and the box's where it is missing."""
    rows = [found(1, 2, BOX, 0.9)]
    large = evaluate_results(rows, truth((1, 2, BOX)))
    assert (large.ap_small, large.ap_medium, large.ap_large) == (None, None, close(1))
    small = evaluate_results(rows, truth((1, 2, BOX, {"area": 900})))
    assert (small.ap_small, small.ap_medium, small.ap_large) == (close(1), None, None)
    assert evaluate_results(rows, truth((1, 2, BOX, {"area": None}))) == large


def test_ids_of_annotations_do_not_matter():
    """pycocotools alone takes a box with the id 0 for one that was never found, and loses doubled ones."""
    annotations = truth((1, 2, BOX, {"id": 0}), (2, 2, BOX, {"id": 7}), (3, 2, BOX, {"id": 7}), images=3)
    result = evaluate_results([found(i, 2, BOX, 0.9) for i in (1, 2, 3)], annotations)
    assert (result.ap, result.boxes) == (close(1), 3)


@pytest.mark.parametrize("missing", ["annotations", None])
def test_nothing_to_find(missing):
    annotations = truth(images=2)
    annotations.pop(missing, None)
    for rows in ([], [found(2, 5, BOX, 0.5)]):
        result = evaluate_results(rows, annotations)
        figures = result.to_dict()
        assert [figures.pop(name) for name in ("images", "boxes", "detections")] == [2, 0, len(rows)]
        assert [row["ap"] for row in figures.pop("per_class")] == [None, None, None]
        assert set(figures.values()) == {None}
        assert result.scalars() == {}
        assert json.loads(result.to_json())["ap"] is None
        assert result.table().splitlines()[3].split() == ["average", "precision", *"------"]


# What is printed and written


def test_table():
    annotations = truth((1, 2, BOX), (1, 5, [0, 0, 10, 10]), categories=[{"id": 5}, {"id": 2, "name": "a long name"}])
    result = evaluate_results([found(1, 2, [10, 20, 62, 100], 0.9)], annotations)
    assert result.table().splitlines() == [
        "1 images, 2 boxes, 1 detections",
        "",
        "                       AP    AP50    AP75   small  medium   large",
        "average precision  0.1500  0.5000  0.0000  0.0000       -  0.3000",
        "                        1      10     100   small  medium   large",
        "average recall     0.1500  0.1500  0.1500  0.0000       -  0.3000",
        "",
        "class        boxes      AP    AP50    AP75",
        "a long name      1  0.3000  1.0000  0.0000",
        "5                1  0.0000  0.0000  0.0000",
    ]


def test_json():
    result = evaluate_results([found(1, 2, BOX, 0.9)], truth((1, 2, BOX)))
    content = json.loads(result.to_json())
    assert content == result.to_dict()
    assert content["per_class"][2] == {
        "name": "blue", "category_id": 9, "boxes": 0, "ap": None, "ap50": None, "ap75": None
    }  # fmt: skip
    assert (content["ap"], content["ap_small"], content["detections"]) == (close(1), None, 1)
    assert result.scalars() == {name: close(1) for name in ("AP", "AP50", "AP75", "AR100")}


# Against pycocotools alone


def random_data(seed, images=12):
    rng = np.random.default_rng(seed)
    annotations, rows = [], []
    for image in range(1, images + 1):
        for _ in range(rng.integers(0, 8)):
            box = [*rng.integers(0, 200, 2).tolist(), *rng.integers(5, 150, 2).tolist()]
            crowd = int(rng.random() < 0.1)
            category = int(rng.choice([2, 5]))
            extra = {"iscrowd": crowd, "area": box[2] * box[3] * 0.8}
            annotations.append((image, category, box, extra))
            for _ in range(rng.integers(0, 4)):
                moved = (np.array(box) + rng.normal(0, 8, 4)).clip(1).tolist()
                rows.append(found(image, int(rng.choice([category, 9])), moved, float(rng.integers(0, 50)) / 50))
    return truth(*annotations, images=images), rows


@pytest.mark.parametrize("seed", range(3))
def test_equal_to_pycocotools(seed, tmp_path, capsys):
    annotations, rows = random_data(seed)
    file, results = tmp_path / "truth.json", tmp_path / "results.json"
    file.write_text(json.dumps({"info": {}, **annotations}))
    results.write_text(json.dumps(rows))
    before = copy.deepcopy((annotations, rows))
    capsys.readouterr()
    result = evaluate_results(rows, annotations)
    assert capsys.readouterr() == ("", "")  # pycocotools' prints stay off stdout
    assert (annotations, rows) == before
    assert evaluate_results(results, file) == result

    coco = COCO(str(file))
    theirs = COCOeval(coco, coco.loadRes(str(results)), "bbox")
    theirs.evaluate()
    theirs.accumulate()
    theirs.summarize()
    assert 0.01 < theirs.stats[0] < 0.9
    figures = list(result.to_dict().values())[:12]
    assert figures == [pytest.approx(value, abs=AP_SAME) for value in theirs.stats]
    for k, row in enumerate(result.per_class):
        precision = theirs.eval["precision"][:, :, k, 0, -1]
        assert row.boxes == sum(a["category_id"] == row.category_id and not a["iscrowd"] for a in coco.anns.values())
        if row.boxes:
            expected = (precision.mean(), precision[0].mean(), precision[5].mean())
            assert (row.ap, row.ap50, row.ap75) == tuple(pytest.approx(value, abs=AP_SAME) for value in expected)
        else:
            assert (row.ap, row.ap50, row.ap75) == (None, None, None)


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": None}, r"results: result 1: expected .*, all numbers finite; found"),
        ({"score": float("nan")}, r"result 1: expected"),
        ({"bbox": [1, 2, 3]}, r"result 1: expected"),
        ({"bbox": [1, 2, 3, float("inf")]}, r"result 1: expected"),
        ({"bbox": "1234"}, r"result 1: expected"),
        ({"image_id": 3}, r"result 1: image_id 3 is not in the annotations"),
        ({"image_id": [1]}, r"result 1: image_id \[1\] is not in the annotations"),
        ({"category_id": 1}, r"result 1: category_id 1 is not in the annotations"),
        ({"category_id": None}, r"result 1: category_id None is not in the annotations"),
    ],
)
def test_bad_results(change, message):
    good = found(1, 2, BOX, 0.9)
    with pytest.raises(ValueError, match=message):
        evaluate_results([good, good | change], truth((1, 2, BOX)))


@pytest.mark.parametrize("results", [{"a": 1}, "[]", 3, [3]])
def test_results_of_another_kind(results, tmp_path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(results))
    for given in (file, str(file)):
        with pytest.raises(ValueError, match=r"results\.json: (expected a list of results|result 0: expected)"):
            evaluate_results(given, truth())


@pytest.mark.parametrize("bad", ["annotations", "results"])
def test_bad_files(bad, tmp_path):
    good = {"annotations": tmp_path / "truth.json", "results": tmp_path / "rows.json"}
    good["annotations"].write_text(json.dumps(truth()))
    good["results"].write_text("[]")
    assert evaluate_results(**good).images == 1
    for content, message in ((None, "cannot be read"), ("{", "is not JSON")):
        file = tmp_path / "bad.json"
        if content is not None:
            file.write_text(content)
        with pytest.raises(ValueError, match=rf"bad\.json: {message}"):
            evaluate_results(**good | {bad: file})


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ([], "annotations: is not COCO's JSON: expected an object of lists, found a list"),
        ({"images": []}, 'annotations: is not COCO\'s JSON: expected a list "categories", found null'),
        ({"images": [{}], "categories": []}, r"image number 0 \(from 0\) should have an integer id, found null"),
        ({"images": ["a"], "categories": []}, r"image number 0 \(from 0\) should be an object, found \"a\""),
        (truth((1, None, BOX)), r"annotation 1 refers to category null, which the file doesn't have"),
        (truth((3, 2, BOX)), r"annotation 1 refers to image 3, which the file doesn't have"),
        (truth((1, 2, BOX), (1, 2, [1, 2])), r"bbox of annotation 2 should be 4 finite numbers"),
        (truth((1, 2, [0, 0, float("nan"), 1])), r"bbox of annotation 1 should be 4 finite numbers"),
        (truth(images=0), "annotations: has no images"),
    ],
)
def test_bad_annotations(annotations, message):
    with pytest.raises(ValueError, match=message):
        evaluate_results([], annotations)


def test_unknown_images():
    with pytest.raises(ValueError, match=r"image_ids: expected ids of the annotations, found \[4, 7\]"):
        evaluate_results([], truth(images=2), image_ids=[1, 7, 4])
    with pytest.raises(ValueError, match="at least one image"):
        evaluate_results([], truth(images=2), image_ids=[])


def test_read_annotations_fills_in_what_is_missing():
    boxes = ((1, 2, [1, 2, 3, 4]), (1, 2, BOX, {"iscrowd": True, "area": 7.5}), (1, 2, BOX, {"iscrowd": "0"}))
    rows = read_annotations(truth(*boxes))["annotations"]
    assert [(row["id"], row["area"], row["iscrowd"]) for row in rows] == [(1, 12, 0), (2, 7.5, 1), (3, 10_000, 0)]


# Ids and numbers as strings


def with_text_ids(annotations, rows, name):
    """The same data, with names in place of the images' numbers."""
    annotations, rows = copy.deepcopy(annotations), copy.deepcopy(rows)
    for entry in annotations["images"]:
        entry["id"] = name(entry["id"])
    for row in (*annotations["annotations"], *rows):
        row["image_id"] = name(row["image_id"])
    return annotations, rows


@pytest.mark.parametrize(
    "name",
    [lambda i: f"img_{i:04}", lambda i: f"{i:04}", str, lambda i: f"{i:04}" if i % 2 else f"{i:04} b"],
    ids=["names", "with zeros", "numbers", "mixed"],
)
def test_image_ids_as_strings(name):
    annotations, rows = random_data(1)
    expected = evaluate_results(rows, annotations)
    named, named_rows = with_text_ids(annotations, rows, name)
    assert evaluate_results(named_rows, named) == expected
    some = [entry["id"] for entry in annotations["images"]][:5]
    part = evaluate_results(rows, annotations, image_ids=some)
    assert evaluate_results(named_rows, named, image_ids=[name(i) for i in some]) == part
    assert part.images == 5


def test_strings_and_numbers_together():
    """numpy, by which pycocotools sorts ids, would make strings of the numbers."""
    annotations = truth((1, 2, BOX), (2, 2, BOX), images=2)
    annotations["images"][1]["id"] = annotations["annotations"][1]["image_id"] = "b"
    result = evaluate_results([found(1, 2, BOX, 0.9), found("b", 2, BOX, 0.8)], annotations)
    assert (result.ap, result.images, result.boxes) == (close(1), 2, 2)


def test_image_ids_as_strings_against_pycocotools(tmp_path):
    annotations, rows = with_text_ids(*random_data(1), lambda i: f"img_{i}")  # img_10 comes before img_2
    file = tmp_path / "truth.json"
    file.write_text(json.dumps({"info": {}, **annotations}))
    coco = COCO(str(file))
    theirs = COCOeval(coco, coco.loadRes(rows), "bbox")
    theirs.evaluate()
    theirs.accumulate()
    theirs.summarize()
    figures = list(evaluate_results(rows, annotations).to_dict().values())[:12]
    assert figures == [pytest.approx(value, abs=AP_SAME) for value in theirs.stats]


def test_a_number_in_a_string_is_that_number():
    annotations = truth((1, 2, BOX))
    annotations["annotations"][0] |= {
        "image_id": "1",
        "category_id": "2",
        "bbox": ["10", "20.0", "1e2", 100],
        "area": "900",
    }
    result = evaluate_results([found("1", "2", ["10", 20, "100", "100"], "0.9")], annotations)
    assert (result.ap, result.ap_small, result.ap_large) == (close(1), close(1), None)
    with pytest.raises(ValueError, match="image_id '01' is not in the annotations"):
        evaluate_results([found("01", 2, BOX, 0.9)], annotations)


def test_without_pycocotools(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.cocoeval", None)  # importing it now raises ImportError
    with pytest.raises(ImportError, match=r"needs pycocotools: pip install 'flaxdet\[train\]'"):
        evaluate_results([], truth((1, 2, BOX)))
