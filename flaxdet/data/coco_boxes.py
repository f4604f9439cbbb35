"""Boxes and labels of a COCO file, image by image: clipped and dropped as torchvision does, and counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from flaxdet.data.coco_json import Annotation


class ImageBoxes(NamedTuple):
    """The boxes of one image as the file has them, without crowds.

    Attributes:
        xywh: [N, 4] float64, x, y, width and height.
        labels: [N] int32.
        crowds: number of crowds.
        empty: True if no annotation, crowds included, has both sides above one pixel.
    """

    xywh: np.ndarray
    labels: np.ndarray
    crowds: int
    empty: bool

    @property
    def corners(self) -> np.ndarray:
        """[N, 4] float32 xyxy, not clipped."""
        corners = self.xywh.astype(np.float32)
        corners[:, 2:] += corners[:, :2]
        return corners


class Clipped(NamedTuple):
    """Boxes inside their images, each with an area.

    Attributes:
        boxes: [N, 4] float32 xyxy by key of the image.
        labels: [N] int32 by key.
        report: numbers of boxes: "crowd", "no_area", "outside", "clipped", "tiny", "doubled".
    """

    boxes: dict[Any, np.ndarray]
    labels: dict[Any, np.ndarray]
    report: dict[str, int]


def boxes_by_image(
    annotations: Iterable[Annotation], keys: Iterable[Any], label_of: Mapping[int, int]
) -> dict[Any, ImageBoxes]:
    """The boxes of each image of ``keys``; annotations of other images are left out."""
    rows: dict[Any, list[tuple[float, ...]]] = {key: [] for key in keys}
    crowds, empty = dict.fromkeys(rows, 0), dict.fromkeys(rows, True)
    for annotation in annotations:
        image = annotation.image
        if image not in rows:
            continue
        empty[image] = empty[image] and min(annotation.bbox[2:]) <= 1
        if annotation.crowd:
            crowds[image] += 1
        else:
            rows[image].append((*annotation.bbox, label_of[annotation.category]))
    result = {}
    for key, image_rows in rows.items():
        table = np.array(image_rows, np.float64).reshape(-1, 5)
        result[key] = ImageBoxes(table[:, :4], table[:, 4].astype(np.int32), crowds[key], empty[key])
    return result


def clip_boxes(images: Mapping[Any, ImageBoxes], sizes: Mapping[Any, tuple[int, int]]) -> Clipped:
    """Clips the boxes to their images, drops those without an area, and counts.

    Args:
        images: boxes by key of the image.
        sizes: (rows, columns) by key.

    Returns:
        The boxes that are left.
    """
    boxes, labels = {}, {}
    report = {"crowd": 0, "no_area": 0, "outside": 0, "clipped": 0, "tiny": 0, "doubled": 0}
    for key, image in images.items():
        corners = image.corners
        limits = np.array(sizes[key][::-1] * 2, np.float32)  # columns, rows, columns, rows
        clipped = np.clip(corners, 0, limits)
        area, inside = ((each[:, 2:] > each[:, :2]).all(axis=1) for each in (corners, clipped))
        boxes[key], labels[key] = clipped[inside], image.labels[inside]
        report["crowd"] += image.crowds
        report["no_area"] += int((~area).sum())
        report["outside"] += int((area & ~inside).sum())
        report["clipped"] += int((clipped != corners).any(axis=1)[inside].sum())
        report["tiny"] += int(((clipped[:, 2:] - clipped[:, :2])[inside].min(axis=1, initial=np.inf) <= 1).sum())
        rows = np.column_stack([image.xywh, image.labels])[inside].tolist()
        report["doubled"] += len(rows) - len(set(map(tuple, rows)))
    return Clipped(boxes, labels, report)
