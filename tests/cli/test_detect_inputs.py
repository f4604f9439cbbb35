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
