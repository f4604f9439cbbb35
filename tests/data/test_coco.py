"""The reader of COCO files: records, labels, and the sizes and pixels of the image files."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from flaxdet.data import ImageError, read_coco, read_image
from tests.data.coco_files import changed, one_image
from tests.tiny import NAMES

# Records


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


def test_numbers_as_strings_are_numbers(tiny):
    """One rule for all fields; ids with a leading zero are no numbers."""
    images, path = tiny
    expected = read_coco(images, path)

    def as_strings(entry):
        return {
            key: [str(v) for v in value] if key == "bbox" else value if key in ("file_name", "name") else str(value)
            for key, value in entry.items()
        }

    changed(path, lambda content: {kind: [as_strings(entry) for entry in content[kind]] for kind in content})
    found = read_coco(images, path)
    assert found.report == expected.report
    assert found.category_ids == expected.category_ids
    for a, b in zip(found, expected, strict=True):
        assert (type(a.image_id), a.image_id, a.size) == (int, b.image_id, b.size)
        np.testing.assert_array_equal(a.boxes, b.boxes)
        np.testing.assert_array_equal(a.labels, b.labels)


@pytest.mark.parametrize(
    ("value", "crowds"),
    [(0, 0), (1, 1), ("0", 0), ("1", 1), (False, 0), (True, 1), (None, 0), (0.0, 0), ("1.0", 1)],
)
def test_crowd(value, crowds, tmp_path):
    images, path = one_image(tmp_path, [{"bbox": [1, 1, 5, 5], "iscrowd": value}, [2, 2, 5, 5]])
    found = read_coco(images, path)
    assert (found.report["crowd"], found.report["boxes"]) == (crowds, 2 - crowds)


def test_a_byte_order_mark_and_integral_floats(tiny):
    images, path = tiny
    expected = read_coco(images, path)
    text = path.read_text().replace('"image_id": 10', '"image_id": 10.0').replace('"width": 80', '"width": 80.0')
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    for a, b in zip(read_coco(images, path), expected, strict=True):
        assert a.image_id == b.image_id
        np.testing.assert_array_equal(a.boxes, b.boxes)


# Labels


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


# Image files


def test_sizes_from_the_files(tiny):
    images, path = tiny
    Image.new("RGB", (33, 22)).save(images / "001.png")

    def forget(content):
        for entry in content["images"]:
            del entry["width"]

    found = read_coco(images, changed(path, forget))
    for unknown in (-1, 0, None, "-1"):
        changed(path, lambda content, unknown=unknown: content["images"][1].update(height=unknown, width=unknown))
        assert read_coco(images, path)[1].size == (22, 33)
    assert [record.size for record in found] == [(64, 80), (22, 33), *[(64, 80)] * 3]
    (images / "002.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"002\.png: is no image"):
        read_coco(images, path)


def test_image_files_of_another_size_or_broken(tiny):
    images, path = tiny
    found = read_coco(images, path)
    Image.new("RGB", (79, 64)).save(images / "003.png")
    with pytest.raises(
        ImageError, match=r"003\.png: is 64x79 pixels \(rows x columns\), but was 64x80 when .* was read"
    ):
        found.read_image(3)
    with pytest.raises(ImageError, match=r"003\.png: is 64x79 pixels \(rows x columns\), but .*json says 64x80 \("):
        read_coco(images, path)
    Image.new("RGB", (64, 80)).save(images / "003.png")
    with pytest.raises(
        ImageError, match=r"003\.png: is 80x64 pixels .* \(is it a photo that was turned .* lost its EXIF"
    ):
        read_coco(images, path)
    (images / "003.png").write_bytes((images / "002.png").read_bytes()[:200])
    with pytest.raises(ImageError, match=r"003\.png: is a broken image"):
        found.read_image(3)


def test_all_missing_files_are_reported_at_once(tiny):
    images, path = tiny
    for i in (0, 1, 3, 4):
        (images / f"00{i}.png").unlink()
    with pytest.raises(
        ValueError, match=r"4 of its 5 image files are missing in .*: 000.png, 001.png, 003.png, \.\.\. \(skip_b"
    ):
        read_coco(images, path)
    with pytest.raises(ValueError, match="nowhere: is not a folder, expected the one that holds the images of"):
        read_coco(images / "nowhere", path)
