"""COCO's JSON as real files have it: images, boxes and labels, with counts of everything that is dropped."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from flaxdet.data.coco_boxes import boxes_by_image, clip_boxes
from flaxdet.data.coco_json import category_labels, category_names, file_name, read_content, stated_size
from flaxdet.data.orientation import frames, wrong_sizes
from flaxdet.data.photos import counted_errors, look_at_photos
from flaxdet.data.summary import Summary, describe, nothing_to_train_on, suspicions, unused_classes
from flaxdet.images.decode import ImageError, PixelRange, check_pixel_options, decode


class DatasetWarning(UserWarning):
    """A data set probably has another meaning than the user thinks; the message says why."""


class Record(NamedTuple):
    """One image of a data set, without its pixels.

    Attributes:
        image_id: id of the image in the COCO file.
        path: the image file.
        size: (rows, columns) of the upright image, or of the pixels as they are stored (``upright=False``).
        boxes: [N, 4] float32 xyxy in pixels of that image, inside the image, each with an area; N may be 0.
        labels: [N] int32.
    """

    image_id: int
    path: Path
    size: tuple[int, int]
    boxes: Float[np.ndarray, "N 4"]
    labels: Int[np.ndarray, " N"]


@dataclass(frozen=True)
class Reading:
    """How the photos of a data set are read.

    Attributes:
        upright: apply the EXIF orientation.
        pixel_range: as for ``read_image``.
        max_pixels: as for ``read_image``.
    """

    upright: bool = True
    pixel_range: PixelRange | None = None
    max_pixels: int | None = None


class CocoDataset:
    """The images of a COCO file in the order of their ids; ``read_coco`` builds it.

    Consists of a few arrays, so that a data set of 100,000 images is sent to a worker process in an instant.

    Attributes:
        images: the folder of the images.
        annotations: the JSON file.
        categories: the category name of each label.
        category_ids: the file's category id of each label that the file has.
        reading: how photos are read.
        report: counts. "images" and "boxes": in this data set. "removed_images": removed by ``remove_empty``.
            "skipped_images": removed by ``skip_broken``. "crowd", "no_area" and "outside" (of the image): boxes that
            were dropped. "clipped": boxes that reached out of the image, and were clipped. "tiny": boxes with a side of
            at most one pixel. "doubled": boxes that repeat the box and category of another one of their image.
            "repeated_ids": annotations whose id another one has. "repeated_files": images with the file of another one.
            "oriented": photos with an EXIF orientation.
        summary: counts and probable faults, to read before a run: ``print(dataset.summary)``.
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
        reading: Reading,
        summary: Summary,
    ):
        self.images, self.annotations = images, annotations
        self.categories, self.category_ids, self.report = categories, category_ids, report
        self.reading, self.summary = reading, summary
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
        """The pixels of an image, upright unless the data set was read with ``upright=False``.

        Args:
            i: index of the image in the data set.

        Returns:
            [H, W, 3] RGB, of the record's size.

        Raises:
            ImageError: if the file is broken, or has changed since the data set was read.
        """
        record, reading = self[i], self.reading
        image = decode(
            record.path, upright=reading.upright, pixel_range=reading.pixel_range, max_pixels=reading.max_pixels
        ).pixels
        size = image.shape[:2]
        if size != record.size:
            raise ImageError(
                f"{record.path}: is {size[0]}x{size[1]} pixels (rows x columns), but was "
                f"{record.size[0]}x{record.size[1]} when {self.annotations} was read"
            )
        return image


def read_coco(
    images: str | os.PathLike[str],
    annotations: str | os.PathLike[str],
    *,
    categories: Sequence[str] | None = None,
    num_classes: int | None = None,
    remove_empty: bool = False,
    upright: bool | None = None,
    skip_broken: bool = False,
    drop_unused: bool = False,
    pixel_range: PixelRange | None = None,
    max_pixels: int | None = None,
) -> CocoDataset:
    """Reads a data set in COCO's format, and the headers of all photos.

    Reproduces ConvertCocoPolysToMask of torchvision's references/detection/coco_utils.py: crowds are dropped, boxes
    are clipped to the image, and boxes without an area are dropped. Images are in the order of their ids.

    The label of a category is the index of its name in ``categories``, if given. Otherwise, with ``num_classes``, it is
    the category's id, as in torchvision's models. Otherwise labels are 1, 2, ... in the order of the ids, without gaps.
    Categories that no annotation uses need no label.

    Numbers may be written as strings: ``"iscrowd": "0"`` is 0.

    Args:
        images: the folder that the images' ``file_name`` are relative to.
        annotations: the JSON file. ``annotations``, ``iscrowd``, ``area`` and ``segmentation`` may be missing, as
            may the images' ``width`` and ``height`` (0 and -1 stand for unknown too).
        categories: the name of each label, "__background__" first, as weight enums and checkpoints hold them.
        num_classes: number of classes, background included, of a model whose labels are category ids.
        remove_empty: for training: leave out images without annotations, and images whose boxes all have a side of at
            most one pixel. Reproduces _coco_remove_images_without_annotations in the same file; crowds count as
            annotations.
        upright: photos with an EXIF orientation are taken upright, and boxes refer to the upright photo, whichever of
            the two sizes the file states. False: photos and boxes are taken as stored, as torchvision does. True:
            upright, even if boxes leave the upright photo and fit the stored one, which otherwise is an error.
        skip_broken: leave out photos that are missing, can't be read, or have another size than stated. ``summary``
            lists them. Every photo is decoded once. Otherwise such photos are an error.
        drop_unused: categories that no annotation uses are no classes. Not with ``categories`` or ``num_classes``.
        pixel_range: of grey images of 16 or 32 bits, as for ``read_image``.
        max_pixels: as for ``read_image``.

    Returns:
        The images, without their pixels, and their boxes.

    Raises:
        ValueError: in one line that names the file and the faulty entry, if the file can't be read, is not JSON or not
            COCO's; for ids that occur twice or refer to nothing, boxes that are not 4 finite numbers, category names
            that occur twice, categories that ``categories`` or ``num_classes`` don't include, image files that are
            missing (all are looked for), and if there is no image, or with ``remove_empty`` no box.
        ImageError: if photos can't be read as far as their headers and lengths tell, have another size than the
            annotations state, or boxes contradict the orientation.

    Warns:
        DatasetWarning: once for each of ``summary.warnings``.
    """
    check_pixel_options(pixel_range, max_pixels)
    if drop_unused and not (categories is None and num_classes is None):
        raise ValueError("drop_unused changes the labels: expected it without categories and num_classes")
    folder, path = Path(images), Path(annotations)
    source = str(path)
    content = read_content(path, text_ids=False)
    used = {annotation.category for annotation in content.annotations}
    every_name = category_names(source, content.categories, used)
    unused = [name for key, name in every_name.items() if used and key not in used]
    label_names = {key: name for key, name in every_name.items() if key in used or not drop_unused}
    names_by_label, label_of = category_labels(source, label_names, used, categories, num_classes)

    entries: dict[Any, Any] = dict(sorted(content.images.items()))
    names = {key: file_name(source, key, entry) for key, entry in entries.items()}
    stated = {key: stated_size(source, key, entry) for key, entry in entries.items()}
    photos = look_at_photos(
        source, folder, names, pixel_range=pixel_range, max_pixels=max_pixels, skip_broken=skip_broken
    )
    wrong = wrong_sizes(source, folder, names, photos.headers, stated)
    headers = {key: header for key, header in photos.headers.items() if key not in wrong}
    skipped = photos.broken | wrong
    if wrong and (not skip_broken or not headers):
        raise ImageError(f"{path}: {counted_errors(list(skipped.values()), len(names), skip_broken)}")

    images_boxes = boxes_by_image(content.annotations, headers, label_of)
    corners = {key: image.corners for key, image in images_boxes.items()}
    taken = frames(source, names, headers, stated, corners, upright)
    clipped = clip_boxes(images_boxes, taken.sizes)

    kept = [key for key in headers if not (remove_empty and images_boxes[key].empty)]
    report = {
        "images": len(kept),
        "boxes": sum(len(clipped.boxes[key]) for key in kept),
        "removed_images": len(headers) - len(kept),
        "skipped_images": len(skipped),
        **clipped.report,
        "repeated_ids": content.repeated_ids,
        "repeated_files": len(names) - len(set(names.values())),
        "oriented": taken.oriented,
    }
    if remove_empty and not report["boxes"]:
        raise ValueError(nothing_to_train_on(source, len(entries), images_boxes, taken.sizes))
    per_label = np.bincount(np.concatenate([np.zeros(0, np.int32), *(clipped.labels[key] for key in kept)]))
    counts = dict.fromkeys((names_by_label[label] for label in sorted(label_of.values())), 0)
    counts |= {names_by_label[label]: int(count) for label, count in enumerate(per_label) if count}
    new_classes = categories is None and num_classes is None
    kept_unused = unused if new_classes and not drop_unused else []
    summary = Summary(
        lines=describe(report, counts, taken, upright, [] if kept_unused else unused, drop_unused),
        warnings=suspicions(images_boxes, taken, upright, photos.narrow),
        unused=unused_classes(kept_unused) if kept_unused else None,
        skipped=tuple(skipped.values()),
    )
    for text in summary.warnings:
        warnings.warn(f"{path}: {text}", DatasetWarning, stacklevel=2)
    return CocoDataset(
        images=folder,
        annotations=path,
        ids=kept,
        names=[names[key] for key in kept],
        sizes=np.array([taken.sizes[key] for key in kept], np.int32).reshape(-1, 2),
        boxes=[clipped.boxes[key] for key in kept],
        labels=[clipped.labels[key] for key in kept],
        categories=names_by_label,
        category_ids={label: key for key, label in label_of.items()},
        report=report,
        reading=Reading(upright is not False, pixel_range, max_pixels),
        summary=summary,
    )
