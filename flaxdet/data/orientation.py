"""Photos that a camera stored turned: whether boxes refer to the upright photo or to the pixels as they are stored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flaxdet.images.header import Header
from flaxdet.images.opened import ImageError

Size = tuple[int, int]

_SLACK = 1.0  # pixels that a box may reach out of a frame by rounding
_MAX_NAMED = 3


class Frames(NamedTuple):
    """How the photos of a data set are taken.

    Attributes:
        sizes: (rows, columns) of each image that boxes and detections refer to, by key.
        oriented: number of photos with an orientation that is not upright.
        untold: number of oriented photos for which nothing tells in which frame their boxes were drawn.
        contradicting: number of images with boxes that fit the other frame alone; 0 unless the user chose the frame.
    """

    sizes: dict[Any, Size]
    oriented: int
    untold: int
    contradicting: int


def wrong_sizes(
    source: str,
    folder: Path,
    names: Mapping[Any, str],
    headers: Mapping[Any, Header],
    stated: Mapping[Any, Size | None],
) -> dict[Any, str]:
    """Errors for the images whose stated size is neither the stored nor the upright size, by key.

    Args:
        source: the annotation file.
        folder: the folder that the names are relative to.
        names: file name by key.
        headers: by key.
        stated: (rows, columns) in the annotations, or None.

    Returns:
        A message for each such image; it names the file and all sizes.
    """
    return {
        key: _disagreement(source, folder / names[key], header, stated[key])
        for key, header in headers.items()
        if stated[key] not in (None, header.size, header.upright_size)
    }


def frames(
    source: str,
    names: Mapping[Any, str],
    headers: Mapping[Any, Header],
    stated: Mapping[Any, Size | None],
    boxes: Mapping[Any, np.ndarray],
    upright: bool | None,
) -> Frames:
    """Chooses the frame of each image, upright or as stored, and checks the boxes against it.

    Args:
        source: the annotation file, for errors.
        names: file name by key.
        headers: of each image.
        stated: (rows, columns) in the annotations, or None.
        boxes: [N, 4] xyxy, as the annotations have them.
        upright: True: upright. False: as stored. None: upright, checked against the boxes.

    Returns:
        The frames.

    Raises:
        ImageError: for ``upright`` None, if boxes leave the upright frame and fit the stored one.
    """
    sizes, oriented, untold, proven_upright, against = {}, 0, 0, 0, []
    for key, header in headers.items():
        stored, turned = header.size, header.upright_size
        sizes[key] = stored if upright is False else turned
        if header.orientation == 1:
            continue
        oriented += 1
        fits_upright, fits_stored = (_fits(boxes[key], size) for size in (turned, stored))
        only_upright, only_stored = fits_upright & ~fits_stored, fits_stored & ~fits_upright
        if only_stored.any() and not only_upright.any():
            against.append((key, int(only_stored.sum())))
        elif only_upright.any() or (stated[key] == turned != stored):
            proven_upright += 1
        elif len(boxes[key]):
            untold += 1
    if against and upright is None:
        count, most = len(against), sum(number for _, number in against)
        shown = ", ".join(names[key] for key, _ in against[:_MAX_NAMED]) + (", ..." if count > _MAX_NAMED else "")
        raise ImageError(
            f"{source}: in photos with an EXIF orientation ({shown}: {count} in all) boxes leave the upright photo and "
            f"fit the photo as it is stored ({most} in all): expected boxes of upright photos. Take photos and boxes "
            "as stored by --as-stored (upright=False), or upright with the boxes clipped by --upright (upright=True)"
        )
    # a tool draws all boxes in one way: a photo that only one way fits tells of the turned photos that both ways fit
    if proven_upright or against:
        untold = sum(_turns_in_place(headers[key]) and bool(len(boxes[key])) for key in headers)
    contradicting = proven_upright if upright is False else len(against)
    return Frames(sizes, oriented, untold, contradicting)


def _turns_in_place(header: Header) -> bool:
    """Whether the photo has an orientation, and the same size with and without it."""
    return header.orientation != 1 and header.size == header.upright_size


def _fits(boxes: np.ndarray, size: Size) -> np.ndarray:
    rows, columns = size
    return (boxes[:, 2] <= columns + _SLACK) & (boxes[:, 3] <= rows + _SLACK)


def _disagreement(source: str, path: Path, header: Header, stated: Any) -> str:
    stored, turned = header.size, header.upright_size
    text = f"{path}: is {stored[0]}x{stored[1]} pixels (rows x columns)"
    if turned != stored:
        text += f" as stored and {turned[0]}x{turned[1]} upright"
    hint = ""
    if stated == stored[::-1] and turned == stored:
        hint = " (is it a photo that was turned when its boxes were drawn, and has lost its EXIF orientation?)"
    return f"{text}, but {source} says {stated[0]}x{stated[1]}{hint}"
