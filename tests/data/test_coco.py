"""The reader of COCO files: against pycocotools, and on every kind of file that real ones turn out to be."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flaxdet.data import ImageError, read_coco, read_image
from tests.tiny import NAMES, write_coco


@pytest.fixture
def tiny(tmp_path) -> tuple[Path, Path]:
    return write_coco(tmp_path, 5)


def changed(path: Path, change) -> Path:
    """The file with its content changed in place by a function."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))
    return path


def one_image(folder: Path, boxes: list[Any], size=(20, 30), **extra: Any) -> tuple[Path, Path]:
    """A file of one image with these boxes (or whole annotations)."""
    Image.new("RGB", size[::-1]).save(folder / "a.png")
    own = [box if isinstance(box, dict) else {"bbox": box} for box in boxes]
    content = {
        "images": [{"id": 7, "file_name": "a.png", "height": size[0], "width": size[1]}],
        "annotations": [{"id": i, "image_id": 7, "category_id": 4, **box} for i, box in enumerate(own)],
        "categories": [{"id": 4, "name": "thing"}],
        **extra,
    }
    path = folder / "a.json"
    path.write_text(json.dumps(content))
    return folder, path


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
    nothing = {"removed_images": 0, "crowd": 0, "outside": 0, "clipped": 0}
    assert found.report == {"images": images, "boxes": boxes, "no_area": 1, **nothing}
    assert found.categories == ["__background__", "Platelets", "RBC", "WBC"]
    assert found[-1].size == found.read_image(images - 1).shape[:2] == (480, 640)


def test_records(tiny):
    images, path = tiny
    content = json.loads(path.read_text())
    found = read_coco(images, path)
    assert len(found) == 5
    assert found.categories == NAMES
    assert found.category_ids == {1: 2, 2: 5, 3: 9}
    assert found.annotations == path
    for i, entry in enumerate(content["images"]):
        own = [box for box in content["annotations"] if box["image_id"] == entry["id"]]
        record = found[i]
        assert (record.image_id, record.size, record.path) == (entry["id"], (64, 80), images / entry["file_name"])
        np.testing.assert_array_equal(record.boxes[:, :2], [box["bbox"][:2] for box in own])
        np.testing.assert_array_equal(record.boxes[:, 2:] - record.boxes[:, :2], [box["bbox"][2:] for box in own])
        assert record.labels.dtype == np.int32
        assert [found.category_ids[label] for label in record.labels] == [box["category_id"] for box in own]
        np.testing.assert_array_equal(found.read_image(i), read_image(record.path))
    with pytest.raises(IndexError):
        found[5]
    again = pickle.loads(pickle.dumps(found))
    assert [record.path for record in again] == [record.path for record in found]


def test_a_record_is_the_callers_own(tiny):
    found = read_coco(*tiny)
    found[0].boxes[:] = 0
    assert (found[0].boxes[:, 2:] > found[0].boxes[:, :2]).all()


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
    ]
    found = read_coco(*one_image(tmp_path, boxes))
    assert found.report == {
        "images": 1,
        "boxes": 4,
        "removed_images": 0,
        "crowd": 1,
        "no_area": 3,
        "outside": 2,
        "clipped": 2,
    }
    np.testing.assert_array_equal(found[0].boxes, [[1, 2, 11, 7], [25, 15, 30, 20], [0, 0, 1, 1], [1, 1, 7, 7]])


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


def test_labels_by_name(tiny):
    own = ["__background__", "blue", "N/A", "red", "N/A", "green"]
    found, plain = read_coco(*tiny, categories=own), read_coco(*tiny)
    assert found.categories == own
    assert found.category_ids == {3: 2, 5: 5, 1: 9}
    for a, b in zip(found, plain, strict=True):
        assert [own[label] for label in a.labels] == [NAMES[label] for label in b.labels]
    with pytest.raises(ValueError, match=r'category 5 "green" is not one of the names .*\(blue, red\)'):
        read_coco(*tiny, categories=["__background__", "blue", "red"])
    with pytest.raises(ValueError, match='"red" occurs twice'):
        read_coco(*tiny, categories=["__background__", "blue", "red", "green", "red"])
    with pytest.raises(ValueError, match="as many categories as num_classes=3, got 6"):
        read_coco(*tiny, categories=own, num_classes=3)


def test_labels_are_ids_for_a_model_without_names(tiny):
    found = read_coco(*tiny, num_classes=11)
    assert found.categories == [NAMES[0], *("N/A",), "red", *("N/A",) * 2, "green", *("N/A",) * 3, "blue", "N/A"]
    assert found.category_ids == {2: 2, 5: 5, 9: 9}
    with pytest.raises(ValueError, match=r'category id 9 \("blue"\) is no label of a model of 9 classes.*1 to 8'):
        read_coco(*tiny, num_classes=9)


def test_id_0_is_a_category_like_any_other(tmp_path):
    images, path = one_image(tmp_path, [{"bbox": [1, 1, 5, 5], "category_id": 0}], categories=[{"id": 0, "name": "a"}])
    assert read_coco(images, path).category_ids == {1: 0}
    with pytest.raises(ValueError, match=r"category id 0 .* from 1 to 4"):  # but label 0 is the background
        read_coco(images, path, num_classes=5)


def test_categories_that_nothing_uses_need_not_fit(tmp_path):
    """Some tools write the super-category as a category of its own, often under the name of the only real one."""
    own = [{"id": 0, "name": "thing"}, {"id": 4, "name": "thing"}, {"id": 9, "name": "other"}]
    images, path = one_image(tmp_path, [[1, 1, 5, 5]], categories=own)
    assert read_coco(images, path).category_ids == {1: 4, 2: 9}
    assert read_coco(images, path, num_classes=5).category_ids == {4: 4}
    assert read_coco(images, path, categories=["__background__", "thing"]).category_ids == {1: 4}


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


def test_sizes_from_the_files(tiny):
    images, path = tiny
    Image.new("RGB", (33, 22)).save(images / "001.png")

    def forget(content):
        for entry in content["images"]:
            del entry["width"]

    found = read_coco(images, changed(path, forget))
    assert [record.size for record in found] == [(64, 80), (22, 33), *[(64, 80)] * 3]
    (images / "002.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"002\.png: is no image"):
        read_coco(images, path)


def test_boxes_refer_to_the_pixels_as_they_are_stored(tmp_path):
    images, path = one_image(tmp_path, [[20, 1, 10, 5]])
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_coco(images, path).read_image(0), pixels)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.rot90(pixels, -1))
    changed(path, lambda content: content["images"][0].update(height=30, width=20))
    with pytest.raises(ImageError, match=r"a\.png: is 20x30 pixels .*a\.json says 30x20 \(is it a photo that was"):
        read_coco(images, path).read_image(0)


def test_image_files_of_another_size_or_broken(tiny):
    images, path = tiny
    found = read_coco(images, path)
    Image.new("RGB", (79, 64)).save(images / "003.png")
    with pytest.raises(ImageError, match=r"003\.png: is 64x79 pixels \(rows x columns\), but .*json says 64x80$"):
        found.read_image(3)
    (images / "003.png").write_bytes((images / "002.png").read_bytes()[:200])
    with pytest.raises(ImageError, match=r"003\.png: is a broken image"):
        found.read_image(3)


def test_all_missing_files_are_reported_at_once(tiny):
    images, path = tiny
    for i in (0, 1, 3, 4):
        (images / f"00{i}.png").unlink()
    with pytest.raises(
        ValueError, match=r"4 of its 5 image files are missing in .*: 000.png, 001.png, 003.png, \.\.\.$"
    ):
        read_coco(images, path)
    with pytest.raises(ValueError, match="nowhere: is not a folder, expected the one that holds the images of"):
        read_coco(images / "nowhere", path)


def _entry(kind, number, **values):
    return lambda content: content[kind][number].update(values)


FAULTS = {
    "a list": (lambda content: [content], "is not COCO's JSON: expected an object of lists, found a list"),
    "no images": (lambda content: {"annotations": []}, 'expected a list "images", found null'),
    "no categories": (lambda content: content.pop("categories") and None, 'expected a list "categories"'),
    "annotations by id": (lambda content: {**content, "annotations": {"1": []}}, 'expected a list "annotations"'),
    "empty": (lambda content: {**content, "images": [], "annotations": []}, "has no images"),
    "image is a string": (lambda content: {**content, "images": ["a"]}, r'image number 0 .* object, found "a"'),
    "image without id": (_entry("images", 1, id=None), "image number 1 .* integer id, found null"),
    "id is a string": (_entry("annotations", 1, id="1"), 'annotation number 1 .* integer id, found "1"'),
    "id is true": (_entry("categories", 1, id=True), "category number 1 .* integer id, found true"),
    "image twice": (_entry("images", 1, id=10), "image id 10 occurs twice"),
    "annotation twice": (_entry("annotations", 1, id=1), "annotation id 1 occurs twice"),
    "category twice": (_entry("categories", 1, id=2), "category id 2 occurs twice"),
    "name twice": (_entry("categories", 0, name="blue"), r'"blue" is the name of categories \[2, 9\]'),
    "no name": (_entry("categories", 0, name=""), "category 2 should have a name"),
    "background": (_entry("categories", 0, name="__background__"), '"__background__" is reserved'),
    "no file name": (_entry("images", 2, file_name=None), "image 16 should have a file_name, found null"),
    "size 0": (_entry("images", 2, width=0), "image 16 .* positive integer width and height, found 0 and 64"),
    "size as string": (_entry("images", 2, width="80"), 'image 16 .* found "80" and 64'),
    "unknown image": (_entry("annotations", 0, image_id=11), "annotation 1 refers to image 11"),
    "unknown category": (_entry("annotations", 0, category_id=1), "annotation 1 refers to category 1"),
    "category is a list": (_entry("annotations", 0, category_id=[2]), r"annotation 1 refers to category \[2\]"),
    "three numbers": (_entry("annotations", 0, bbox=[1, 2, 3]), r"bbox of annotation 1 .* 4 finite numbers"),
    "no box": (_entry("annotations", 0, bbox=None), "bbox of annotation 1 .* found null"),
    "nan": (_entry("annotations", 0, bbox=[1, 2, 3, float("nan")]), r"bbox of annotation 1 .*NaN\]"),
    "infinity": (_entry("annotations", 0, bbox=[1, 2, 3, float("inf")]), "4 finite numbers"),
    "huge": (_entry("annotations", 0, bbox=[1, 2, 3, 10**400]), "4 finite numbers"),
    "strings": (_entry("annotations", 0, bbox=["1", "2", "3", "4"]), "4 finite numbers"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_in_one_line(fault, tiny):
    images, path = tiny
    change, message = FAULTS[fault]
    changed(path, lambda content: content if (new := change(content)) is None else new)
    with pytest.raises(ValueError, match=message) as caught:
        read_coco(images, path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 200


@pytest.mark.parametrize("content", [b"", b"<xml/>", b'{"images": [', b"\xff\xd8\xff\xe0 a jpeg", b"[" * 100_000])
def test_files_that_are_not_json(content, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json: is not JSON \(") as caught:
        read_coco(tmp_path, path)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ValueError, match=f"{path}: cannot be read .*expected a COCO JSON file"):
            read_coco(tmp_path, path)


def test_a_byte_order_mark_and_integral_floats(tiny):
    images, path = tiny
    expected = read_coco(images, path)
    text = path.read_text().replace('"image_id": 10', '"image_id": 10.0').replace('"width": 80', '"width": 80.0')
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    for a, b in zip(read_coco(images, path), expected, strict=True):
        assert a.image_id == b.image_id
        np.testing.assert_array_equal(a.boxes, b.boxes)
