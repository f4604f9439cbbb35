"""Image files, read as upright RGB whatever their kind."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from flaxdet.images.opened import ImageError, opened, orientation_of

PixelRange = tuple[float, float]

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_STORED = _UPRIGHT | {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}  # 6 and 8 undo each other

_WHOLE = 2**24  # pixels of an image up to which it is converted to RGB as a whole
_STRIP = 2**20  # pixels of a larger image that are converted at a time
_SAMPLES = 64  # rows and columns of the pixels whose range is looked at
_LEAST_USED = 0.01  # share of the range
_LEAST_SAMPLES = 16  # of fewer pixels nothing is said


class PixelRangeWarning(UserWarning):
    """An image of 16 or more bits uses so little of its range that hardly any grey levels are left."""


class Decoded(NamedTuple):
    """An image that was read.

    Attributes:
        pixels: [H, W, 3] uint8 RGB.
        narrow: a warning, if the image uses under 1% of its range; else None.
    """

    pixels: UInt8[np.ndarray, "H W 3"]
    narrow: str | None


def read_image(
    path: str | os.PathLike[str],
    *,
    upright: bool = True,
    pixel_range: PixelRange | None = None,
    max_pixels: int | None = None,
) -> UInt8[np.ndarray, "H W 3"]:
    """Reads an image file as RGB.

    Grey, 1-bit, palette and CMYK images are converted, and transparency is dropped, by Pillow's
    ``convert("RGB")``. 16-bit grey is reduced to the upper 8 bits, as Pillow reduces 16-bit colour (Pillow's
    conversion of 16-bit grey clips at 255). Animations are read as their first frame.

    Args:
        path: the file, in any format that Pillow decodes; the extension does not matter.
        upright: if True, applies the EXIF orientation. If False, gives the pixels as they are stored.
        pixel_range: (low, high), the values that become black and white in grey images of 16 or 32 bits a pixel,
            integers or floats. Values between them are scaled linearly, values beyond them are clipped. Default: the
            whole range of 16 bits, 0 to 65535. Other images ignore it.
        max_pixels: largest number of pixels. Default: 178,956,970, twice ``PIL.Image.MAX_IMAGE_PIXELS``, which is
            the number above which Pillow refuses a file as a decompression bomb.

    Returns:
        [H, W, 3] uint8.

    Raises:
        ImageError: if the file is missing, a folder, empty, no image, truncated or otherwise broken, if it has more
            than ``max_pixels`` pixels, or 32-bit pixels and no ``pixel_range`` is given.
        ValueError: for a ``pixel_range`` or ``max_pixels`` out of range.

    Warns:
        PixelRangeWarning: if 98% of the pixels of an image of 16 or 32 bits lie within 1% of the range.
    """
    decoded = decode(path, upright=upright, pixel_range=pixel_range, max_pixels=max_pixels)
    if decoded.narrow is not None:
        warnings.warn(f"{path}: {decoded.narrow}", PixelRangeWarning, stacklevel=2)
    return decoded.pixels


def decode(
    path: str | os.PathLike[str],
    *,
    upright: bool = True,
    pixel_range: PixelRange | None = None,
    max_pixels: int | None = None,
) -> Decoded:
    """``read_image`` that returns its warning, for callers that read many images.

    Args:
        path: as for ``read_image``.
        upright: as for ``read_image``.
        pixel_range: as for ``read_image``.
        max_pixels: as for ``read_image``.

    Returns:
        The pixels, and the text of the warning.

    Raises:
        ImageError: as ``read_image``.
        ValueError: as ``read_image``.
    """
    check_pixel_options(pixel_range, max_pixels)
    with opened(path, max_pixels) as image:
        narrow_colour = _is_deep_colour(image)
        tiff = orientation_of(image) if image.format == "TIFF" else None  # Pillow turns TIFF while it reads the pixels
        image.load()
        turn = None
        if tiff is None and upright:
            turn = _UPRIGHT.get(orientation_of(image))
        elif tiff is not None and not upright:
            turn = _STORED.get(tiff)
        if turn is not None:
            image = image.transpose(turn)
        if _is_deep_grey(image):
            return _grey(image, pixel_range)
        pixels = _rgb(image)
        return Decoded(pixels, _narrow_colour(pixels) if narrow_colour else None)


def check_pixel_options(pixel_range: PixelRange | None, max_pixels: int | None) -> None:
    """Raises ValueError for a range of pixel values, or a number of pixels, that is none."""
    if pixel_range is not None:
        low, high = pixel_range
        if not -np.inf < low < high < np.inf:
            raise ValueError(f"pixel_range should be (low, high), two finite numbers, low < high, got ({low}, {high})")
    if max_pixels is not None and max_pixels < 1:
        raise ValueError(f"max_pixels should be at least 1, got {max_pixels}")


def _is_deep_grey(image: Any) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _is_deep_colour(image: Any) -> bool:
    """Whether Pillow reduces the image from 16 bits a channel to 8 while it reads the pixels."""
    return image.mode in ("RGB", "RGBA", "LA") and any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))


def _strips(image: Any) -> Iterator[tuple[slice, Any]]:
    """Parts of an image, from top to bottom, so that the copies of a large image don't exist all at once."""
    step = max(1, _STRIP // image.width)
    if image.width * image.height <= _WHOLE:
        yield slice(0, image.height), image
        return
    for top in range(0, image.height, step):
        bottom = min(top + step, image.height)
        yield slice(top, bottom), image.crop((0, top, image.width, bottom))


def _rgb(image: Any) -> np.ndarray:
    image.info.pop("transparency", None)  # convert would warn that RGB has no transparency
    if image.width * image.height <= _WHOLE:
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for rows, strip in _strips(image):
        pixels[rows] = np.asarray(strip if strip.mode == "RGB" else strip.convert("RGB"))
    return pixels


def _grey(image: Any, pixel_range: PixelRange | None) -> Decoded:
    """A grey image of 16 or 32 bits: the upper 8 of 16 bits, or a range of values."""
    sixteen_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if pixel_range is None and not sixteen_bits:
        raise ImageError(
            "has 32-bit pixels, whose range is not defined; expected 8 or 16 bits a channel, or the range "
            "(pixel_range=(low, high), --pixel-range LOW HIGH)"
        )
    low, high = (0, 65535) if pixel_range is None else pixel_range
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    samples, least, most = [], np.inf, -np.inf
    every = max(1, image.height // _SAMPLES), max(1, image.width // _SAMPLES)
    for rows, strip in _strips(image):
        values = np.asarray(strip)
        samples.append(values[:: every[0], :: every[1]].ravel())
        if pixel_range is None:
            levels = np.right_shift(values, 8).astype(np.uint8)
        else:
            scaled = np.clip((values.astype(np.float64) - low) * 255 / (high - low), 0, 255)
            levels = np.rint(np.nan_to_num(scaled)).astype(np.uint8)
        for channel in range(3):  # much quicker than one assignment to all three
            pixels[rows, :, channel] = levels
    if not _is_narrow(np.concatenate(samples), high - low):
        return Decoded(pixels, None)
    for _, strip in _strips(image):
        values = np.asarray(strip)
        least, most = min(least, values.min()), max(most, values.max())
    left = len(np.unique(pixels[..., 0]))
    return Decoded(
        pixels,
        f"has values from {least:g} to {most:g}, 98% of them in under 1% of the range from {low:g} to {high:g}: "
        f"{left} grey levels are left; pixel_range=(low, high), or --pixel-range LOW HIGH, sets another range",
    )


def _is_narrow(samples: np.ndarray, extent: float) -> bool:
    """Whether 98% of the values lie within 1% of the range."""
    samples = samples[np.isfinite(samples)]
    if samples.size < _LEAST_SAMPLES:
        return False
    low, high = np.percentile(samples, (1, 99))
    return bool(high - low < _LEAST_USED * extent)


def _narrow_colour(pixels: np.ndarray) -> str | None:
    """A warning if a 16-bit image uses under 1% of its range, so that few levels are left in 8 bits; else None."""
    rows, columns = pixels.shape[:2]
    if not _is_narrow(pixels[:: max(1, rows // _SAMPLES), :: max(1, columns // _SAMPLES)].ravel(), 255):
        return None
    return (
        f"has 16 bits a channel, 98% of the values in under 1% of the range: {len(np.unique(pixels))} levels are left "
        "of each channel; write the file with values that fill the range"
    )
