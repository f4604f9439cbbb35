"""Which changes of image files are noticed when a run is resumed."""

from __future__ import annotations

import json
import os
import shutil
import zlib

import pytest

from flaxdet.data import read_coco
from flaxdet.train.data_files import compare_files, describe_files, with_mended, without_broken
from tests.tiny import write_coco


@pytest.fixture
def data(tmp_path):
    return {"train": read_coco(*write_coco(tmp_path / "a", count=5)), "val": read_coco(*write_coco(tmp_path / "b", 1))}


def test_size_date_and_content_by_name(data):
    found = describe_files({**data, "test": None})
    assert {role: len(files) for role, files in found.items()} == {"train": 5, "val": 1}
    path = data["train"].images / "002.png"
    content = path.read_bytes()
    assert found["train"]["002.png"] == [len(content), path.stat().st_mtime_ns, f"{zlib.crc32(content):08x}"]
    assert json.loads(json.dumps(found)) == found
    assert compare_files(found, describe_files(data)) == ([], [])


def test_the_same_files_elsewhere_are_the_same(data, tmp_path):
    before = describe_files(data)
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    moved = read_coco(tmp_path / "c" / "images", tmp_path / "c" / "annotations.json")
    assert compare_files(before, describe_files({**data, "train": moved})) == ([], [])


def test_what_changed_is_named(data):
    before = describe_files(data)
    images = data["train"].images
    dates = images / "000.png"
    os.utime(dates, ns=(1, 1))
    content = images / "001.png"  # of the same size, and even the same date
    changed, status = bytearray(content.read_bytes()), content.stat()
    changed[len(changed) // 2] ^= 1
    content.write_bytes(changed)
    os.utime(content, ns=(status.st_atime_ns, status.st_mtime_ns))
    for name in ("002.png", "003.png", "004.png"):
        (images / name).write_bytes(b"short")
    (data["val"].images / "000.png").write_bytes(b"short")
    faults, warnings = compare_files(before, describe_files(data))
    assert faults == [
        "the content of 001.png (train) changed",
        "the size of 002.png (train), 003.png (train), 004.png (train) and 1 others changed",
    ]
    assert warnings == ["the date of 000.png (train) changed, the content did not"]
    faults, _ = compare_files({**before, "val": {}}, {**before, "train": {}})
    assert [fault.rpartition(" ")[2] for fault in faults] == ["gone", "new"]


def test_a_broken_image_may_be_mended(data):
    images = data["val"].images
    whole = (images / "000.png").read_bytes()
    (images / "000.png").write_bytes(whole[:50])
    noted = describe_files(data)
    (images / "000.png").write_bytes(whole)
    mended = describe_files(data)
    assert len(compare_files(noted, mended)[0]) == 1
    assert without_broken(noted, data, "another error") == noted
    noted = without_broken(noted, data, f"{images / '000.png'}: is a broken image")
    assert (noted["val"], noted["train"]) == ({"000.png": []}, mended["train"])
    assert compare_files(noted, mended) == ([], [])
    assert with_mended(noted, mended) == mended  # from now on it counts
