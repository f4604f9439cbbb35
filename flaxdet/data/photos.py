"""The look at all photos before a run: missing files, headers, and files that are cut short."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from flaxdet.data.missing import describe_missing, missing_files
from flaxdet.images.decode import ImageError, PixelRange, decode
from flaxdet.images.header import Header, read_header

Key = TypeVar("Key")

_THREADS = 8  # reading a header waits for the disk
_SKIP = " (skip_broken=True, --skip-broken leaves them out)"
_MAX_NAMED = 3  # an error names this many broken files
_DEEP_DECODED = 4  # images of 16 bits that are decoded, to see how much of their range they use


class Photos(NamedTuple):
    """The headers of the image files, and their faults.

    Attributes:
        headers: by key of the image; without those that can't be read.
        broken: the fault of each image that can't be read, by key.
        narrow: a warning of images that use under 1% of their range, or None.
    """

    headers: dict
    broken: dict
    narrow: str | None


def look_at_photos(
    source: str,
    folder: Path,
    names: Mapping[Key, str],
    *,
    pixel_range: PixelRange | None,
    max_pixels: int | None,
    skip_broken: bool,
) -> Photos:
    """Reads the headers of all photos.

    Args:
        source: the annotation file, for errors.
        folder: the folder that the names are relative to.
        names: file name by key of the image.
        pixel_range: as for ``read_image``.
        max_pixels: as for ``read_image``.
        skip_broken: decode every photo, and return those that can't be read instead of raising an error.

    Returns:
        The headers.

    Raises:
        ValueError: if the folder is none, or files are missing: says how many, names some, and gives a hint where the
            folder has them under another name.
        ImageError: if files can't be read: says how many, names some and what is wrong with them.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: is not a folder, expected the one that holds the images of {source}")
    missing = set(missing_files(folder, list(names.values())))
    if missing and (not skip_broken or len(missing) == len(set(names.values()))):
        absent = [name for name in names.values() if name in missing]
        option = "" if skip_broken or len(absent) == len(names) else _SKIP
        raise ValueError(f"{source}: {describe_missing(folder, absent, len(names))}{option}")

    def read(name: str) -> Header | str:
        if name in missing:
            return f"{folder / name}: is missing"
        try:
            header = read_header(folder / name, max_pixels=max_pixels)
            if skip_broken:
                decode(folder / name, pixel_range=pixel_range, max_pixels=max_pixels)
        except ImageError as error:
            return str(error)
        return header

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="flaxdet-look") as pool:
        results = dict(zip(names, pool.map(read, names.values()), strict=True))
    headers = {key: result for key, result in results.items() if isinstance(result, Header)}
    broken = {key: result for key, result in results.items() if isinstance(result, str)}
    if broken and (not skip_broken or not headers):
        raise ImageError(f"{source}: {counted_errors(list(broken.values()), len(names), skip_broken)}")
    try:
        narrow = _narrow(folder, names, headers, pixel_range, max_pixels)
    except ImageError as error:
        raise ImageError(f"{source}: {counted_errors([str(error)], len(names), skip_broken)}") from error
    return Photos(headers, broken, narrow)


def counted_errors(errors: list[str], count: int, skip_broken: bool) -> str:
    """How many of ``count`` images can't be used, some of the errors, and the option that leaves such images out."""
    more = "; ..." if len(errors) > _MAX_NAMED else ""
    text = f"{len(errors)} of its {count} images can't be used: {'; '.join(errors[:_MAX_NAMED])}{more}"
    return text if skip_broken else text + _SKIP


def _narrow(
    folder: Path,
    names: Mapping[Key, str],
    headers: Mapping[Key, Header],
    pixel_range: PixelRange | None,
    limit: int | None,
) -> str | None:
    """Decodes a few of the images of 16 or 32 bits."""
    deep = [key for key, header in headers.items() if header.deep]
    chosen = deep[:: max(1, len(deep) // _DEEP_DECODED)][:_DEEP_DECODED]
    texts = {key: decode(folder / names[key], pixel_range=pixel_range, max_pixels=limit).narrow for key in chosen}
    found = [f"{names[key]} {text}" for key, text in texts.items() if text is not None]
    return f"{len(found)} of {len(chosen)} images of 16 or more bits that were looked at: {found[0]}" if found else None
