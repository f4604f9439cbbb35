"""``flaxdet detect``: every way in which its images and weights can be wrong."""

from __future__ import annotations

import os
import pickle
import socket

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

import flaxdet
from flaxdet.files import checkpoint
from tests.cli.conftest import files, results

pytestmark = pytest.mark.xdist_group("detect")

# Bad images


def test_a_folder_with_everything_in_it(run, quick, weights, tmp_path, write_photo, out):
    """Loops of links, long names, names that are no UTF-8, formats that Pillow can't read: the others are done."""
    folder = tmp_path / "photos"
    photo = write_photo(folder / "good.jpg")
    long = folder / f"{'n' * 245}.jpg"
    no_utf8 = folder / os.fsdecode(b"caf\xe9.jpg")
    try:
        for path in (long, no_utf8):
            path.write_bytes(photo.read_bytes())
    except OSError:
        pytest.skip("the file system refuses such names")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "self").symlink_to(".", target_is_directory=True)
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    (folder / "iphone.HEIC").write_bytes(heic)
    (folder / "renamed.jpg").write_bytes(heic)
    found = run("detect", folder, "--weights", weights, "--out", out, "--no-progress", "--threshold", 0)
    assert found.status == 1
    content = results(out)
    shown = str(folder / "caf\\xe9.jpg")
    assert [record["file"] for record in content["images"]] == [shown, str(folder / "good.jpg"), str(long)]
    assert [len(record["detections"]) > 0 for record in content["images"]] == [True] * 3
    assert all((out / name).stat().st_size for name in os.listdir(out))
    assert [row["file"] for row in content["failed"]] == [str(folder / name) for name in ("loop.jpg", "renamed.jpg")]
    assert "symbolic links" in content["failed"][0]["error"]
    assert "is HEIC, which Pillow reads only with pillow-heif" in content["failed"][1]["error"]
    assert content["skipped"] == [
        {"file": str(folder / "iphone.HEIC"), "reason": "needs pillow-heif, or a conversion to JPEG"},
        {"file": str(folder / "self"), "reason": "is a link to a folder, which is not followed"},
    ]
    assert f"skipped 2 files: {folder / 'iphone.HEIC'} (needs pillow-heif" in found.err
    assert "2 of 5 failed" in found.err
    assert len([name for name in os.listdir(out) if name.endswith(".jpg")]) == 3


def test_a_folder_of_heic_alone(run, quick, weights, tmp_path, out):
    (tmp_path / "a.heic").write_bytes(b"x")
    found = run("detect", tmp_path, "--weights", weights, "--out", out)
    assert "holds no image files, expected a folder with some (1 skipped: a.heic: needs pillow-heif" in found.error


def test_how_photos_are_read(run, quick, weights, tmp_path, write_photo, out):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    Image.open(write_photo(tmp_path / "a.png")).save(path, exif=exif)
    arguments = ["detect", path, "--weights", weights, "--out", out, "--no-progress"]
    sizes = []
    for options in ((), ("--as-stored",)):
        assert run(*arguments, *options).status == 0
        sizes.append((results(out)["images"][0]["height"], results(out)["images"][0]["width"]))
    assert sizes == [(80, 60), (60, 80)]
    assert "4800 pixels, expected at most 4799 (max_pixels, --max-pixels)" in run(*arguments, "--max-pixels", 4799).err


def test_16_bits_that_use_little_of_their_range(run, quick, weights, tmp_path, out):
    for name in ("a.png", "b.png"):
        Image.fromarray((51000 + np.arange(4800) % 400).reshape(60, 80).astype(np.uint16)).save(tmp_path / name)
    arguments = ["detect", tmp_path, "--weights", weights, "--out", out, "--no-progress"]
    found = run(*arguments)
    assert found.status == 0
    assert found.err.splitlines() == [
        f"warning: {tmp_path / 'a.png'}: has values from 51000 to 51399, 98% of them in under 1% of the range from 0 "
        "to 65535: 2 grey levels are left; pixel_range=(low, high), or --pixel-range LOW HIGH, sets another range",
        "warning: 2 images use under 1% of the range of their values: --pixel-range LOW HIGH sets another",
    ]
    found = run(*arguments, "--pixel-range", 51000, 51400)
    assert (found.status, found.err) == (0, "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--pixel-range", "2", "1"), "--pixel-range should be (low, high), two finite numbers, low < high"),
        (("--max-pixels", "0"), "--max-pixels should be at least 1, got 0"),
        (("--font", "none.ttf"), "font none.ttf: no such file, expected a font file"),
    ],
)
def test_bad_options_of_photos(run, quick, weights, photo, out, options, message):
    found = run("detect", photo, "--weights", weights, "--out", out, *options)
    assert (found.status, message in found.error) == (2, True)


def test_letters_that_no_font_has_are_told_once(run, quick, weights, tmp_path, write_photo, out):
    folder = tmp_path / "photos"
    for name in ("a.jpg", "b.jpg"):
        write_photo(folder / name)
    names = tmp_path / "names.txt"
    names.write_text("\n".join(["background", "猫", "кошка", "cell"]), encoding="utf-8")
    arguments = ["detect", folder, "--weights", weights, "--out", out, "--no-progress", "--threshold", 0]
    found = run(*arguments, "--categories", names)
    assert found.status == 0
    assert found.err.count("warning: no font at hand has these letters of class names") == 1
    assert "--font" in found.err


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
        ("folder", "is a folder without model.safetensors; expected a file, or the folder of a run"),
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


def test_file_of_another_model(run, small_builders, photo, weights, out):
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
