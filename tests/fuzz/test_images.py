"""Damaged image files: each is read, or refused with an ImageError of one line; header and pixels agree."""

from __future__ import annotations

import io
import random
import time
import warnings

import numpy as np
import pytest
from PIL import Image, features

from flaxdet.data import ImageError
from flaxdet.images.decode import decode
from flaxdet.images.header import read_header
from tests.fuzz.data_cases import mutate, seeds

MOST_PIXELS = 300_000
MOST_SECONDS = 20.0  # a machine that does other work besides included


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def files() -> dict[str, list[bytes]]:
    """Whole files by kind."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (20, 30, 3)).astype(np.uint8)).resize((60, 40))
    grey, deep = colour.convert("L"), Image.fromarray(rng.integers(0, 2**16, (40, 60)).astype(np.uint16))
    floats = Image.fromarray(rng.normal(size=(40, 60)).astype(np.float32))
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    kinds = {
        "jpeg": [
            encoded(image, "JPEG", **o) for image in (colour, grey) for o in ({"exif": exif}, {"progressive": True})
        ],
        "png": [
            encoded(colour, "PNG", exif=exif),
            *(encoded(image, "PNG") for image in (grey, deep, colour.quantize(16), grey.convert("1"))),
        ],
        "tiff": [
            *(encoded(image, "TIFF") for image in (colour, deep, floats)),
            *(encoded(colour, "TIFF", compression=name, exif=exif) for name in ("tiff_lzw", "tiff_deflate", "jpeg")),
        ],
        "webp": [encoded(colour, "WEBP", exif=exif), encoded(colour, "WEBP", lossless=True)],
        "gif": [encoded(colour, "GIF"), encoded(colour, "GIF", save_all=True, append_images=[colour.rotate(90)])],
        "others": [
            *(encoded(colour, kind) for kind in ("BMP", "PPM", "TGA", "PCX", "ICO", "SGI", "DDS")),
            *(encoded(deep, kind) for kind in ("PPM",)),
        ],
    }
    for kind, needed in (("AVIF", "avif"), ("JPEG2000", "jpg_2000")):
        if features.check(needed):
            kinds["others"].append(encoded(colour, kind))
    return kinds


FILES = files()


@pytest.mark.filterwarnings("ignore")  # Pillow's own, of damaged metadata
@pytest.mark.parametrize("kind", FILES)
def test_damaged_files(kind, tmp_path):
    path = tmp_path / f"image.{kind}"
    read, slowest = 0, 0.0
    for seed in seeds():
        rng = random.Random(f"{kind} {seed}")
        path.write_bytes(mutate(rng.choice(FILES[kind]), rng))
        options = {"pixel_range": rng.choice((None, (0.0, 1.0), (-5, 60_000))), "max_pixels": MOST_PIXELS}
        began = time.perf_counter()
        try:
            sizes = [check(path, upright, options) for upright in (True, False)]
        except Exception as error:
            raise AssertionError(f"{kind}, seed {seed}: {type(error).__name__}: {error}") from error
        slowest = max(slowest, time.perf_counter() - began)
        read += sizes[0] is not None
        assert sizes[0] is None or sizes[0] in (sizes[1], sizes[1][::-1]), f"{kind}, seed {seed}"
        assert slowest < MOST_SECONDS, f"{kind}, seed {seed}: {slowest:.1f} s"
    print(f"{kind}: {len(seeds())} cases, {read} of them read, no fault; the slowest took {slowest:.2f} s")
    assert read or len(seeds()) < 20  # a mutation leaves some files readable: the loop sees both outcomes


def check(path, upright, options) -> tuple[int, int] | None:
    """The size of an image that is read; None if it is refused as documented."""
    header, pixels = None, np.zeros(0)
    try:
        header = read_header(path, max_pixels=options["max_pixels"])
        pixels = decode(path, upright=upright, **options).pixels
    except ImageError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert refused.startswith(f"{path}: ")
        assert "\n" not in refused
        return None
    assert header is not None
    assert (pixels.dtype, pixels.ndim, pixels.shape[2]) == (np.uint8, 3, 3)
    assert pixels.shape[:2] == (header.upright_size if upright else header.size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels[:1] = 0
    return pixels.shape[:2]
