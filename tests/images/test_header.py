"""Headers: sizes and orientations without the pixels, and files that are cut short."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, features

from flaxdet.data import ImageError, read_image
from flaxdet.images.header import read_header

NOISE = np.random.default_rng(0).integers(0, 256, (48, 64, 3)).astype(np.uint8)
FORMATS = ["jpg", "png", "gif", "tif", "webp", "bmp"]


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("extension", FORMATS)
def test_size(extension, tmp_path, monkeypatch):
    path = tmp_path / f"a.{extension}"
    Image.fromarray(NOISE).save(path)
    for loader in (Image.Image, *Image.Image.__subclasses__()):
        monkeypatch.setattr(loader, "load", lambda self: pytest.fail("the pixels were read"))
    header = read_header(path)
    assert (header.size, header.orientation, header.deep) == ((48, 64), 1, False)


@pytest.mark.parametrize("extension", FORMATS)
@pytest.mark.parametrize("share", [0.3, 0.7, 0.97])
def test_a_file_that_is_cut_short(extension, share, tmp_path):
    path = tmp_path / f"a.{extension}"
    Image.fromarray(NOISE).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ImageError, match=r"is (a broken image|no image)"):
        read_header(path)


@pytest.mark.parametrize("options", [{"tiled": True}, {"compression": "tiff_lzw"}, {}])
def test_tiff_that_is_cut_short(options, tmp_path):
    path = tmp_path / "a.tif"
    compression = options.get("compression")
    Image.fromarray(NOISE).save(path, compression=compression)
    content = path.read_bytes()
    path.write_bytes(content[:-600])
    with pytest.raises(ImageError, match=r"is (a broken image|no image)"):
        read_header(path)


@pytest.mark.parametrize("padding", [b"\0" * 3000, b"\n", b"SEFT trailer of a camera" * 50])
def test_bytes_behind_the_end_are_no_fault(padding, tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(NOISE).save(path)
    path.write_bytes(path.read_bytes() + padding)
    assert read_header(path).size == read_image(path).shape[:2] == (48, 64)


def test_a_thumbnail_has_an_end_of_its_own(tmp_path):
    thumbnail, path = tmp_path / "thumbnail.jpg", tmp_path / "a.jpg"
    Image.fromarray(NOISE[:8, :8]).save(thumbnail)
    Image.fromarray(NOISE).save(path, comment=thumbnail.read_bytes())
    content = path.read_bytes()
    assert content.count(b"\xff\xd9") == 2
    path.write_bytes(content[:-500])
    with pytest.raises(ImageError, match="truncated"):
        read_header(path)


@pytest.mark.parametrize("where", ["before", "behind"])
@pytest.mark.parametrize("how", ["exif", "xmp"])
def test_orientation_of_a_png_wherever_it_is(how, where, tmp_path):
    """Pillow finds data behind the pixels only when they are decoded; header and pixels must agree all the same."""
    path = tmp_path / "a.png"
    if how == "exif":
        Image.fromarray(NOISE).save(path, exif=turned(6))
    else:
        text = PngImagePlugin.PngInfo()
        text.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta><rdf tiff:Orientation="6"/></x:xmpmeta>')
        Image.fromarray(NOISE).save(path, pnginfo=text)
    chunk = b"eXIf" if how == "exif" else b"iTXt"
    content = path.read_bytes()
    start = content.index(chunk) - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    rest = content[:start] + content[end:]
    place = rest.index(b"IDAT" if where == "before" else b"IEND") - 4
    path.write_bytes(rest[:place] + content[start:end] + rest[place:])
    assert read_image(path).shape == (64, 48, 3)
    header = read_header(path)
    assert (header.orientation, header.size, header.upright_size) == (6, (48, 64), (64, 48))


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("extension", ["jpg", "png", "tif", "webp", "avif"])
def test_upright_size_is_that_of_the_pixels(orientation, extension, tmp_path):
    if extension == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    path = tmp_path / f"a.{extension}"
    Image.fromarray(NOISE).save(path, exif=turned(orientation))
    assert read_header(path).upright_size == read_image(path).shape[:2]


def test_16_bits_are_told(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "a.png")
    assert read_header(tmp_path / "a.png").deep


def test_the_limit_on_pixels(tmp_path):
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match="3072 pixels, expected at most 3071"):
        read_header(tmp_path / "a.png", max_pixels=3071)
