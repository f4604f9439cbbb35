"""Image files: finding them, and reading every kind as upright RGB."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

# Pillow registers extensions of these formats, but cannot decode them, or only with another program installed
_UNREADABLE_FORMATS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """An image cannot be found or read; the message is one line that names the image and what was expected."""


def read_image(path: str | os.PathLike[str], *, upright: bool = True) -> UInt8[np.ndarray, "H W 3"]:
    """Reads an image file as RGB.

    Grey, 1-bit, palette and CMYK images are converted, and transparency is dropped, by Pillow's
    ``convert("RGB")``. 16-bit grey is reduced to the upper 8 bits, as Pillow reduces 16-bit colour (Pillow's
    conversion of 16-bit grey clips at 255). Animations are read as their first frame.

    Args:
        path: the file, in any format that Pillow decodes; the extension does not matter.
        upright: if True, applies the EXIF orientation. If False, gives the pixels as they are stored, to which
            the boxes of a COCO file refer.

    Returns:
        [H, W, 3] uint8.

    Raises:
        ImageError: if the file is missing, a folder, empty, no image, truncated or otherwise broken, so large
            that Pillow considers it a decompression bomb, or has 32-bit pixels, whose range is undefined.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror}), expected an image file") from error
    if path.is_dir():
        raise ImageError(f"{path}: is a folder, expected an image file")
    if not path.is_file():
        raise ImageError(f"{path}: is not a regular file, expected an image file")
    if not size:
        raise ImageError(f"{path}: is empty, expected an image file")
    try:
        with Image.open(path) as image:
            image.load()
            return _rgb(_upright(image) if upright else image)
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"{path}: is no image in a format that Pillow can read (JPEG, PNG, ...)") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = Image.MAX_IMAGE_PIXELS
        raise ImageError(f"{path}: is too large, expected at most {limit} pixels ({_line(error)})") from error
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error
    except OSError as error:
        what = f"cannot be read ({error.strerror})" if error.strerror else f"is a broken image ({_line(error)})"
        raise ImageError(f"{path}: {what}") from error
    except Exception as error:  # broken files make Pillow's decoders raise SyntaxError, IndexError and others
        raise ImageError(f"{path}: is a broken image ({_line(error)})") from error


def find_images(arguments: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Image files named by files, folders and glob patterns.

    Args:
        arguments: each a file (with any extension), a folder (searched with subfolders) or a pattern with ``*``,
            ``?``, ``[]`` or ``**``. Folders and patterns give only files with an extension that Pillow can
            decode, without hidden files.

    Returns:
        The files, sorted, without duplicates.

    Raises:
        ImageError: if an argument matches nothing; the message names the argument.
    """
    paths: dict[Path, Path] = {}  # by resolved path
    for argument in arguments:
        files = list(_matches(Path(argument).expanduser()))
        if not files:
            raise ImageError(f"{argument}: {_why_nothing(Path(argument).expanduser())}")
        for file in files:
            paths.setdefault(file.resolve(), file)
    return sorted(paths.values())


def _matches(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from _in_folder(path)
    elif path.exists():  # tested before patterns, since a file may be called "photo[1].jpg"
        yield path
    else:
        for match in map(Path, glob.iglob(str(path), recursive=True)):
            if match.is_dir():
                yield from _in_folder(match)
            elif _has_image_extension(match):
                yield match


def _in_folder(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in (Path(root, name) for name in files if not name.startswith(".")):
            if _has_image_extension(file):
                yield file


def _why_nothing(path: Path) -> str:
    if path.is_dir():
        return "holds no image files, expected a folder with some"
    if glob.has_magic(str(path)):
        return "matches no image files"
    return "no such file or folder, expected an image, a folder of images or a pattern"


def _has_image_extension(path: Path) -> bool:
    known = Image.registered_extensions().get(path.suffix.lower())
    return known in Image.OPEN and known not in _UNREADABLE_FORMATS


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # a picture with malformed EXIF data is still readable
        orientation = None
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _rgb(image: Image.Image) -> np.ndarray:
    sixteen_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if sixteen_bits:
        grey = (np.asarray(image, np.uint32) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)
    if image.mode in ("I", "F"):
        raise ImageError("has 32-bit pixels, whose range is not defined; expected 8 or 16 bits a channel")
    image.info.pop("transparency", None)  # convert would warn that RGB has no transparency
    return np.array(image.convert("RGB"))


def _line(error: Any) -> str:
    return " ".join(str(error).split()) or type(error).__name__
