"""``flaxdet detect``: what it writes, and every way in which its input can be wrong."""

from __future__ import annotations

import errno
import json
import os
import pickle
import socket

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

import flaxdet
from flaxdet.cli.options import check_categories, labels_of, read_categories
from flaxdet.convert import checkpoint
from flaxdet.data import read_image
from tests.cli.conftest import NAMES
from tests.tolerances import HAND_F32


@pytest.fixture
def out(tmp_path):
    return tmp_path / "results"


@pytest.fixture
def photo(tmp_path, write_photo):
    return write_photo(tmp_path / "photos" / "photo.jpg")


def results(out) -> dict:
    return json.loads((out / "detections.json").read_text())


def files(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# What it does


def test_one_photo(run, weights, photo, out):
    found = run("detect", photo, "--weights", weights, "--out", out)
    assert (found.status, found.err) == (0, "")
    content = results(out)
    assert content.keys() == {"weights", "images", "failed"}
    assert content["weights"] == str(weights)
    assert content["failed"] == []
    (record,) = content["images"]
    assert record["file"] == str(photo)
    assert (record["height"], record["width"]) == (60, 80)

    model, variables = flaxdet.load(weights)
    assert (model.min_size, model.max_size) == (96, 160)
    (expected,) = flaxdet.Predictor(model, variables)([read_image(photo)])
    rows = record["detections"]
    assert len(rows) == len(expected["scores"]) > 3
    assert f"{len(rows)} detections in 1 images -> {out / 'detections.json'}" in found.out
    np.testing.assert_allclose([row["box"] for row in rows], expected["boxes"], rtol=HAND_F32)
    np.testing.assert_allclose([row["score"] for row in rows], expected["scores"], rtol=HAND_F32)
    assert [row["label"] for row in rows] == expected["labels"].tolist()
    assert [row["category"] for row in rows] == [NAMES[label] for label in expected["labels"]]

    assert record["picture"] == str(out / "photo.jpg")
    with Image.open(record["picture"]) as picture:
        assert (picture.format, picture.size) == ("JPEG", (80, 60))
        assert np.abs(np.asarray(picture, int) - read_image(photo)).max() > 50  # something is drawn
    assert files(out) == ["detections.json", "photo.jpg"]


def test_files_folders_and_patterns(run, quick, weights, tmp_path, write_photo, out):
    for name in ("a/one.jpg", "a/deep/two.png", "a/.hidden/no.jpg", "b/three.jpg", "b/four.bmp", "b/five.png"):
        write_photo(tmp_path / name, seed=len(name))
    (tmp_path / "a" / "notes.txt").write_text("no image")
    arguments = [tmp_path / "a", tmp_path / "b" / "*.jpg", tmp_path / "b" / "four.bmp", tmp_path / "b" / "f*.bmp"]
    found = run("detect", *arguments, "--weights", weights, "--out", out, "--no-progress")
    assert (found.status, found.err) == (0, "")
    names = ["a/deep/two.png", "a/one.jpg", "b/four.bmp", "b/three.jpg"]
    images = results(out)["images"]
    assert [record["file"] for record in images] == [str(tmp_path / name) for name in names]  # each once, sorted
    assert files(out) == ["detections.json", "four.jpg", "one.jpg", "three.jpg", "two.png"]
    with Image.open(out / "two.png") as picture:
        assert picture.format == "PNG"
    assert images[0]["detections"] != images[1]["detections"]


def test_same_names_in_two_folders(run, quick, weights, tmp_path, write_photo, out):
    for i, name in enumerate(("x/photo.jpg", "y/photo.jpg", "y/PHOTO.bmp", "z/photo.png")):
        write_photo(tmp_path / name, seed=i)
    found = run("detect", *(tmp_path / n for n in "xyz"), "--weights", weights, "--out", out, "--no-progress")
    assert found.status == 0
    pictures = [record["picture"] for record in results(out)["images"]]
    assert len({name.casefold() for name in pictures}) == 4
    assert set(files(out)) == {"detections.json", *(os.path.basename(name) for name in pictures)}


def test_photos_are_never_overwritten(run, quick, weights, photo):
    before = photo.read_bytes()
    other = photo.with_name("photo-2.jpg")
    other.write_bytes(before)
    found = run("detect", photo.parent, "--weights", weights, "--out", photo.parent, "--no-progress")
    assert found.status == 0
    assert photo.read_bytes() == other.read_bytes() == before
    assert files(photo.parent) == [
        "detections.json", "photo-2-2.jpg", "photo-2.jpg", "photo-3.jpg", "photo.jpg"
    ]  # fmt: skip


def test_a_second_run_leaves_the_first_ones_pictures_out(run, quick, weights, photo, monkeypatch):
    monkeypatch.chdir(photo.parent)
    for _ in range(2):
        assert run("detect", ".", "--weights", weights, "--no-progress").status == 0
        assert [record["file"] for record in results(photo.parent / "detections")["images"]] == ["photo.jpg"]
    assert run("detect", "detections/photo.jpg", "--weights", weights).status == 0  # unless asked for
    photo.unlink()
    assert "no images besides those in detections" in run("detect", ".", "--weights", weights).error


def test_no_pictures(run, quick, weights, photo, out):
    assert run("detect", photo, "--weights", weights, "--out", out, "--no-pictures").status == 0
    assert files(out) == ["detections.json"]
    assert "picture" not in results(out)["images"][0]


def test_progress(run, quick, weights, photo, out):
    photo.with_name("other.jpg").write_bytes(photo.read_bytes())
    options = ("--weights", weights, "--out", out)
    assert "2/2" in run("detect", photo.parent, *options).err
    assert run("detect", photo, *options).err == ""  # one photo needs no bar


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
    assert {row["label"] for row in rows} == {1, 3}
    for given, labels in (
        (("platelets",), {1}),
        (("1", "WHITE cell"), {1, 3}),
        (("3", "White Cell"), {3}),
        (("RBC",), set()),
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
    with pytest.raises(ValueError, match=r"'RBC': these weights carry no names; give the label's number, or --categ"):
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
        ("a.json", b"[1, 2]", "found a JSON list"),
        ("a.json", b"3", "found a JSON int"),
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


# Bad images


def test_unreadable_images_in_the_middle(run, quick, weights, tmp_path, write_photo, out):
    folder = tmp_path / "photos"
    good = [write_photo(folder / "a.jpg"), write_photo(folder / "z.jpg")]
    text, empty, truncated, elongated, missing = (
        folder / name for name in ("text.jpg", "empty.jpg", "truncated.jpg", "wide.png", "missing.jpg")
    )
    text.write_text("not an image")
    empty.write_bytes(b"")
    truncated.write_bytes(good[0].read_bytes()[:-400])
    Image.fromarray(np.zeros((1, 900, 3), np.uint8)).save(elongated)
    subfolder = folder / "folder.jpg"
    subfolder.mkdir()
    arguments = [good[0], text, empty, truncated, missing, subfolder, elongated, folder / "*.gif", good[1]]
    found = run("detect", *arguments, "--weights", weights, "--out", out, "--no-progress")
    assert found.status == 1
    content = results(out)
    assert [record["file"] for record in content["images"]] == [str(path) for path in good]
    assert all(record["detections"] for record in content["images"])
    errors = {row["file"]: row["error"] for row in content["failed"]}
    for path, reason in (
        (text, "is no image in a format that Pillow can read"),
        (empty, "is empty, expected an image file"),
        (truncated, "is a broken image"),
        (missing, "no such file or folder"),
        (subfolder, "holds no image files"),
        (elongated, "of 1x900 (rows x columns) would be resized to 0x160"),
        (folder / "*.gif", "matches no image files"),
    ):
        message = errors.pop(str(path))
        assert message.startswith(f"{path}: ")
        assert reason in message
        assert message in found.err.splitlines()  # a line of its own
    assert not errors
    assert found.err.splitlines()[-1] == f"7 of 9 failed (listed in {out / 'detections.json'})"
    assert len(found.err.splitlines()) == 8
    assert "Traceback" not in found.err
    assert files(out) == ["a.jpg", "detections.json", "z.jpg"]


def test_all_images_are_unreadable(run, quick, weights, tmp_path, out):
    bad = tmp_path / "bad.jpg"
    bad.write_text("x")
    found = run("detect", bad, "--weights", weights, "--out", out)
    assert found.status == 1
    assert results(out)["images"] == []
    assert len(results(out)["failed"]) == 1


@pytest.mark.parametrize("arguments", [("none.jpg",), ("none.jpg", "*.gif"), ()])
def test_nothing_to_do(run, tmp_path, out, arguments):
    found = run("detect", *(tmp_path / name for name in arguments), "--out", out)
    assert found.status == 2
    assert ("none.jpg: no such file or folder" if arguments else "expected at least one image") in found.error
    assert not out.exists() or files(out) == []


# Bad weights: each named in one line, before anything is written


@pytest.mark.parametrize(
    ("weights", "model", "message"),
    [
        ("COCO_V7", None, "'COCO_V7': neither a file nor published weights of fcos_resnet50_fpn, which are COCO_V1"),
        ("COCO_V1", "mask_rcnn", "invalid choice 'mask_rcnn'"),
        ("Other_Weights.COCO_V1", None, "expected a file, or a member of FCOS_ResNet50_FPN_Weights or Faster"),
        (
            "FCOS_ResNet50_FPN_Weights.COCO_V1",
            "fasterrcnn_resnet50_fpn_v2",
            "expected weights of fasterrcnn_resnet50_fpn_v2, these are of fcos_resnet50_fpn",
        ),
        ("none.pth", None, "none.pth: cannot be read: No such file or directory; expected a state_dict"),
        ("no/such/file", None, "no/such/file: cannot be read: No such file or directory"),
    ],
)
def test_unknown_weights(run, photo, out, weights, model, message):
    chosen = [] if model is None else ["--model", model]
    found = run("detect", photo, "--weights", weights, "--out", out, *chosen)
    assert found.status == 2
    assert message in found.error
    assert not out.exists() or files(out) == []


class Code:
    def __reduce__(self):
        return (os.system, ("touch owned",))


FCOS_KEYS = [
    "backbone.body.layer4.2.conv3.weight",
    "backbone.body.layer3.5.conv3.weight",
    "backbone.fpn.layer_blocks.2.0.weight",
    "backbone.fpn.extra_blocks.p7.weight",
    "head.classification_head.cls_logits.weight",
    "head.regression_head.bbox_ctrness.weight",
]


def broken_weights(kind, folder, weights):
    path = folder / f"{kind.replace(' ', '_')}.pth"
    if kind == "truncated":
        with open(weights, "rb") as file:
            path.write_bytes(file.read(1_000_000))
    elif kind == "truncated pth":
        checkpoint.write_pth(path, {"a": np.zeros(1000, np.float32)})
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "code":
        path.write_bytes(pickle.dumps(Code()))
    elif kind == "other architecture":
        safetensors.numpy.save_file({"head.regression_head.bbox_reg.weight": np.zeros(1, np.float32)}, path)
    elif kind == "unknown":
        safetensors.numpy.save_file({"x": np.zeros(1, np.float32)}, path)
    elif kind == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "is damaged"),
        ("truncated pth", "truncated"),
        ("empty", "is empty; expected a state_dict"),
        ("code", "is a Python pickle that torch.save did not write; expected a state_dict"),
        ("other architecture", "holds a RetinaNet; expected torchvision's fcos_resnet50_fpn or faster"),
        ("unknown", "holds none of torchvision's detectors; expected"),
        ("folder", "cannot be read: Is a directory"),
    ],
)
def test_broken_weights(run, photo, out, tmp_path, weights, monkeypatch, kind, message):
    monkeypatch.chdir(tmp_path)
    path = broken_weights(kind, tmp_path, weights)
    error = run("detect", photo, "--weights", path, "--out", out).error
    assert error.startswith(f"flaxdet detect: error: {path}: ")
    assert message in error
    assert files(out) == []
    assert not (tmp_path / "owned").exists()


def test_weights_of_wrong_shapes(run, photo, out, tmp_path):
    """The one report of several lines: the first says what is wrong, the others list the tensors."""
    path = tmp_path / "shapes.safetensors"
    safetensors.numpy.save_file({key: np.zeros((4, 1, 1, 1), np.float32) for key in FCOS_KEYS}, path)
    found = run("detect", photo, "--weights", path, "--out", out)
    assert found.status == 2
    first, *others = found.err.splitlines()
    assert first.startswith(f"flaxdet detect: error: {path} does not fit FCOS: ")
    assert "missing" in first
    assert "6 wrong shape" in first
    assert all(line.startswith("  ") for line in others)
    assert len(others) < 20
    assert "Traceback" not in found.err
    assert files(out) == []


def test_file_of_another_model(run, photo, weights, out):
    found = run("detect", photo, "--weights", weights, "--model", "fasterrcnn_resnet50_fpn_v2", "--out", out)
    assert f"{weights}: expected weights of fasterrcnn_resnet50_fpn_v2, found fcos_resnet50_fpn" in found.error


@pytest.mark.parametrize("option", ["--min-size", "--max-size"])
def test_impossible_sizes(run, photo, out, option):
    assert f"{option} should be at least 1 pixel, got 0" in run("detect", photo, option, "0", "--out", out).error
    assert not out.exists()


def test_offline(run, photo, out, tmp_path, monkeypatch):
    """No net: the error says the URL, where the file would lie, and how to do without."""
    monkeypatch.setenv("FLAXDET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with socket.socket() as closed:  # bound, but not listening
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/fcos_resnet50_fpn_coco-99b0c9b7.pth"
        monkeypatch.setattr(flaxdet.FCOS_ResNet50_FPN_Weights, "url", url)
        found = run("detect", photo, "--out", out)
    assert found.status == 2
    for part in (url, str(tmp_path / "cache" / "fcos_resnet50_fpn_coco-99b0c9b7.pth"), "refused", "--weights FILE"):
        assert part in found.error
    assert not list(tmp_path.rglob("*.pth*"))
    assert files(out) == []


# Output that can't be written


def test_output_folder_is_a_file(run, photo, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "deeper"):
        found = run("detect", photo, "--out", out)
        assert found.status == 2
        assert f"{out}: can't be written to (" in found.error
    assert file.read_text() == "mine"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_output_folder_is_read_only(run, photo, out):
    out.mkdir(mode=0o500)
    assert "can't be written to (Permission denied)" in run("detect", photo, "--out", out).error


class FullDisk:
    """Lets the first few files through."""

    def __init__(self, monkeypatch, room: int):
        self.room, self.fsync = room, os.fsync
        monkeypatch.setattr(os, "fsync", self)

    def __call__(self, descriptor):
        self.room -= 1
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.fsync(descriptor)


def test_disk_full(run, quick, weights, photo, out, monkeypatch):
    out.mkdir()
    (out / "detections.json").write_text("of an earlier run")
    FullDisk(monkeypatch, 0)
    found = run("detect", photo, "--weights", weights, "--out", out)
    assert found.status == 2
    first, last = found.err.splitlines()
    assert first == f"{photo}: {out / 'photo.jpg'}: cannot be written: No space left on device; nothing was changed"
    assert "detections.json: cannot be written: No space left on device" in last
    assert files(out) == ["detections.json"]
    assert (out / "detections.json").read_text() == "of an earlier run"


def test_disk_full_for_one_picture(run, quick, weights, tmp_path, write_photo, out, monkeypatch):
    paths = [write_photo(tmp_path / name) for name in ("a.jpg", "b.jpg")]
    disk = FullDisk(monkeypatch, 1)
    real = checkpoint.replacing

    def freed_for_json(path):
        disk.room += 10 * (os.path.basename(path) == "detections.json")
        return real(path)

    monkeypatch.setattr(checkpoint, "replacing", freed_for_json)
    found = run("detect", *paths, "--weights", weights, "--out", out, "--no-progress")
    assert found.status == 1
    content = results(out)
    assert [record["file"] for record in content["images"]] == [str(paths[0])]
    assert [row["file"] for row in content["failed"]] == [str(paths[1])]
    assert "No space left on device" in content["failed"][0]["error"]
    assert files(out) == ["a.jpg", "detections.json"]


def test_interrupted(run, quick, weights, photo, out, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(flaxdet.Predictor, "stream", interrupt)
    found = run("detect", photo, "--weights", weights, "--out", out)
    assert (found.status, found.error) == (130, "flaxdet: interrupted")
    assert files(out) == []
