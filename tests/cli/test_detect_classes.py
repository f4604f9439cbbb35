"""``flaxdet detect``: the threshold, the classes asked for, and the names of the labels."""

from __future__ import annotations

import pytest

import flaxdet
from flaxdet.cli.options import check_categories, labels_of, read_categories
from tests.cli.conftest import NAMES, files, results

pytestmark = pytest.mark.xdist_group("detect")

# Threshold and classes


def scores(out) -> list[float]:
    return [row["score"] for record in results(out)["images"] for row in record["detections"]]


def test_threshold(run, quick, weights, photo, out):
    options = (photo, "--weights", weights, "--out", out, "--no-pictures")
    run("detect", *options)
    default = scores(out)
    assert min(default) > 0.2
    assert run("detect", *options, "--threshold", "0.1").status == 0  # below the model's own
    low = scores(out)
    assert 0.1 < min(low) < 0.2
    assert len(low) > len(default)
    found = run("detect", *options, "--threshold", "1")
    assert (found.status, scores(out)) == (0, [])
    assert "0 detections in 1 images" in found.out


@pytest.mark.parametrize("threshold", ["-0.1", "1.01", "nan", "50"])
def test_threshold_out_of_range(run, photo, out, threshold):
    assert "--threshold should be from 0 to 1, got" in run("detect", photo, f"--threshold={threshold}").error
    assert not out.exists()


def test_classes(run, quick, weights, photo, out):
    options = (photo, "--weights", weights, "--out", out)
    run("detect", *options)
    rows = results(out)["images"][0]["detections"]
    assert {row["label"] for row in rows} == {0, 1, 2, 3}
    for given, labels in (
        (("platelets",), {1}),
        (("1", "WHITE cell"), {1, 3}),
        (("3", "White Cell"), {3}),
        (("RBC",), {2}),
    ):
        found = run("detect", *options, "--classes", *given)
        assert found.status == 0
        kept = [row for row in rows if row["label"] in labels]
        assert results(out)["images"][0]["detections"] == kept


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("platlet", r"class 'platlet': the model knows no such class; did you mean Platelets\?"),
        ("zebra", "class 'zebra': the model knows no such class; it knows Platelets, RBC, white cell"),
        ("4", "class 4: expected a label from 0 to 3"),
        ("²", "no such class"),
    ],
)
def test_unknown_classes(run, quick, weights, photo, out, name, message):
    found = run("detect", photo, "--weights", weights, "--out", out, "--classes", "RBC", name)
    assert found.status == 2
    with pytest.raises(ValueError, match=message):
        raise ValueError(found.error)
    assert files(out) == []


def test_labels_of():
    assert labels_of((), NAMES, 4) is None
    assert labels_of(("0", "3"), None, 4) == {0, 3}
    with pytest.raises(ValueError, match=r"'RBC': these weights have no class names; give the label's number, or --"):
        labels_of(("RBC",), None, 4)
    coco = flaxdet.FCOS_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    assert labels_of(("Person", "traffic light"), coco, 91) == {1, 10}
    with pytest.raises(ValueError, match="did you mean traffic light"):
        labels_of(("trafic light",), coco, 91)
    with pytest.raises(ValueError, match=r"it knows person, bicycle") as error:
        labels_of(("xyzzy",), coco, 91)
    assert "N/A" not in str(error.value)
    with pytest.raises(ValueError, match="no such class"):
        labels_of(("N/A",), coco, 91)


# Names of the labels


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("names.txt", "__background__\nPlatelets\n RBC \nWBC\n\n"),
        ("names", "\ufeff__background__\r\nPlatelets\r\nRBC\r\nWBC"),
        ("names.json", '["__background__", "Platelets", "RBC", "WBC"]'),
        (
            "annotations.JSON",
            '{"categories": [{"id": 2, "name": "RBC"}, {"id": 1, "name": "Platelets"}, {"id": 3, "name": "WBC"}]}',
        ),
    ],
)
def test_kinds_of_categories(tmp_path, file, text):
    path = tmp_path / file
    path.write_bytes(text.encode())
    assert read_categories(path) == ["__background__", "Platelets", "RBC", "WBC"]


def test_gaps_in_the_ids(tmp_path):
    path = tmp_path / "annotations.json"
    path.write_text('{"categories": [{"id": 3, "name": "c"}, {"id": 1, "name": "a"}]}')
    assert read_categories(path) == ["__background__", "a", "N/A", "c"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.json", b"{", "found something else"),
        ("a.json", b'{"images": []}', "found something else"),
        ("a.json", b'{"categories": []}', "found something else"),
        ("a.json", b'{"categories": [{"id": "x", "name": "y"}]}', "found something else"),
        (
            "a.json",
            b'{"categories": [{"id": 1000000000000, "name": "y"}]}',
            "found something else .ids from 1000000000000",
        ),
        ("a.json", b'{"categories": [{"id": -1, "name": "y"}]}', "found something else .ids from -1"),
        ("a.json", b"[1, 2]", "found something else .a JSON list"),
        ("a.json", b"3", "found something else .a JSON int"),
        ("a.txt", b"\xff\xfe\x00", "found something that is no text"),
        ("a.txt", b" \n", "found an empty file"),
    ],
)
def test_bad_categories(tmp_path, file, content, message):
    path = tmp_path / file
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file}: expected a JSON list of names, COCO .*, {message}"):
        read_categories(path)


def test_missing_categories(run, photo, tmp_path):
    found = run("detect", photo, "--categories", tmp_path / "none.json")
    assert "none.json: cannot be read (No such file or directory), expected a JSON list" in found.error


def test_categories_replace_the_files_own(run, quick, weights, photo, out, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("nothing\nalpha\nbeta\ngamma")
    options = (photo, "--weights", weights, "--out", out, "--categories", names)
    assert run("detect", *options, "--classes", "gamma").status == 0
    assert {row["category"] for row in results(out)["images"][0]["detections"]} == {"gamma"}
    names.write_text("alpha\nbeta\ngamma")  # without the background, every name would be one off
    message = "names.txt: expected 4 names, one for each label of the model, label 0 (the background) first; found 3"
    assert message in run("detect", *options).error
    check_categories(names, NAMES, 4)
