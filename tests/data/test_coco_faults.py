"""COCO files with a fault: each is named in one line."""

from __future__ import annotations

import pytest

from flaxdet.data import read_coco
from tests.data.coco_files import changed


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
