"""Image files named by files, folders and patterns; nothing that is left out is left out silently."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from flaxdet.images.opened import ImageError

# Pillow registers extensions of these formats, but cannot decode them, or only with another program installed
_UNREADABLE_FORMATS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# Pictures that Pillow cannot read by itself; a plugin such as pillow-heif registers the extension, which then is read.
_FOREIGN = {
    **dict.fromkeys((".heic", ".heif", ".hif"), "needs pillow-heif, or a conversion to JPEG"),
    **dict.fromkeys((".jxl", ".avif", ".avifs", ".jxr", ".svg"), "Pillow cannot read this format"),
    **dict.fromkeys(
        (".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".pef"), "raw camera file: convert it to JPEG"
    ),
}


class Found(NamedTuple):
    """The files that folders and patterns lead to.

    Attributes:
        images: image files.
        skipped: (path, reason) of pictures that can't be read, and of folders that can't be searched.
    """

    images: list[Path]
    skipped: list[tuple[Path, str]]


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
    return find(arguments).images


def find(arguments: Iterable[str | os.PathLike[str]]) -> Found:
    """``find_images``, and the files left out of folders and patterns: formats that can't be read, closed folders.

    Args:
        arguments: as for ``find_images``.

    Returns:
        Images and skipped files, each sorted and without duplicates.

    Raises:
        ImageError: as ``find_images``; names the files that were skipped, if nothing else is there.
    """
    images: dict[str, Path] = {}  # by resolved path; realpath, unlike Path.resolve, bears loops of links
    skipped: dict[str, tuple[Path, str]] = {}
    for argument in arguments:
        path, before = Path(argument).expanduser(), len(skipped)
        count = 0
        for file, reason in _matches(path):
            if reason is None:
                count += 1
                images.setdefault(os.path.realpath(file), file)
            else:
                skipped.setdefault(os.path.realpath(file), (file, reason))
        if not count:
            left_out = [f"{file.name}: {reason}" for file, reason in list(skipped.values())[before:]]
            more = f" ({len(left_out)} skipped: {'; '.join(left_out[:3])})" if left_out else ""
            raise ImageError(f"{argument}: {_why_nothing(path)}{more}")
    return Found(sorted(images.values()), sorted(skipped.values()))


def _matches(path: Path) -> Iterator[tuple[Path, str | None]]:
    """Each file, with None or the reason why it is skipped."""
    # os.path's functions, unlike Path's, take a name that is too long for one that does not exist
    if os.path.isdir(path):
        yield from _in_folder(path)
    elif os.path.lexists(path):  # tested before patterns, since a file may be called "photo[1].jpg"
        yield path, None
    else:
        for match in map(Path, glob.iglob(str(path), recursive=True)):
            if os.path.isdir(match):
                yield from _in_folder(match)
            else:
                yield from _by_extension(match)


def _in_folder(folder: Path) -> Iterator[tuple[Path, str | None]]:
    closed: list[OSError] = []
    for root, folders, files in os.walk(folder, onerror=closed.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = (Path(root, name) for name in folders if os.path.islink(os.path.join(root, name)))
        yield from ((link, "is a link to a folder, which is not followed") for link in links)
        for file in (Path(root, name) for name in files if not name.startswith(".")):
            yield from _by_extension(file)
    yield from ((Path(error.filename), f"can't be searched ({error.strerror})") for error in closed)


def _by_extension(path: Path) -> Iterator[tuple[Path, str | None]]:
    extension = path.suffix.lower()
    known = Image.registered_extensions().get(extension)
    if known in Image.OPEN and known not in _UNREADABLE_FORMATS:
        yield path, None
    elif extension in _FOREIGN:
        yield path, _FOREIGN[extension]


def _why_nothing(path: Path) -> str:
    if os.path.isdir(path):
        return "holds no image files, expected a folder with some"
    if glob.has_magic(str(path)):
        return "matches no image files"
    return "no such file or folder, expected an image, a folder of images or a pattern"
