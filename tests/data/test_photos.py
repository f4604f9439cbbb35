"""The look at all photos before a run: missing files with a hint, broken ones, and what --skip-broken leaves."""

from __future__ import annotations

import json
import unicodedata

import numpy as np
import pytest
from PIL import Image

from flaxdet.data import ImageError, PixelRangeWarning, read_coco
from tests.data.coco_files import changed, one_image


def named(folder, stated: str, *files: str):
    """A data set of one image, stated by this name, in a folder with these files."""
    images = folder / "images"
    for file in files:
        (images / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 20)).save(images / file, format="PNG")
    _, path = one_image(folder, [[1, 1, 5, 5]])
    return images, changed(path, lambda content: content["images"][0].update(file_name=stated))


@pytest.mark.parametrize(
    ("stated", "file", "hint"),
    [
        ("images\\a.jpg", "a.jpg", 'in backslashes, as written on Windows, .*, and in a folder too many, "images"'),
        ("sub\\a.jpg", "sub/a.jpg", "in backslashes, as written on Windows, where / is expected$"),
        ("my%20photo.jpg", "my photo.jpg", "in percent signs, as written in a URL, %20 for a space$"),
        ("%C3%A9.jpg", "é.jpg", "in percent signs"),
        ("images/a.jpg", "a.jpg", 'in a folder too many, "images"$'),
        ("/home/me/data/a.jpg", "a.jpg", 'in a folder too many, "home/me/data"$'),
        ("./images/a.jpg", "a.jpg", 'in a folder too many, "images"$'),
        ("a.jpg", "train/a.jpg", 'in a folder too few: expected ".*images/train" as the folder of the images$'),
        ("A.JPG", "a.jpg", "in letter case$"),
        ("a.jpg", "a.png", "in its extension$"),
        ("/a.jpg", "a.jpg", "in the / at its beginning$"),
        ("a.jpg ", "a.jpg", "in spaces at its ends$"),
        ("C:\\data\\a.jpg", "a.jpg", 'in backslashes.*, and in a folder too many, "C:/data"$'),
        ("images/a.jpeg", "a.jpg", "in a folder too many, .*, and in its extension$"),
        ("a.JPG", "a.jpg", "in letter case$"),
        ("Sub/a.jpg", "sub/a.jpg", "in letter case$"),
        (unicodedata.normalize("NFC", "café.jpg"), unicodedata.normalize("NFD", "café.jpg"), "in the Unicode form"),
        (unicodedata.normalize("NFD", "café.jpg"), unicodedata.normalize("NFC", "café.jpg"), "in the Unicode form"),
        ("images\\My%20Photo.JPG", "my photo.jpg", "backslashes.*percent signs.*folder too many.*letter case$"),
    ],
)
def test_missing_files_have_a_hint(stated, file, hint, tmp_path):
    images, path = named(tmp_path, stated, file, "other.jpg")
    with pytest.raises(
        ValueError, match=rf"1 of its 1 image files are missing in .*; the folder has .*{hint}"
    ) as caught:
        read_coco(images, path)
    assert f'the folder has "{file}"' in str(caught.value)
    assert "\n" not in str(caught.value)


def test_of_several_files_the_nearest_is_named(tmp_path):
    images, path = named(tmp_path, "images/b/a.jpg", "c/a.jpg", "b/a.jpg", "d/e/a.jpg")
    with pytest.raises(
        ValueError, match=r'the folder has "b/a.jpg", which differs from "images/b/a.jpg" in a folder too'
    ):
        read_coco(images, path)


def test_no_hint_where_there_is_none(tmp_path):
    images, path = named(tmp_path, "a.jpg", "b.jpg")
    with pytest.raises(ValueError, match=r"1 of its 1 image files are missing in .*images: a\.jpg$"):
        read_coco(images, path)


@pytest.fixture
def spoilt(tiny):
    """Of five images one is cut short, one is no image, and one is broken where no header tells."""
    images, path = tiny
    whole = (images / "001.png").read_bytes()
    (images / "000.png").write_bytes(whole[:-300])
    (images / "003.png").write_text("no image")
    inside = bytearray(whole)
    inside[len(whole) // 2 : len(whole) // 2 + 40] = bytes(40)
    (images / "004.png").write_bytes(inside)
    return images, path


def test_broken_photos_are_found_before_the_run(spoilt):
    images, path = spoilt
    with pytest.raises(
        ImageError,
        match=r"annotations\.json: 2 of its 5 images can't be used: .*000\.png: is a broken image.*; .*003\.png: is no "
        r"image .*\(skip_broken=True, --skip-broken leaves them out\)$",
    ):
        read_coco(images, path)


def test_skip_broken_leaves_them_out_and_lists_them(spoilt):
    images, path = spoilt
    found = read_coco(images, path, skip_broken=True)
    assert [record.image_id for record in found] == [13, 16]
    assert (found.report["images"], found.report["skipped_images"]) == (2, 3)
    assert [text.split("images/")[1][:7] for text in found.summary.skipped] == ["000.png", "003.png", "004.png"]
    lines = str(found.summary).splitlines()
    assert lines[0].startswith("2 images, ")
    assert lines[0].endswith("3 images that can't be used")
    assert sum(line.startswith("left out: ") for line in lines) == 3
    for i in range(2):
        found.read_image(i)


def test_skip_broken_takes_missing_files_and_other_sizes(tiny):
    images, path = tiny
    (images / "000.png").unlink()
    Image.new("RGB", (3, 3)).save(images / "001.png")
    found = read_coco(images, path, skip_broken=True)
    assert [record.image_id for record in found] == [16, 19, 22]
    assert [("is missing" in text, "but" in text) for text in found.summary.skipped] == [(True, False), (False, True)]


def test_skip_broken_needs_one_good_photo(tiny):
    images, path = tiny
    for file in images.iterdir():
        file.write_text("no image")
    with pytest.raises(ImageError, match="5 of its 5 images can't be used"):
        read_coco(images, path, skip_broken=True)
    for file in images.iterdir():
        Image.new("RGB", (3, 3)).save(file)
    with pytest.raises(ImageError, match="5 of its 5 images can't be used"):
        read_coco(images, path, skip_broken=True)
    for file in images.iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="5 of its 5 image files are missing"):
        read_coco(images, path, skip_broken=True)


def test_16_bits_that_use_little_of_their_range(tmp_path, recwarn):
    images, path = one_image(tmp_path, [[1, 1, 5, 5]])
    values = (51241 + np.arange(600) % 500).reshape(20, 30).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    with pytest.warns(UserWarning, match=r"1 of 1 images of 16 or more bits .*: a\.png has values from 51241 to 51740"):
        found = read_coco(images, path)
    assert found.read_image(0).max() == 202  # 51740 >> 8
    assert not [warning for warning in recwarn if issubclass(warning.category, PixelRangeWarning)]  # once is enough
    found = read_coco(images, path, pixel_range=(51241, 51740))
    assert (found.read_image(0).min(), found.read_image(0).max()) == (0, 255)
    with pytest.raises(ImageError, match="600 pixels, expected at most 599"):
        read_coco(images, path, max_pixels=599)


def test_float_images_need_a_range(tmp_path):
    images, path = one_image(tmp_path, [[1, 1, 5, 5]])
    Image.fromarray(np.linspace(0, 1, 600, dtype=np.float32).reshape(20, 30)).save(tmp_path / "a.tif")
    changed(path, lambda content: content["images"][0].update(file_name="a.tif"))
    with pytest.raises(ImageError, match=r"32-bit pixels, whose range is not defined.*--pixel-range"):
        read_coco(images, path)
    assert read_coco(images, path, pixel_range=(0, 1)).read_image(0).max() == 255


@pytest.mark.parametrize("case", ["broken-val"])
def test_real_cases(case, shared):
    folder = shared / "cases" / case
    with pytest.raises(
        ImageError, match=r"1 of its 3 images can't be used: .*BloodImage_00014\.jpg: is a broken image"
    ):
        read_coco(folder / "val", folder / "val.json")
    assert len(read_coco(folder / "val", folder / "val.json", skip_broken=True)) == 2


@pytest.mark.parametrize(("case", "hint"), [("labelstudio-backslash", "backslashes"), ("percent", "percent signs")])
def test_real_names(case, hint, shared):
    folder = shared / "cases" / case
    with pytest.raises(ValueError, match=f"3 of its 3 image files are missing.*; the folder has .*{hint}"):
        read_coco(folder / "images", folder / "train.json")
    assert json.loads((folder / "train.json").read_text())["images"]
