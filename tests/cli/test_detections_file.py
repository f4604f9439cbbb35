"""detections.json while it grows: whole at any moment, and kept when the disk is full."""

from __future__ import annotations

import errno
import json
import os

import pytest

from flaxdet.cli import detections_file
from flaxdet.cli.detections_file import DetectionsFile


class Disk:
    """Room for so many more bytes in the files that grow; a write takes what fits, and then fails."""

    def __init__(self, monkeypatch, room: int):
        self.room = room
        real = detections_file._write_all

        def write(file, begin, content):
            size = os.fstat(file.fileno()).st_size
            more = begin + len(content) - size
            if more > self.room:
                real(file, begin, content[: max(0, size + self.room - begin)])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.room -= max(0, more)
            real(file, begin, content)

        monkeypatch.setattr(detections_file, "_write_all", write)


def row(i: int, **more: object) -> dict:
    return {"file": f"é{i}.jpg", **more, "detections": [{"box": [0.5, 1.0, 2.0, 3.0 + i]}] * (i % 3)}


def content(images: list, failed: list) -> str:
    return json.dumps({"weights": 'a"b', "images": images, "failed": failed, "skipped": []}, indent=1)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "detections.json"


def nothing(_: list) -> None:
    return None


def test_the_file_is_whole_after_each_row(path):
    path.write_text("of an earlier run")
    file = DetectionsFile(path, 'a"b', make_room=nothing)
    assert path.read_text() == "of an earlier run"
    images, failed = [], []
    for i in range(5):
        images.append(row(i))
        file.add(row(i))
        assert path.read_text() == content(images, failed)
        if i % 2:
            images[-1] = row(i, picture="p.jpg")
            file.replace_last(row(i, picture="p.jpg"))
            failed.append({"file": "x", "error": "broken"})
            file.fail(failed[-1])
            assert path.read_text() == content(images, failed)
    file.close()
    assert path.read_text() == content(images, failed)


def test_without_images_it_is_written_at_the_end(path):
    file = DetectionsFile(path, 'a"b', make_room=nothing)
    assert not path.exists()
    file.close()
    assert path.read_text() == content([], [])
    file = DetectionsFile(path, 'a"b', make_room=nothing)
    file.fail({"file": "x", "error": "y"})
    assert path.read_text() == content([], [{"file": "x", "error": "y"}])
    file.add(row(1))
    assert path.read_text() == content([row(1)], [{"file": "x", "error": "y"}])


def test_a_full_disk_takes_pictures_away(path, monkeypatch):
    disk = Disk(monkeypatch, 10_000)
    drawn = []

    def make_room(images):
        if not drawn:
            return None
        disk.room += 60  # the picture's
        del images[drawn[-1]]["picture"]
        return drawn.pop()

    file = DetectionsFile(path, 'a"b', make_room=make_room)
    for i in range(4):
        file.add(row(i))
        drawn.append(i)
        file.replace_last(row(i, picture="p.jpg"))
    disk.room = 10
    file.add(row(5))  # takes the room of the last pictures
    assert drawn == list(range(len(drawn)))
    assert 0 < len(drawn) < 4
    assert disk.room < 90  # and of no more than it takes: a picture and its line in the file
    kept = [row(i, picture="p.jpg") if i in drawn else row(i) for i in range(4)]
    assert path.read_text() == content([*kept, row(5)], [])
    drawn.clear()
    disk.room = 10
    before = path.read_text()
    with pytest.raises(OSError, match=r"detections.json: cannot be written: No space left on device$"):
        file.add(row(5))
    assert path.read_text() == before
    disk.room = 10_000
    file.add(row(6))
    file.fail({"file": "x"})
    assert json.loads(path.read_text())["images"][4:] == [row(5), row(6)]


def test_a_disk_that_is_full_from_the_start_leaves_the_earlier_file(path, monkeypatch):
    path.write_text("of an earlier run")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    asked = []
    file = DetectionsFile(path, "a", make_room=asked.append)
    with pytest.raises(OSError, match="cannot be written: No space left on device; nothing was changed"):
        file.add(row(0))
    assert len(asked) == 1
    assert path.read_text() == "of an earlier run"
