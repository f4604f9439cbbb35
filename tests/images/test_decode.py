from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from flaxdet.data import ImageError, PixelRangeWarning, find_images, read_image
from flaxdet.images import decode
from flaxdet.images.find import find
from tests.tolerances import GIF_LEVELS, JPEG_LEVELS


@pytest.fixture
def photo() -> np.ndarray:
    """Smooth, so that JPEG hardly changes it, and different in all four corners."""
    y, x = np.mgrid[0:40, 0:60]
    return np.stack((4 * x, 6 * y, 120 + x - y), axis=-1).astype(np.uint8)


@pytest.mark.parametrize(
    ("mode", "extension"),
    [
        *((mode, "png") for mode in ("RGB", "L", "1", "P", "RGBA", "LA")),
        *((mode, "tif") for mode in ("CMYK", "YCbCr", "LAB", "RGBX")),
        *(("P", "gif"), ("1", "pbm")),
    ],
)
def test_modes_come_in_as_pillow_converts_them(mode, extension, photo, tmp_path):
    path = tmp_path / f"image.{extension}"
    Image.fromarray(photo).convert("L" if mode == "LA" else "RGB").convert(mode).save(path)
    found = read_image(path)
    assert found.dtype == np.uint8
    assert found.shape == (40, 60, 3)
    assert found.flags.writeable
    with Image.open(path) as again:
        np.testing.assert_array_equal(found, np.asarray(again.convert("RGB")))


def test_cmyk_jpeg(photo, tmp_path):
    path = tmp_path / "print.jpg"
    Image.fromarray(photo).convert("CMYK").save(path, quality=95)
    np.testing.assert_allclose(read_image(path).astype(int), photo, atol=JPEG_LEVELS)


@pytest.mark.parametrize("transparency", [0, bytes([0, 128] + [255] * 254)])
def test_palette_with_transparency_keeps_its_colours(transparency, photo, tmp_path):
    path = tmp_path / "palette.png"
    image = Image.fromarray(photo).quantize(64)
    expected = np.asarray(image.convert("RGB"))
    image.save(path, transparency=transparency)
    np.testing.assert_array_equal(read_image(path), expected)


def test_rgb_with_a_transparent_colour(photo, tmp_path):
    path = tmp_path / "key.png"
    Image.fromarray(photo).save(path, transparency=(0, 0, 120))
    np.testing.assert_array_equal(read_image(path), photo)


def test_transparent_pixels_show_their_colour(tmp_path):
    path = tmp_path / "clear.png"
    Image.fromarray(np.full((2, 2, 4), (10, 20, 30, 0), np.uint8)).save(path)
    assert (read_image(path) == (10, 20, 30)).all()


@pytest.mark.parametrize("extension", ["png", "tif", "pgm"])
def test_sixteen_bit_grey_keeps_its_upper_byte(extension, tmp_path):
    values = np.array([[0, 255, 256, 511], [512, 32768, 65280, 65535]], np.uint16)
    path = tmp_path / f"deep.{extension}"
    Image.fromarray(values).save(path)
    expected = np.array([[0, 0, 1, 1], [2, 128, 255, 255]])
    np.testing.assert_array_equal(read_image(path), np.repeat(expected[..., None], 3, axis=-1))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bits_have_no_range(dtype, tmp_path):
    path = tmp_path / "elevation.tif"
    Image.fromarray(np.ones((2, 2), dtype)).save(path)
    with pytest.raises(ImageError, match=r"elevation.tif: has 32-bit pixels, .* expected 8 or 16 bits"):
        read_image(path)


@pytest.mark.parametrize("orientation", range(9))
@pytest.mark.parametrize("extension", ["jpg", "png", "tif", "webp"])
def test_orientation_is_applied(orientation, extension, photo, tmp_path):
    # how the camera stored it, for each value of the tag: undoing that must give the photo
    stored = {
        2: photo[:, ::-1],
        3: photo[::-1, ::-1],
        4: photo[::-1],
        5: photo.swapaxes(0, 1),
        6: np.rot90(photo, 1),
        7: np.rot90(photo, 2).swapaxes(0, 1),
        8: np.rot90(photo, -1),
    }.get(orientation, photo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{extension}"
    options = {"quality": 100} if extension in ("jpg", "webp") else {}
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, **options)
    np.testing.assert_allclose(read_image(path).astype(int), photo, atol=JPEG_LEVELS)
    np.testing.assert_allclose(read_image(path, upright=False).astype(int), stored, atol=JPEG_LEVELS)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's own, and welcome
def test_broken_exif_does_not_hide_a_picture(photo, tmp_path):
    path = tmp_path / "photo.jpg"
    Image.fromarray(photo).save(path, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12garbage", quality=100)
    np.testing.assert_allclose(read_image(path).astype(int), photo, atol=JPEG_LEVELS)


def test_first_frame_of_an_animation(photo, tmp_path):
    path = tmp_path / "moving.gif"
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (30, 200)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(read_image(path).astype(int), 30, atol=GIF_LEVELS)


def test_the_extension_does_not_matter(photo, tmp_path):
    path = tmp_path / "photo.txt"
    Image.fromarray(photo).save(path, format="PNG")
    np.testing.assert_array_equal(read_image(str(path)), photo)


@pytest.fixture
def jpeg(photo) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(buffer, format="JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda jpeg: b"", "is empty, expected an image file"),
        (lambda jpeg: b"not a picture\n" * 50, "is no image in a format that Pillow can read"),
        (lambda jpeg: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "is HEIC, .*pillow-heif: convert it to JPEG"),
        (lambda jpeg: b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer, .*git lfs pull"),
        (lambda jpeg: b"<!DOCTYPE html>\n<html>not found", r"is a web page \(HTML\)"),
        (lambda jpeg: b'<?xml version="1.0"?><svg/>', "is no image in a format that Pillow can read"),
        (lambda jpeg: jpeg[: len(jpeg) // 2], "is a broken image .*truncated"),
        (lambda jpeg: jpeg[: len(jpeg) - 40], "is a broken image .*truncated"),
        (lambda jpeg: jpeg[:100], "is (a broken image|no image)"),
    ],
)
def test_bad_files_are_one_line_with_the_name(content, message, jpeg, tmp_path):
    path = tmp_path / "bad.jpg"
    path.write_bytes(content(jpeg))
    with pytest.raises(ImageError, match=message) as error:
        read_image(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.parametrize("extension", ["png", "gif", "tif", "webp", "bmp"])
def test_truncation_in_other_formats(extension, tmp_path):
    path = tmp_path / f"cut.{extension}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(ImageError, match=r"is (a broken image|no image)") as error:
        read_image(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_folder_pipe_and_forbidden(jpeg, tmp_path):
    with pytest.raises(ImageError, match=r"none.jpg: cannot be read \(No such file or directory\)"):
        read_image(tmp_path / "none.jpg")
    with pytest.raises(ImageError, match="is a folder, expected an image file"):
        read_image(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="is not a regular file"):
        read_image(tmp_path / "pipe")
    closed = tmp_path / "closed.jpg"
    closed.write_bytes(jpeg)
    closed.chmod(0)
    if not os.access(closed, os.R_OK):  # root may read everything
        with pytest.raises(ImageError, match=r"cannot be read \(Permission denied\)"):
            read_image(closed)


def test_the_limit_on_pixels_is_the_number_it_says(photo, tmp_path, monkeypatch):
    """The default is where Pillow refuses: twice the number at which Pillow warns (an error in this suite)."""
    path = tmp_path / "bomb.png"
    Image.fromarray(photo).save(path)  # 2400 pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1200)
    assert read_image(path).shape == (40, 60, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1199)
    with pytest.raises(ImageError, match=r"bomb\.png: is too large: has 40x60 = 2400 pixels, expected at most 2398 "):
        read_image(path)
    assert read_image(path, max_pixels=2400).shape == (40, 60, 3)
    with pytest.raises(ImageError, match=r"2400 pixels, expected at most 2399 \(max_pixels, --max-pixels\)"):
        read_image(path, max_pixels=2399)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert read_image(path).shape == (40, 60, 3)
    with pytest.raises(ValueError, match="max_pixels should be at least 1, got 0"):
        read_image(path, max_pixels=0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_large_images_are_converted_in_strips(mode, photo, tmp_path, monkeypatch):
    path = tmp_path / "image.tif"
    image = Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60) * 27) if mode == "I;16" else None
    (image or Image.fromarray(photo).convert(mode)).save(path)
    expected = read_image(path)
    monkeypatch.setattr(decode, "_WHOLE", 2399)
    monkeypatch.setattr(decode, "_STRIP", 60 * 7)  # 5 strips of 7 rows, and one of 5
    np.testing.assert_array_equal(read_image(path), expected)


PEAK = """
import re, sys
from pathlib import Path
from flaxdet.images.decode import read_image
def memory(name):  # getrusage's peak would include the process that started this one
    return 1024 * int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = memory("VmRSS")
pixels = read_image(sys.argv[1])
print((memory("VmHWM") - before) / pixels.shape[0] / pixels.shape[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's figures of memory")
@pytest.mark.parametrize(("mode", "most"), [("1", 5), ("L", 5), ("I;16", 6)])
def test_memory_of_a_large_image(mode, most, tmp_path):
    """Bytes a pixel at the peak: Pillow's 1 or 2, the result's 3, and strips."""
    path = tmp_path / "large.png"
    if mode == "I;16":
        Image.fromarray(np.tile(np.arange(6000, dtype=np.uint16) * 10, (5000, 1))).save(path, compress_level=1)
    else:
        Image.new(mode, (6000, 5000)).save(path)
    found = subprocess.run([sys.executable, "-c", PEAK, path], capture_output=True, text=True, check=True)
    assert 3 < float(found.stdout) < most


# 16 bits and more


def grey_file(values, path):
    Image.fromarray(values).save(path)
    return path


def test_a_range_of_16_bits(tmp_path):
    path = grey_file(np.array([[51241, 51711, 52181], [0, 65535, 51300]], np.uint16), tmp_path / "thermal.png")
    found = read_image(path, pixel_range=(51241, 52181))
    # 470/940 and 59/940 of 255: 127.5 (to even) and 16.005
    np.testing.assert_array_equal(found[..., 0], [[0, 128, 255], [0, 255, 16]])
    assert (found[..., :1] == found).all()


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_a_range_of_32_bits(dtype, tmp_path):
    path = grey_file(np.array([[-10, 0], [5, 10]], dtype), tmp_path / "image.tif")
    np.testing.assert_array_equal(read_image(path, pixel_range=(0, 10))[..., 0], [[0, 0], [128, 255]])
    with pytest.raises(ImageError, match=r"32-bit pixels, .*pixel_range=\(low, high\), --pixel-range LOW HIGH"):
        read_image(path)


def test_values_that_are_no_numbers_are_black_or_at_an_end(tmp_path):
    path = grey_file(np.array([[np.nan, np.inf], [-np.inf, 1]], np.float32), tmp_path / "image.tif")
    np.testing.assert_array_equal(read_image(path, pixel_range=(0, 1))[..., 0], [[0, 255], [0, 255]])


@pytest.mark.parametrize("wrong", [(1, 1), (2, 1), (0, np.inf), (np.nan, 1)])
def test_a_range_that_is_none(wrong, tmp_path):
    with pytest.raises(ValueError, match=r"pixel_range should be \(low, high\), two finite numbers"):
        read_image(tmp_path / "any.png", pixel_range=wrong)


def test_a_range_that_is_hardly_used_is_warned_of(tmp_path):
    rng = np.random.default_rng(0)
    narrow, wide = (rng.integers(51000, 51000 + width, (50, 60), dtype=np.uint16) for width in (600, 700))
    path = grey_file(narrow, tmp_path / "narrow.png")
    text = r"narrow\.png: has values from 51000 to 51599, 98% of them in under 1% of the range from 0 to 65535: 3 grey"
    with pytest.warns(PixelRangeWarning, match=text):
        read_image(path)
    read_image(path, pixel_range=(51000, 51600))
    with pytest.warns(PixelRangeWarning, match="under 1% of the range from 0 to 1e"):
        read_image(path, pixel_range=(0, 1e6))
    narrow[3, 3] = 0  # a dead pixel
    with pytest.warns(PixelRangeWarning, match="has values from 0 to 51599"):
        read_image(grey_file(narrow, path))
    read_image(grey_file(wide, tmp_path / "wide.png"))


@pytest.fixture
def folder(photo, tmp_path):
    for name in ("b.jpg", "a.PNG", "sub/c.jpeg", "sub/deep/d.webp", ".hidden/e.jpg", "sub/.f.jpg"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo).save(path, format="PNG")
    for name in ("notes.txt", "weights.h5", "sub/movie.mpeg"):
        (tmp_path / name).write_text("no image")
    (tmp_path / "empty").mkdir()
    return tmp_path


def names(paths, folder):
    return [str(path.relative_to(folder)) for path in paths]


def test_folders_are_searched(folder):
    assert names(find_images([folder]), folder) == ["a.PNG", "b.jpg", "sub/c.jpeg", "sub/deep/d.webp"]
    assert names(find_images([str(folder / "sub" / "deep")]), folder) == ["sub/deep/d.webp"]


def test_patterns(folder):
    assert names(find_images([f"{folder}/*.jpg"]), folder) == ["b.jpg"]
    assert names(find_images([f"{folder}/**/*.jp*g"]), folder) == ["b.jpg", "sub/c.jpeg"]
    assert names(find_images([f"{folder}/[ab].*"]), folder) == ["a.PNG", "b.jpg"]
    # a pattern may match folders, and files that are no images
    assert names(find_images([f"{folder}/*"]), folder) == names(find_images([folder]), folder)


def test_no_doubles_and_sorted(folder):
    (folder / "link.jpg").symlink_to(folder / "b.jpg")
    found = find_images([folder / "b.jpg", folder / "a.PNG", f"{folder}/*.jpg", folder / "sub" / ".." / "b.jpg"])
    assert names(found, folder) == ["a.PNG", "b.jpg"]


def test_a_file_is_taken_whatever_its_name(folder):
    odd = folder / "photo[1].dat"
    odd.write_bytes((folder / "b.jpg").read_bytes())
    assert find_images([odd]) == [odd]
    assert find_images([folder / "notes.txt"]) == [folder / "notes.txt"]


def test_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert names(find_images(["~/*.jpg"]), folder) == ["b.jpg"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("none.jpg", "none.jpg: no such file or folder"),
        ("empty", "empty: holds no image files"),
        ("*.bmp", r"\*\.bmp: matches no image files"),
    ],
)
def test_what_matches_nothing_is_named(argument, message, folder):
    with pytest.raises(ImageError, match=message):
        find_images([folder / "b.jpg", folder / argument])


def test_what_is_left_out_is_named(folder, monkeypatch):
    """Formats that Pillow can't read, linked folders, folders that can't be searched; not text, and hidden files."""
    (folder / "sub" / "a.heic").write_bytes(b"x")
    (folder / "b.CR2").write_bytes(b"x")
    (folder / "link").symlink_to(folder / "sub", target_is_directory=True)
    scandir = os.scandir

    def forbidden(path):
        if os.fspath(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    found = find([folder])
    assert names(found.images, folder) == ["a.PNG", "b.jpg", "sub/c.jpeg"]
    assert [(str(path.relative_to(folder)), reason.split()[0]) for path, reason in found.skipped] == [
        ("b.CR2", "raw"),
        ("link", "is"),
        ("sub/a.heic", "needs"),
        ("sub/deep", "can't"),
    ]


def test_loops_and_names_too_long(folder):
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "gone.jpg").symlink_to("nowhere.jpg")
    assert names(find_images([folder]), folder)[2:4] == ["gone.jpg", "loop.jpg"]
    for name in ("loop.jpg", "gone.jpg"):
        assert find_images([folder / name]) == [folder / name]
        with pytest.raises(ImageError, match=rf"{name}: cannot be read"):
            read_image(folder / name)
    with pytest.raises(ImageError, match="no such file or folder"):
        find_images(["x" * 5000])


def test_nothing_asked_nothing_found():
    assert find_images([]) == []
