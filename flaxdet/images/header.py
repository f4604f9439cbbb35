"""What an image file says before its pixels are read: size, orientation, and whether the file is cut short."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

from flaxdet.images.opened import SWAPPING, opened, orientation_of

_TAIL = 4096  # bytes: cameras pad files behind the end marker
_PNG_TEXT = {b"eXIf", b"tEXt", b"zTXt", b"iTXt"}  # chunks that may hold an orientation


class Header(NamedTuple):
    """The header of an image file.

    Attributes:
        size: (rows, columns) of the pixels as they are stored.
        orientation: EXIF orientation, 1 (upright) to 8.
        deep: True for 16 or 32 bits a pixel of grey.
    """

    size: tuple[int, int]
    orientation: int
    deep: bool

    @property
    def upright_size(self) -> tuple[int, int]:
        """(rows, columns) of the image after the orientation is applied."""
        rows, columns = self.size
        return (columns, rows) if self.orientation in SWAPPING else self.size


def read_header(path: str | os.PathLike[str], *, max_pixels: int | None = None) -> Header:
    """Reads the header of an image file, and compares the length of the file with what the header promises.

    A file that seems to be cut short (its end marker is missing, or it ends before the data that it lists) is decoded,
    to be sure. Other files are not decoded, so that damage in the middle of the pixels is not found.

    Args:
        path: the file.
        max_pixels: as for ``read_image``.

    Returns:
        The header.

    Raises:
        ImageError: as ``read_image``.
    """
    path = Path(path)
    with opened(path, max_pixels) as image:
        size = image.height, image.width
        tiff = orientation_of(image) if image.format == "TIFF" else None  # Pillow turns TIFF while it reads the pixels
        deep = image.mode in ("I", "F") or image.mode.startswith("I;16")
        # the first frame of several; MPO is JPEG with further images behind the first
        layout = {"JPEG": _jpeg, "MPO": _jpeg, "PNG": _png, "WEBP": _webp, "GIF": _gif, "TIFF": _tiff, "BMP": _tiles}
        check = layout.get(str(image.format))
        whole, late_text = check(path, image) if check else (True, False)
        if not whole or late_text:
            image.load()
        if tiff in SWAPPING:
            size = size[1], size[0]  # of TIFF Pillow states the upright size
        return Header(size, orientation_of(image) if tiff is None else tiff, deep)


def _tail(path: Path) -> bytes:
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(size - min(_TAIL, size // 2))  # not the first half, where a thumbnail has an end marker of its own
        return file.read()


def _jpeg(path: Path, image: Any) -> tuple[bool, bool]:
    return b"\xff\xd9" in _tail(path), False


def _gif(path: Path, image: Any) -> tuple[bool, bool]:
    return _tail(path).rstrip(b"\0").endswith(b";"), False


def _webp(path: Path, image: Any) -> tuple[bool, bool]:
    with open(path, "rb") as file:
        return struct.unpack("<4xI", file.read(8))[0] + 8 <= path.stat().st_size, False


def _png(path: Path, image: Any) -> tuple[bool, bool]:
    """Whether the file reaches its last chunk; whether text or EXIF data comes after the first chunk of pixels."""
    length, late_text, pixels = path.stat().st_size, False, False
    with open(path, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            count, kind = struct.unpack(">I4s", head)
            pixels |= kind == b"IDAT"
            late_text |= pixels and kind in _PNG_TEXT
            if kind == b"IEND":
                return True, late_text
            file.seek(count + 4, os.SEEK_CUR)
            if file.tell() > length:
                break
    return False, late_text


def _tiff(path: Path, image: Any) -> tuple[bool, bool]:
    length = path.stat().st_size
    for offsets, counts in ((273, 279), (324, 325)):  # strips, tiles
        at, size = image.tag_v2.get(offsets), image.tag_v2.get(counts)
        if at and size and any(a + n > length for a, n in zip(at, size, strict=False)):
            return False, False
    return True, False


def _tiles(path: Path, image: Any) -> tuple[bool, bool]:
    """Of uncompressed pixels: the last row ends inside the file."""
    length = path.stat().st_size
    for name, box, offset, arguments in image.tile:
        stride = arguments[1] if name == "raw" and isinstance(arguments, tuple) and len(arguments) > 1 else 0
        if stride and offset + stride * (box[3] - box[1]) > length:
            return False, False
    return True, False
