"""COCO's JSON as real files have it: images, boxes and labels, with counts of everything that is dropped."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from flaxdet.data.coco_json import (
    by_id,
    category_labels,
    category_names,
    check_files,
    file_name,
    image_size,
    integer,
    load_json,
    short,
)
from flaxdet.images.decode import ImageError, read_image

_MAX_COORDINATE = 1e9  # pixels: boxes beyond it lose all precision in float32


class Record(NamedTuple):
    """One image of a data set, without its pixels.

    Attributes:
        image_id: id of the image in the COCO file.
        path: the image file.
        size: (rows, columns) of the pixels as they are stored.
        boxes: [N, 4] float32 xyxy in pixels as they are stored, inside the image, each with an area; N may be 0.
        labels: [N] int32.
    """

    image_id: int
    path: Path
    size: tuple[int, int]
    boxes: Float[np.ndarray, "N 4"]
    labels: Int[np.ndarray, " N"]


class CocoDataset:
    """The images of a COCO file in the order of their ids; ``read_coco`` builds it.

    Consists of a few arrays, so that a data set of 100,000 images is sent to a worker process in an instant.

    Attributes:
        images: the folder of the images.
        annotations: the JSON file.
        categories: the category name of each label.
        category_ids: the file's category id of each label that the file has.
        report: counts. "images" and "boxes": in this data set. "removed_images": removed by ``remove_empty``. "crowd",
            "no_area" and "outside" (of the image): boxes that were dropped. "clipped": boxes that reached out of the
            image, and were clipped.
    """

    def __init__(
        self,
        *,
        images: Path,
        annotations: Path,
        ids: Sequence[int],
        names: Sequence[str],
        sizes: np.ndarray,
        boxes: Sequence[np.ndarray],
        labels: Sequence[np.ndarray],
        categories: list[str],
        category_ids: dict[int, int],
        report: dict[str, int],
    ):
        self.images, self.annotations = images, annotations
        self.categories, self.category_ids, self.report = categories, category_ids, report
        self._ids, self._names, self._sizes = list(ids), list(names), sizes
        self._ends = np.cumsum([0, *(len(image_boxes) for image_boxes in boxes)])
        self._boxes = np.concatenate([np.zeros((0, 4), np.float32), *boxes])
        self._labels = np.concatenate([np.zeros(0, np.int32), *labels])

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, i: int) -> Record:
        i = range(len(self))[i]
        rows_of_image = slice(self._ends[i], self._ends[i + 1])
        boxes, labels = self._boxes[rows_of_image].copy(), self._labels[rows_of_image].copy()
        rows, columns = self._sizes[i].tolist()
        return Record(self._ids[i], self.images / self._names[i], (rows, columns), boxes, labels)

    def read_image(self, i: int) -> UInt8[np.ndarray, "H W 3"]:
        """The pixels of an image as they are stored: the EXIF orientation is not applied, since boxes refer to these.

        Args:
            i: index of the image in the data set.

        Returns:
            [H, W, 3] RGB.

        Raises:
            ImageError: if the file is broken, or the annotations state another size.
        """
        record = self[i]
        image = read_image(record.path, upright=False)
        size = image.shape[:2]
        if size != record.size:
            turned = " (is it a photo that was turned when its boxes were drawn?)" if size == record.size[::-1] else ""
            raise ImageError(
                f"{record.path}: is {size[0]}x{size[1]} pixels (rows x columns), but {self.annotations} "
                f"says {record.size[0]}x{record.size[1]}{turned}"
            )
        return image


def read_coco(
    images: str | os.PathLike[str],
    annotations: str | os.PathLike[str],
    *,
    categories: Sequence[str] | None = None,
    num_classes: int | None = None,
    remove_empty: bool = False,
) -> CocoDataset:
    """Reads a data set in COCO's format.

    Reproduces ConvertCocoPolysToMask of torchvision's references/detection/coco_utils.py: crowds are dropped, boxes
    are clipped to the image, and boxes without an area are dropped. Images are in the order of their ids.

    The label of a category is the index of its name in ``categories``, if given. Otherwise, with ``num_classes``, it is
    the category's id, as in torchvision's models. Otherwise labels are 1, 2, ... in the order of the ids, without gaps.
    Categories that no annotation uses need no label.

    Args:
        images: the folder that the images' ``file_name`` are relative to.
        annotations: the JSON file. ``annotations``, ``iscrowd``, ``area`` and ``segmentation`` may be missing, as
            may the images' ``width`` and ``height`` (which are then read from the image files).
        categories: the name of each label, "__background__" first, as weight enums and checkpoints hold them.
        num_classes: number of classes, background included, of a model whose labels are category ids.
        remove_empty: for training: leave out images without annotations, and images whose boxes all have a side of at
            most one pixel. Reproduces _coco_remove_images_without_annotations in the same file; crowds count as
            annotations.

    Returns:
        The images, without their pixels, and their boxes.

    Raises:
        ValueError: in one line that names the file and the faulty entry, if the file can't be read, is not JSON or not
            COCO's; for ids that occur twice or refer to nothing, boxes that are not 4 finite numbers, category names
            that occur twice, categories that ``categories`` or ``num_classes`` don't include, image files that are
            missing (all are looked for), and if there is no image, or with ``remove_empty`` no box.
        ImageError: if the annotations don't state the size of an image, and the image file can't be read.
    """
    folder, path = Path(images), Path(annotations)
    content = load_json(path)
    entries = sorted(by_id(path, "image", content["images"]).items())
    annotated = by_id(path, "annotation", content["annotations"])
    known = by_id(path, "category", content["categories"])
    if not entries:
        raise ValueError(f"{path}: has no images")

    used = {integer(annotation.get("category_id")) for annotation in annotated.values()}
    names = category_names(path, known, used)
    names_by_label, label_of = category_labels(path, names, used, categories, num_classes)
    file_names = [file_name(path, key, entry) for key, entry in entries]
    check_files(path, folder, file_names)
    sizes = {
        key: image_size(path, key, entry, folder / name) for (key, entry), name in zip(entries, file_names, strict=True)
    }
    boxes, labels, empty, report = _boxes(path, annotated, sizes, known, label_of)

    files = list(zip((key for key, _ in entries), file_names, strict=True))
    if remove_empty:
        files = [(key, name) for key, name in files if not empty[key]]
    counts = {"images": len(files), "boxes": sum(len(boxes[key]) for key, _ in files)}
    if remove_empty and not counts["boxes"]:
        raise ValueError(f"{path}: nothing to train on, none of its {len(entries)} images has a box that counts")
    return CocoDataset(
        images=folder,
        annotations=path,
        ids=[key for key, _ in files],
        names=[name for _, name in files],
        sizes=np.array([sizes[key] for key, _ in files], np.int32),
        boxes=[boxes[key] for key, _ in files],
        labels=[labels[key] for key, _ in files],
        categories=names_by_label,
        category_ids={label: key for key, label in label_of.items()},
        report={**counts, "removed_images": len(entries) - len(files), **report},
    )


def _boxes(
    path: Path,
    annotated: Mapping[int, Mapping[str, Any]],
    sizes: Mapping[int, tuple[int, int]],
    known: Mapping[int, Any],
    label_of: Mapping[int, int],
) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray], dict[int, bool], dict[str, int]]:
    """Boxes, labels and emptiness (as ``remove_empty`` defines it) by image id, and the counts of dropped boxes."""
    empty, rows = dict.fromkeys(sizes, True), {key: [] for key in sizes}
    report = {"crowd": 0, "no_area": 0, "outside": 0, "clipped": 0}
    for key, annotation in annotated.items():
        image, category = integer(annotation.get("image_id")), integer(annotation.get("category_id"))
        for what, reference, expected in (("image", image, sizes), ("category", category, known)):
            if reference not in expected:
                stated = short(annotation.get(f"{what}_id"))
                raise ValueError(f"{path}: annotation {key} refers to {what} {stated}, which the file doesn't have")
        assert image is not None
        assert category is not None
        bbox = annotation.get("bbox")
        if not (
            isinstance(bbox, list)
            and len(bbox) == 4
            and all(type(value) in (int, float) and abs(value) < _MAX_COORDINATE for value in bbox)
        ):
            raise ValueError(f"{path}: bbox of annotation {key} should be 4 finite numbers, found {short(bbox)}")
        empty[image] = empty[image] and min(bbox[2:]) <= 1
        if annotation.get("iscrowd"):
            report["crowd"] += 1
        else:
            rows[image].append((*bbox, label_of[category]))

    boxes, labels = {}, {}
    for image, image_rows in rows.items():
        table = np.array(image_rows, np.float64).reshape(-1, 5)
        raw = table[:, :4].astype(np.float32)
        raw[:, 2:] += raw[:, :2]
        limits = np.array(sizes[image][::-1] * 2, np.float32)  # columns, rows, columns, rows
        clipped = np.clip(raw, 0, limits)
        area, inside = ((corners[:, 2:] > corners[:, :2]).all(axis=1) for corners in (raw, clipped))
        report["no_area"] += int((~area).sum())
        report["outside"] += int((area & ~inside).sum())
        report["clipped"] += int((clipped != raw).any(axis=1)[inside].sum())
        boxes[image], labels[image] = clipped[inside], table[inside, 4].astype(np.int32)
    return boxes, labels, empty, report
