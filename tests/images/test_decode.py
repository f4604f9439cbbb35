from __future__ import annotations

import io
import os

import numpy as np
import pytest
from PIL import Image, ImageFile

from flaxdet.data import ImageError, find_images, read_image
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


@pytest.mark.parametrize("pixels", [1000, 3000])
def test_decompression_bomb(pixels, photo, tmp_path, monkeypatch):
    """Above Pillow's limit it warns (an error in this suite), above twice the limit it raises."""
    path = tmp_path / "bomb.png"
    Image.fromarray(photo).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", photo.shape[0] * photo.shape[1] - pixels // 2)
    if pixels == 3000:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match=r"bomb.png: is too large, expected at most \d+ pixels"):
        read_image(path)


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


def test_nothing_asked_nothing_found():
    assert find_images([]) == []
