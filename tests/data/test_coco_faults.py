"""COCO files with a fault: each is named in one line."""

from __future__ import annotations

import pytest

from flaxdet.data import read_coco
from flaxdet.evaluation.evaluate import evaluate_results
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
    "id is a string": (_entry("images", 1, id="b"), 'image number 1 .* integer id, found "b"'),
    "id is another string": (_entry("images", 1, id="0013"), 'image number 1 .* integer id, found "0013"'),
    "id is true": (_entry("categories", 1, id=True), "category number 1 .* integer id, found true"),
    "image twice": (_entry("images", 1, id=10), "image id 10 occurs twice"),
    "image twice, as a string": (_entry("images", 1, id="10"), "image id 10 occurs twice"),
    "category twice": (_entry("categories", 1, id=2), "category id 2 occurs twice"),
    "name twice": (_entry("categories", 0, name="blue"), r'"blue" is the name of categories \[2, 9\]'),
    "no name": (_entry("categories", 0, name=""), "category 2 should have a name"),
    "background": (_entry("categories", 0, name="__background__"), '"__background__" is reserved'),
    "no file name": (_entry("images", 2, file_name=None), "image 16 should have a file_name, found null"),
    "size -2": (_entry("images", 2, width=-2), "image 16 .* positive integer width and height, found -2 and 64"),
    "half a pixel": (_entry("images", 2, height=63.5), "image 16 .* positive integer .* found 80 and 63.5"),
    "size as text": (_entry("images", 2, width="80px"), 'image 16 .* found "80px" and 64'),
    "name with NUL": (_entry("images", 2, file_name="a\0.png"), "image 16 should have a file_name"),
    "unknown image": (_entry("annotations", 0, image_id=11), "annotation 1 refers to image 11"),
    "unknown category": (_entry("annotations", 0, category_id=1), "annotation 1 refers to category 1"),
    "category is a list": (_entry("annotations", 0, category_id=[2]), r"annotation 1 refers to category \[2\]"),
    "three numbers": (_entry("annotations", 0, bbox=[1, 2, 3]), r"bbox of annotation 1 .* 4 finite numbers"),
    "no box": (_entry("annotations", 0, bbox=None), "bbox of annotation 1 .* found null"),
    "nan": (_entry("annotations", 0, bbox=[1, 2, 3, float("nan")]), r"bbox of annotation 1 .*NaN\]"),
    "infinity": (_entry("annotations", 0, bbox=[1, 2, 3, float("inf")]), "4 finite numbers"),
    "huge": (_entry("annotations", 0, bbox=[1, 2, 3, 10**400]), "4 finite numbers"),
    "strings": (_entry("annotations", 0, bbox=["1", "2", "3", "4 px"]), "4 finite numbers"),
    "nan as a string": (_entry("annotations", 0, bbox=["1", "2", "3", "nan"]), "4 finite numbers"),
    "crowd yes": (_entry("annotations", 0, iscrowd="yes"), 'iscrowd of annotation 1 should be 0 or 1, found "yes"'),
    "crowd 2": (_entry("annotations", 0, iscrowd=2), "iscrowd of annotation 1 should be 0 or 1, found 2"),
    "crowd list": (_entry("annotations", 0, iscrowd=[]), r"iscrowd of annotation 1 should be 0 or 1, found \[\]"),
    "area": (_entry("annotations", 0, area="large"), 'area of annotation 1 should be a number, found "large"'),
    "annotation is a number": (lambda c: c["annotations"].append(3), "annotation number .* an object, found 3"),
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


# what only a reader of labels and image files looks at
ONLY_READ_COCO = {"id is a string", "id is another string", "name twice", "no name", "background"}
ONLY_READ_COCO |= {"no file name", "size -2", "half a pixel", "size as text", "name with NUL"}


@pytest.mark.parametrize("fault", sorted(FAULTS.keys() - ONLY_READ_COCO))
def test_evaluation_checks_the_same(fault, tiny):
    """evaluate_results and read_coco refuse the same annotations, in the same words."""
    pytest.importorskip("pycocotools")
    images, path = tiny
    change, _ = FAULTS[fault]
    changed(path, lambda content: content if (new := change(content)) is None else new)
    said = []
    for check in (lambda: read_coco(images, path), lambda: evaluate_results([], path)):
        with pytest.raises(ValueError, match=r"annotations\.json: ") as caught:
            check()
        said.append(str(caught.value))
    assert said[0] == said[1]


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
