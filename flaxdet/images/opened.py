"""Opening image files: the header, and every way in which a file can be wrong."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from flaxdet.files.opening import HEAD, foreign_kind

_ORIENTATION_TAG = 0x0112
_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"}
SWAPPING = frozenset({5, 6, 7, 8})  # EXIF orientations that exchange rows and columns


class ImageError(ValueError):
    """An image cannot be found or read; the message is one line that names the image and what was expected."""


@contextlib.contextmanager
def opened(path: str | os.PathLike[str], max_pixels: int | None = None) -> Iterator[Any]:
    """An image file whose header is read, as Pillow's image; errors of the block are errors of the file too.

    Args:
        path: the file.
        max_pixels: as for ``read_image``.

    Yields:
        The image, without pixels: ``load`` reads them.

    Raises:
        ImageError: as ``read_image``; errors that the block raises while it reads the image become ImageErrors.
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
    limit = max_pixels
    if limit is None and Image.MAX_IMAGE_PIXELS is not None:
        limit = 2 * Image.MAX_IMAGE_PIXELS
    try:
        with open(path, "rb") as file:
            image = _open(file, path)
            pixels = image.width * image.height
            if limit is not None and pixels > limit:
                raise ImageError(
                    f"is too large: has {image.height}x{image.width} = {pixels} pixels, expected at most {limit} "
                    "(max_pixels, --max-pixels)"
                )
            yield image
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # of a part of the image
        raise ImageError(f"{path}: is too large for Pillow ({_line(error)}; PIL.Image.MAX_IMAGE_PIXELS)") from error
    except MemoryError as error:
        raise ImageError(f"{path}: is too large for the memory of this machine") from error
    except OSError as error:
        what = f"cannot be read ({error.strerror})" if error.strerror else f"is a broken image ({_line(error)})"
        raise ImageError(f"{path}: {what}") from error
    except Exception as error:  # broken files make Pillow's decoders raise SyntaxError, IndexError and others
        raise ImageError(f"{path}: is a broken image ({_line(error)})") from error


def orientation_of(image: Any) -> int:
    """The EXIF orientation of an opened image, 1 to 8; 1, upright, if it has none that is valid."""
    try:
        # not a PNG's own method, which decodes the pixels to look behind them
        orientation = Image.Image.getexif(image).get(_ORIENTATION_TAG)
    except Exception:  # a picture with malformed EXIF data is still readable
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _open(file: Any, path: Path) -> Any:
    """``Image.open`` without its limit on pixels, which is global and whose number it does not state."""
    prefix = file.read(16)
    for prepare in (Image.preinit, Image.init):  # a few formats, then all
        prepare()
        for name in list(Image.ID):
            factory, accept = Image.OPEN[name]
            try:
                accepts = accept is None or accept(prefix)
                if accepts and not isinstance(accepts, str):  # a string says which library the format needs
                    file.seek(0)
                    return factory(file, os.fspath(path))
            except (SyntaxError, IndexError, TypeError, struct.error):  # how Pillow's readers say "not mine"
                continue
    file.seek(0)
    raise ImageError(_what_else(file.read(HEAD)))


def _what_else(head: bytes) -> str:
    """The kind of a file that is no image for Pillow, told by the first bytes, as a clause for an error."""
    if head[4:8] == b"ftyp" and head[8:12] in _HEIC:
        return "is HEIC, which Pillow reads only with pillow-heif: convert it to JPEG"
    other = None if head.lstrip().startswith(b"<?xml") else foreign_kind(head)  # XML may be a drawing in SVG
    return other or "is no image in a format that Pillow can read (JPEG, PNG, ...)"


def _line(error: Any) -> str:
    return " ".join(str(error).split()) or type(error).__name__
