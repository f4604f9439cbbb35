"""``flaxdet detect``: what it writes and where, and output that can't be written."""

from __future__ import annotations

import errno
import os

import pytest
from PIL import Image

import flaxdet
from tests.cli.conftest import files, results

pytestmark = pytest.mark.xdist_group("detect")

# What it does


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
    assert first.startswith(f"{photo}: {out / 'detections.json'}: cannot be written: No space left on device")
    assert "detections.json: cannot be written: No space left on device" in last
    assert files(out) == ["detections.json"]
    assert (out / "detections.json").read_text() == "of an earlier run"


def test_a_full_disk_loses_pictures_and_no_detection(run, quick, weights, tmp_path, write_photo, out, monkeypatch):
    paths = [write_photo(tmp_path / name) for name in ("a.jpg", "b.jpg")]
    FullDisk(monkeypatch, 2)  # detections.json, which then grows, and a picture
    found = run("detect", *paths, "--weights", weights, "--out", out, "--no-progress")
    assert found.status == 1
    content = results(out)
    assert [(record["file"], "picture" in record) for record in content["images"]] == [
        (str(paths[0]), True),
        (str(paths[1]), False),
    ]
    assert content["images"][0]["detections"] == content["images"][1]["detections"] != []
    assert [row["file"] for row in content["failed"]] == [str(paths[1])]
    assert "No space left on device" in content["failed"][0]["error"]
    assert files(out) == ["a.jpg", "detections.json"]


def test_what_is_detected_is_written_at_once(run, quick, weights, tmp_path, write_photo, out, monkeypatch):
    paths = [write_photo(tmp_path / name) for name in ("a.jpg", "b.jpg")]
    stream = flaxdet.Predictor.stream

    def interrupted(self, source):
        detections = stream(self, source)
        yield next(detections)
        assert [record["file"] for record in results(out)["images"]] == [str(paths[0])]
        raise KeyboardInterrupt

    monkeypatch.setattr(flaxdet.Predictor, "stream", interrupted)
    found = run("detect", *paths, "--weights", weights, "--out", out, "--no-progress")
    assert (found.status, found.error) == (130, "flaxdet: interrupted")
    assert "picture" in results(out)["images"][0]


def test_interrupted(run, quick, weights, photo, out, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(flaxdet.Predictor, "stream", interrupt)
    found = run("detect", photo, "--weights", weights, "--out", out)
    assert (found.status, found.error) == (130, "flaxdet: interrupted")
    assert files(out) == []
