"""The summary of a data set before a run: counts, boxes that were left out or changed, and probable faults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flaxdet.data.coco_boxes import ImageBoxes
from flaxdet.data.orientation import Frames

Size = tuple[int, int]

_MOST = 0.5  # share of faulty boxes from which on the whole file is probably wrong
_MANY = 0.1  # the same, where another reading of the boxes fits
_NEARLY_ALL = 0.95  # share of boxes that another reading must fit
_CLOSE = 1.0  # pixels by which a box may reach out of its image by rounding
_BBOX = "COCO's bbox is [x, y, width, height] in pixels of the image"
_MAX_NAMED = 5
_MAX_CLASSES = 20


@dataclass(frozen=True)
class Summary:
    """The summary of a data set; as text, one line for each entry.

    Attributes:
        lines: counts of images and boxes, boxes of each class, clipped and dropped boxes, orientations.
        warnings: probable faults.
        skipped: each photo that ``skip_broken`` left out, and why.
        unused: a note on the classes that no annotation uses, or None. ``read_coco`` does not warn of them.
    """

    lines: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    unused: str | None = None

    def __str__(self) -> str:
        left_out = [f"left out: {text}" for text in self.skipped]
        warnings = [f"warning: {text}" for text in (*self.warnings, self.unused) if text]
        return "\n".join((*self.lines, *left_out, *warnings))


def counted(count: int, thing: str) -> str:
    """A number and a noun in its plural where there is not one."""
    plural = thing + ("es" if thing.endswith(("x", "s")) else "s")
    return f"{count} {thing if count == 1 else plural}"


def counted_names(names: Sequence[str]) -> str:
    """How many categories, and the names of some."""
    more = ", ..." if len(names) > _MAX_NAMED else ""
    return f"{len(names)} {'category' if len(names) == 1 else 'categories'} ({', '.join(names[:_MAX_NAMED])}{more})"


def describe(
    report: Mapping[str, int],
    boxes_a_class: Mapping[str, int],
    taken: Frames,
    upright: bool | None,
    unused: Sequence[str],
    drop_unused: bool,
) -> tuple[str, ...]:
    """The lines of a summary.

    Args:
        report: of the data set.
        boxes_a_class: number of boxes by name of the class.
        taken: how the photos are taken.
        upright: as for ``read_coco``.
        unused: names of the categories that no annotation uses.
        drop_unused: as for ``read_coco``.
    """
    dropped = {
        "without an area": report["no_area"],
        "outside their image": report["outside"],
        "of crowds": report["crowd"],
    }
    left_out = [f"{counted(count, 'box')} {why}" for why, count in dropped.items() if count]
    if report["removed_images"]:
        left_out.append(f"{counted(report['removed_images'], 'image')} without boxes")
    if report["skipped_images"]:
        left_out.append(f"{counted(report['skipped_images'], 'image')} that can't be used")
    images, boxes = counted(report["images"], "image"), counted(report["boxes"], "box")
    lines = [f"{images}, {boxes} of {counted(len(boxes_a_class), 'class')}"]
    if unused and drop_unused:
        left_out.append(f"{counted_names(unused)} that no annotation uses")
    lines[0] += f"; left out: {', '.join(left_out)}" if left_out else ""
    if boxes_a_class:
        lines.append(f"boxes a class: {_classes(boxes_a_class)}")
    if unused and not drop_unused:
        lines.append(f"no annotation uses {counted_names(unused)}")
    changed = {
        "clipped to their image": report["clipped"],
        "tiny (a side of at most 1 pixel)": report["tiny"],
        "doubled (box and class of another one)": report["doubled"],
    }
    notes = [f"{count} {what}" for what, count in changed.items() if count]
    if report["repeated_ids"]:
        notes.append(f"{report['repeated_ids']} with the id of another annotation")
    if notes:
        lines.append(f"boxes: {', '.join(notes)}")
    if report["repeated_files"]:
        lines.append(f"{counted(report['repeated_files'], 'image')} with the file of another image")
    if taken.oriented:
        how, other = ("as stored", "upright without it") if upright is False else ("upright", "--as-stored: as stored")
        lines.append(
            f"{taken.oriented} of {len(taken.sizes)} photos carry an EXIF orientation: photos and boxes are taken {how}"
            f" ({other})"
        )
    return tuple(lines)


def suspicions(
    images: Mapping[Any, ImageBoxes],
    taken: Frames,
    upright: bool | None,
    narrow: str | None,
) -> tuple[str, ...]:
    """The warnings of a summary.

    Args:
        images: boxes as the file has them, by key.
        taken: how the photos are taken.
        upright: as for ``read_coco``.
        narrow: a warning of 16-bit images, or None.
    """
    faults = None if taken.contradicting else faulty_boxes(images, taken.sizes)
    found = [text for text in (faults, narrow) if text]
    frame, other = ("as stored", "upright") if upright is False else ("upright", "as stored")
    if taken.untold:
        found.append(
            f"nothing tells whether the boxes of {counted(taken.untold, 'photo')} with an EXIF orientation were drawn "
            f"on the upright photo or on the photo as stored; they are taken {frame}"
        )
    if taken.contradicting:
        found.append(
            f"{counted(taken.contradicting, 'photo')} with boxes that leave the photo {frame} and fit it {other}"
        )
    return tuple(found)


def unused_classes(names: Sequence[str]) -> str:
    """A note on the new classes that no annotation uses."""
    return (
        f"{counted_names(names)} that no annotation uses will be a class all the same, unless --drop-unused "
        "(drop_unused=True)"
    )


def faulty_boxes(images: Mapping[Any, ImageBoxes], sizes: Mapping[Any, Size]) -> str | None:
    """The fault of most boxes of a file: all crowds, normalised, corners instead of sizes, or outside; else None."""
    crowds = sum(image.crowds for image in images.values())
    boxes = np.concatenate([np.zeros((0, 4)), *(image.xywh for image in images.values())])
    if not len(boxes):
        if not crowds:
            return None
        return (
            f"all {counted(crowds, 'box')} are crowds (iscrowd 1), which training leaves out and evaluation does not "
            "count; CVAT exports masks that were drawn with the brush or by SAM in this way: export them as polygons, "
            "or set iscrowd to 0"
        )
    counts = [len(image.xywh) for image in images.values()]
    limits = np.repeat(np.array([sizes[key][::-1] for key in images], np.float64).reshape(-1, 2), counts, axis=0)
    start, extent, end = boxes[:, :2], boxes[:, 2:], boxes[:, :2] + boxes[:, 2:]
    flat = (extent <= 0).any(axis=1)
    if flat.mean() > _MOST:
        return f"{flat.sum()} of {len(boxes)} boxes have no area: their width or height is 0 or less; {_BBOX}"
    normalised = ((boxes >= 0) & (boxes <= 1)).all(axis=1) & (extent > 0).all(axis=1)
    if normalised.mean() > _MOST:
        return f"{normalised.sum()} of {len(boxes)} boxes lie between 0 and 1, as normalised coordinates do; {_BBOX}"
    outside = ((start < -_CLOSE) | (end > limits + _CLOSE)).any(axis=1)
    corners = ((extent > start) & (extent <= limits + _CLOSE) & (start >= -_CLOSE)).all(axis=1)
    as_corners = corners.mean() > _NEARLY_ALL
    if outside.mean() > (_MANY if as_corners else _MOST):
        text = f"{outside.sum()} of {len(boxes)} boxes reach out of their image"
        if as_corners:
            text += f", and {corners.sum()} fit as corners x1, y1, x2, y2"
        return f"{text}; {_BBOX}"
    return None


def nothing_to_train_on(source: str, count: int, images: Mapping[Any, ImageBoxes], sizes: Mapping[Any, Size]) -> str:
    """The error of a data set to train on that has no box that counts, with the reason where there is one."""
    reason = faulty_boxes(images, sizes)
    text = f"{source}: nothing to train on, none of its {count} images has a box that counts"
    return f"{text}: {reason}" if reason else text


def _classes(boxes_a_class: Mapping[str, int]) -> str:
    """The numbers of boxes, the largest first; of many classes, the most and the least frequent."""
    ordered = sorted(boxes_a_class.items(), key=lambda row: -row[1])
    shown = [f"{name} {count}" for name, count in ordered]
    if len(shown) > _MAX_CLASSES:
        half = _MAX_CLASSES // 2
        shown = [*shown[:half], f"... ({len(shown) - 2 * half} classes between)", *shown[-half:]]
    return ", ".join(shown)
