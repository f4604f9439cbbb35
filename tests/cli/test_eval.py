"""``flaxdet eval``: what it prints and writes, and every way in which its input can be wrong."""

from __future__ import annotations

import errno
import json
import os
import sys

import pytest
from PIL import Image

import flaxdet
from flaxdet.data import read_image
from tests.cli.conftest import NAMES, files

pytest.importorskip("pycocotools")

from flaxdet.cli.eval import Eval
from flaxdet.evaluation.evaluate import coco_results, evaluate_results
from flaxdet.inference import programs

pytestmark = [pytest.mark.xdist_group("eval"), pytest.mark.usefixtures("quick")]

SUMMARY = "eval: 2 images, 4 boxes of 2 classes\neval: boxes a class: Platelets 2, white cell 2\n"
IDS = {"white cell": 2, "Platelets": 5}  # other numbers than their labels, and not all of them


@pytest.fixture
def nameless(quick, weights, tmp_path) -> list:
    """Options for the same weights as a .pth, which holds neither names nor sizes."""
    path = tmp_path / "cells.pth"
    flaxdet.save(path, *flaxdet.load(weights))
    return ["--weights", path, "--min-size", 96, "--max-size", 160]


@pytest.fixture
def data(tmp_path, write_photo):
    """Two photos, one of them without boxes; neither area nor iscrowd nor info."""
    names = ["b.jpg", "deep/a.png"]
    for i, name in enumerate(names):
        write_photo(tmp_path / "images" / name, seed=i)
    return tmp_path, {
        "images": [{"id": 7 + i, "file_name": name, "height": 60, "width": 80} for i, name in enumerate(names)],
        "categories": [{"id": key, "name": name} for name, key in IDS.items()],
        "annotations": [
            {"id": i, "image_id": 7, "category_id": 2 + 3 * (i > 1), "bbox": [10 * i, 5, 30, 20 + 9 * i]}
            for i in range(4)
        ],
    }


def write(data, **change):
    folder, content = data
    path = folder / "val.json"
    path.write_text(json.dumps(content | change))
    return ["eval", "--images", folder / "images", "--annotations", path, "--no-progress"]


# What it does


def test_writes_what_it_prints(run, weights, data, out):
    found = run(*write(data), "--weights", weights, "--out", out)
    assert (found.status, found.err) == (0, SUMMARY)
    assert files(out) == ["detections.json", "metrics.json"]
    rows = json.loads((out / "detections.json").read_text())
    result = evaluate_results(rows, data[0] / "val.json")
    assert json.loads((out / "metrics.json").read_text()) == result.to_dict()
    assert found.out == f"{result.table()}\n\n-> {out / 'metrics.json'}, {out / 'detections.json'}\n"
    assert found.out.startswith(f"2 images, 4 boxes, {len(rows)} detections\n")

    model, variables = flaxdet.load(weights)
    images = [read_image(data[0] / "images" / name) for name in ("b.jpg", "deep/a.png")]
    expected = coco_results(flaxdet.predict(model, variables, images), [7, 8], {1: 5, 3: 2})  # by name
    assert {row["category_id"] for row in expected} == {2, 5}
    assert {row["image_id"] for row in expected} == {7, 8}
    assert rows == expected


class Gone:
    """A pipe without a reader."""

    def write(self, text):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def test_files_are_written_even_if_nobody_reads_the_table(weights, data, out, monkeypatch):
    arguments = write(data)
    command = Eval(images=arguments[2], annotations=arguments[4], weights=str(weights), out=out, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Gone())
        with pytest.raises(BrokenPipeError):
            command.run()
    assert files(out) == ["detections.json", "metrics.json"]
    assert json.loads((out / "metrics.json").read_text())["images"] == 2


def test_writes_nothing_unless_asked(run, weights, data):
    arguments = write(data)
    before = files(data[0])
    found = run(*arguments, "--weights", weights)
    assert (found.status, found.err) == (0, SUMMARY)
    assert [line.split()[:2] for line in found.out.splitlines()[-3:]] == [
        ["class", "boxes"],
        ["white", "cell"],
        ["Platelets", "2"],
    ]
    assert "->" not in found.out
    assert files(data[0]) == before


def test_without_names_ids_are_the_labels(run, nameless, data, out):
    ids = [{"id": label, "name": name} for label, name in enumerate(NAMES)][1:]
    arguments = write(data, categories=ids, annotations=[])
    assert run(*arguments, *nameless, "--out", out).status == 0
    assert {row["category_id"] for row in json.loads((out / "detections.json").read_text())} == {1, 2, 3}
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["ap"], metrics["boxes"]) == (None, 0)  # nothing to find


def test_names_from_a_file(run, nameless, data, out, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(NAMES))
    arguments = [*write(data), *nameless, "--out", out]
    assert "category id 5" in run(*arguments).error
    assert run(*arguments, "--categories", names).status == 0
    assert {row["category_id"] for row in json.loads((out / "detections.json").read_text())} == {2, 5}
    names.write_text("\n".join(NAMES[1:]))
    assert "names.txt: expected 4 names, one for each label" in run(*arguments, "--categories", names).error


def test_batches_and_threshold(run, weights, data, out):
    arguments = [*write(data), "--weights", weights, "--out", out]
    assert run(*arguments, "--batch-size", "2").status == 0
    both = json.loads((out / "detections.json").read_text())
    assert {row["image_id"] for row in both} == {7, 8}
    found = run(*arguments, "--threshold", "1")
    assert "2 images, 4 boxes, 0 detections" in found.out
    assert json.loads((out / "metrics.json").read_text())["ap"] == 0
    assert json.loads((out / "detections.json").read_text()) == []


def test_progress(run, weights, data):
    found = run(*write(data)[:-1], "--weights", weights)
    assert found.status == 0
    assert "2/2" in found.err
    assert "2/2" not in found.out


# Bad input: one line that says what is wrong, and nothing computed or written


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, 'val.json: is not COCO\'s JSON: expected a list "images", found null'),
        ({"images": []}, "val.json: has no images"),
        ({"categories": [{"id": 2, "name": "RBC"}, {"id": 5, "name": "Zebra"}]}, 'category 5 "Zebra" is not one of'),
        ({"categories": [{"id": 2, "name": "RBC"}]}, "refers to category 5, which the file doesn't have"),
        ({"annotations": [{"id": 1, "image_id": 9, "category_id": 2, "bbox": [1, 2, 3, 4]}]}, "refers to image 9"),
        (
            {"annotations": [{"id": 1, "image_id": 7, "category_id": 2, "bbox": [1]}]},
            "bbox of annotation 1 should be 4",
        ),
        ({"images": [{"id": 7, "file_name": "no.jpg", "height": 6, "width": 8}]}, "1 of its 1 image files are missing"),
    ],
)
def test_bad_annotations(run, weights, data, out, change, message):
    if change.get("images"):
        change = change | {"annotations": []}
    found = run(*write(data, **change), "--weights", weights, "--out", out)
    assert (found.status, found.out) == (2, "")
    assert found.error.startswith("flaxdet eval: error: ")
    assert message in found.error
    assert not out.exists() or files(out) == []


@pytest.mark.parametrize(
    ("text", "message"), [(None, "cannot be read"), ("{", "is not JSON"), ("[]", "is not COCO's JSON")]
)
def test_no_annotations(run, weights, data, text, message):
    arguments = write(data)
    path = data[0] / "val.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    assert f"{path}: {message}" in run(*arguments, "--weights", weights).error


def test_missing_files(run, weights, data, tmp_path):
    arguments = write(data)
    assert "none.pth: cannot be read: No such file" in run(*arguments, "--weights", tmp_path / "none.pth").error
    arguments[2] = tmp_path / "none"
    assert f"{tmp_path / 'none'}: is not a folder" in run(*arguments, "--weights", weights).error
    assert "Missing from flaxdet eval: --annotations" in run("eval", "--images", tmp_path).error


def test_ids_out_of_range(run, nameless, data, out):
    error = run(*write(data), *nameless, "--out", out).error
    assert 'category id 5 ("Platelets") is no label of a model of 4 classes: expected ids from 1 to 3' in error


def test_bad_images(run, weights, data, out, write_photo):
    arguments = [*write(data), "--weights", weights, "--out", out]
    path = data[0] / "images" / "deep" / "a.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:2000])
    found = run(*arguments)
    assert f"{path}: is a broken image" in found.error
    path.write_bytes(whole)
    data[1]["images"][1]["width"] = 60
    write(data)
    assert f"{path}: is 60x80 pixels (rows x columns), but" in run(*arguments).error
    assert files(out) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--threshold", "2"), "--threshold should be from 0 to 1, got 2.0"),
        (("--min-size", "0"), "--min-size should be at least 1 pixel, got 0"),
        (("--batch-size", "0"), "--batch-size should be at least 1, got 0"),
        (("--workers", "0"), "--workers should be at least 1, got 0"),
        (("--dtype", "int8"), "invalid choice 'int8'"),
        (("--categories", "none.txt"), "none.txt: cannot be read"),
    ],
)
def test_bad_options(run, weights, data, out, options, message):
    found = run(*write(data), "--weights", weights, "--out", out, *options)
    assert (found.status, found.out) == (2, "")
    assert message in found.error
    assert not out.exists()


def test_output_that_cannot_be_written(run, weights, data, out, monkeypatch):
    arguments = [*write(data), "--weights", weights, "--out"]
    file = data[0] / "file"
    file.write_text("mine")
    assert f"{file}: can't be written to (File exists)" in run(*arguments, file).error
    assert file.read_text() == "mine"

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out.mkdir()
    (out / "metrics.json").write_text("of an earlier run")
    monkeypatch.setattr(os, "fsync", full)
    found = run(*arguments, out)
    message = f"{out / 'metrics.json'}: cannot be written: No space left on device; nothing was changed"
    assert found.err == f"{SUMMARY}flaxdet eval: error: {message}\n"
    assert "average precision" in found.out  # what took so long to compute is not lost
    assert files(out) == ["metrics.json"]
    assert (out / "metrics.json").read_text() == "of an earlier run"


def test_without_pycocotools(run, weights, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.cocoeval", None)
    found = run(*write(data), "--weights", weights)
    assert found.status == 2
    assert "needs pycocotools: pip install 'flaxdet[train]'" in found.error


def test_interrupted(run, weights, data, out, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(programs, "jitted_detect", interrupt)
    found = run(*write(data), "--weights", weights, "--out", out)
    assert (found.status, found.err) == (130, f"{SUMMARY}flaxdet: interrupted\n")
    assert files(out) == []


# How the data set is read


def turned(data, weights):
    """The first photo stored turned, with an EXIF orientation; its boxes upright, the stored size stated."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = data[0] / "images" / "b.jpg"
    with Image.open(path) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=95)
    data[1]["images"][0] |= {"height": 80, "width": 60}
    return [*write(data), "--weights", weights]


def test_turned_photos(run, weights, data, out):
    arguments = turned(data, weights)
    found = run(*arguments, "--out", out)
    assert found.status == 0
    assert found.err.splitlines()[2:] == [
        "eval: 1 of 2 photos carry an EXIF orientation: photos and boxes are taken upright (--as-stored: as stored)",
        "eval: warning: nothing tells whether the boxes of 1 photo with an EXIF orientation were drawn on the upright "
        "photo or on the photo as stored; they are taken upright",
    ]
    boxes = [row["bbox"] for row in json.loads((out / "detections.json").read_text()) if row["image_id"] == 7]
    assert max(x + w for x, _, w, _ in boxes) > 60  # of 80 columns upright
    assert run(*arguments, "--as-stored").err.splitlines()[2].endswith("taken as stored (upright without it)")
    data[1]["annotations"][0]["bbox"] = [1, 61, 5, 5]
    error = run(*write(data), "--weights", weights).error
    assert "boxes leave the upright photo" in error
    assert "--as-stored" in error
    assert "--upright" in error


def test_skip_broken(run, weights, data, out):
    path = data[0] / "images" / "deep" / "a.png"
    path.write_bytes(path.read_bytes()[:2000])
    found = run(*write(data), "--weights", weights, "--skip-broken")
    assert found.status == 0
    assert "eval: 1 image, 4 boxes of 2 classes; left out: 1 image that can't be used" in found.err
    assert f"eval: left out: {path}: is a broken image" in found.err
    assert found.out.startswith("1 images, 4 boxes, ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--as-stored", "--upright"), "expected --as-stored or --upright, got both"),
        (("--pixel-range", "1", "1"), "--pixel-range should be"),
        (("--max-pixels", "-1"), "--max-pixels should be at least 1, got -1"),
        (("--max-pixels", "99"), "4800 pixels, expected at most 99"),
    ],
)
def test_bad_options_of_data(run, weights, data, options, message):
    assert message in run(*write(data), "--weights", weights, *options).error
