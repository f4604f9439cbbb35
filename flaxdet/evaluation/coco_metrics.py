"""COCO's average precision and recall of any detector's results, by pycocotools."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flaxdet.data.coco_json import read_box, read_content, read_json
from flaxdet.data.coco_values import Id, identifier, number, short

# The figures in the order of pycocotools' summary.
_SUMMARY = (
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"),
)
_ROW = 'expected {"image_id": ..., "category_id": ..., "bbox": [x, y, width, height], "score": ...}'


@dataclass(frozen=True)
class ClassResult:
    """One category's average precision; ``None`` if the images have no box of the category.

    Attributes:
        name: name of the category.
        category_id: id of the category in the annotations.
        boxes: number of ground-truth boxes, without crowds.
        ap: average precision, mean over IoU thresholds from .5 to .95.
        ap50: average precision at an IoU of .5.
        ap75: average precision at an IoU of .75.
    """

    name: str
    category_id: int
    boxes: int
    ap: float | None
    ap50: float | None
    ap75: float | None


@dataclass(frozen=True)
class CocoResult:
    """COCO's twelve figures, each in [0, 1], and the figures of every category.

    A figure is ``None`` if there is no ground-truth box for it, so that it is undefined (-1 in pycocotools).

    Attributes:
        ap: average precision, mean over IoU thresholds from .5 to .95 and over categories.
        ap50: average precision at an IoU of .5.
        ap75: average precision at an IoU of .75.
        ap_small: average precision of small boxes, with an area below 32² pixels.
        ap_medium: average precision of medium boxes, with an area from 32² to 96² pixels.
        ap_large: average precision of large boxes, with an area above 96² pixels.
        ar1: average recall with one detection per image and category.
        ar10: average recall with 10 detections per image and category.
        ar100: average recall with 100 detections per image and category.
        ar_small: average recall of small boxes, with 100 detections.
        ar_medium: average recall of medium boxes, with 100 detections.
        ar_large: average recall of large boxes, with 100 detections.
        images: number of images evaluated.
        boxes: number of ground-truth boxes, without crowds.
        detections: number of rows evaluated.
        per_class: every category, in the order of ids.
    """

    ap: float | None
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    ar1: float | None
    ar10: float | None
    ar100: float | None
    ar_small: float | None
    ar_medium: float | None
    ar_large: float | None
    images: int
    boxes: int
    detections: int
    per_class: tuple[ClassResult, ...]

    def table(self) -> str:
        """All figures as aligned text."""
        summary = [
            ["", "AP", "AP50", "AP75", "small", "medium", "large"],
            ["average precision", *map(_shown, (getattr(self, name) for name in _SUMMARY[:6]))],
            ["", "1", "10", "100", "small", "medium", "large"],
            ["average recall", *map(_shown, (getattr(self, name) for name in _SUMMARY[6:]))],
        ]
        classes = [["class", "boxes", "AP", "AP50", "AP75"]]
        classes += [[c.name, str(c.boxes), *map(_shown, (c.ap, c.ap50, c.ap75))] for c in self.per_class]
        counts = f"{self.images} images, {self.boxes} boxes, {self.detections} detections"
        return "\n".join((counts, "", *_aligned(summary), "", *_aligned(classes)))

    def to_dict(self) -> dict[str, Any]:
        """All figures under the names of the attributes, ready for JSON."""
        return {**dataclasses.asdict(self), "per_class": [dataclasses.asdict(row) for row in self.per_class]}

    def to_json(self) -> str:
        """``to_dict`` as JSON text, with ``null`` for a figure that is undefined."""
        return json.dumps(self.to_dict(), indent=1)

    def scalars(self) -> dict[str, float]:
        """The main figures under the names that papers use, for logs; undefined figures are left out."""
        names = {"AP": self.ap, "AP50": self.ap50, "AP75": self.ap75, "AR100": self.ar100}
        return {name: value for name, value in names.items() if value is not None}


def evaluate_results(
    results: Sequence[Mapping[str, Any]] | str | os.PathLike[str],
    annotations: Mapping[str, Any] | str | os.PathLike[str],
    *,
    image_ids: Iterable[Any] | None = None,
) -> CocoResult:
    """COCO's figures of any detector's results, computed by pycocotools.

    All annotations count, even boxes without an area (which no detection can match). A missing ``area`` is computed
    from the box, and a missing ``iscrowd`` is 0. Ids of annotations are ignored, so that duplicates or an id of 0 do no
    harm. As always with COCO, only the best 100 rows of each image and category count.

    Args:
        results: rows {"image_id", "category_id", "bbox": [x, y, width, height], "score"} in pixels of the image, or a
            JSON file with these rows (COCO's format of results).
        annotations: the content of a COCO annotation file, or the file. Ids of images may be strings, as for
            pycocotools; a string such as "12" is the same id as 12.
        image_ids: the images to evaluate; default all of ``annotations``.

    Returns:
        The figures.

    Raises:
        ValueError: for files that can't be read or are not in COCO's format (annotations are checked as by
            ``read_coco``), or rows of an image or a category that the annotations don't have.
        ImportError: if pycocotools is not installed.
    """
    require_pycocotools()
    truth = read_annotations(annotations)
    known: list[Id] = [image["id"] for image in truth["images"]]
    chosen = known if image_ids is None else [identifier(key) for key in image_ids]
    if not chosen:
        raise ValueError("expected at least one image to evaluate, got none")
    if strange := set(chosen) - set(known):
        raise ValueError(f"image_ids: expected ids of the annotations, found {short(sorted(strange, key=str))}")
    evaluated = set(known).intersection(chosen)
    return _pycocotools(
        truth, [row for row in _checked_rows(results, truth) if row["image_id"] in evaluated], evaluated
    )


def require_pycocotools() -> None:
    """Raises ImportError, with a message that says what to install, if pycocotools is not installed."""
    try:
        import pycocotools.cocoeval  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "COCO's average precision needs pycocotools: pip install 'flaxdet[train]', or pip install pycocotools"
        ) from error


def read_annotations(annotations: Mapping[str, Any] | str | os.PathLike[str]) -> dict[str, Any]:
    """COCO annotations with every field that pycocotools needs; the argument is not changed.

    Args:
        annotations: the content of a COCO annotation file, or the file.

    Returns:
        {"images", "annotations", "categories"}; annotations renumbered from 1, each with ``area`` and ``iscrowd``.

    Raises:
        ValueError: as ``read_coco``, if the file can't be read, or is not in COCO's format.
    """
    content = read_content(annotations, text_ids=True)
    rows = []
    for i, row in enumerate(content.annotations):
        ids = {"id": i + 1, "image_id": row.image, "category_id": row.category}
        area = row.bbox[2] * row.bbox[3] if row.area is None else row.area
        # pycocotools marks a matched box by its id, and so takes a box with the id 0 for unmatched
        rows.append({**ids, "bbox": list(row.bbox), "area": area, "iscrowd": int(row.crowd)})
    return {
        "images": [{"id": key} for key in content.images],
        "annotations": rows,
        "categories": [
            {"id": key, "name": str(category.get("name") or key)} for key, category in content.categories.items()
        ],
    }


def _checked_rows(results: Any, truth: dict[str, Any]) -> list[dict[str, Any]]:
    """A checked copy of the rows, with the keys that pycocotools' loadRes would add."""
    content, source = results, "results"
    if isinstance(results, (str, os.PathLike)):
        content, source = read_json(Path(results), "COCO results"), str(results)
    if not isinstance(content, Sequence) or isinstance(content, str):
        raise ValueError(f"{source}: expected a list of results, {_ROW}; found a {type(content).__name__}")
    known: dict[str, set[Any]] = {
        "image_id": {image["id"] for image in truth["images"]},
        "category_id": {category["id"] for category in truth["categories"]},
    }
    rows = []
    for i, row in enumerate(content):
        box = read_box(row.get("bbox")) if isinstance(row, Mapping) else None
        score = number(row.get("score")) if isinstance(row, Mapping) else None
        if box is None or score is None:
            raise ValueError(f"{source}: result {i}: {_ROW}, all numbers finite; found {short(row)}")
        ids = {key: identifier(row.get(key)) for key in known}
        for key, allowed in known.items():
            if ids[key] is None or ids[key] not in allowed:
                raise ValueError(f"{source}: result {i}: {key} {row.get(key)!r} is not in the annotations")
        x, y, width, height = map(float, box)
        result = {**ids, "score": float(score), "id": i + 1, "bbox": [x, y, width, height]}
        rows.append({**result, "area": width * height, "iscrowd": 0})
    return rows


def _pycocotools(truth: dict[str, Any], rows: list[dict[str, Any]], image_ids: set[Id]) -> CocoResult:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    # pycocotools sorts ids by numpy, which makes strings of numbers where there are both
    ids: list[Id] = [image["id"] for image in truth["images"]]
    text = any(isinstance(key, str) for key in ids)
    place = {key: i for i, key in enumerate(sorted(ids, key=str if text else None))}

    def indexed(annotations: list[dict[str, Any]]) -> COCO:
        coco = COCO()  # not loadRes, which fails on an empty list of results
        numbered = [{**row, "image_id": place[row["image_id"]]} for row in annotations]
        # without some fields that pycocotools' type demands
        content: Any = {**truth, "images": [{"id": i} for i in place.values()], "annotations": numbered}
        coco.dataset = content
        coco.createIndex()
        return coco

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        evaluation = COCOeval(indexed(truth["annotations"]), indexed(rows), "bbox")
        evaluation.params.imgIds = sorted(place[key] for key in image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # [IoU, recall, category], all areas, 100 detections
    names = {category["id"]: category["name"] for category in truth["categories"]}
    boxes = [row for row in truth["annotations"] if row["image_id"] in image_ids and not row["iscrowd"]]
    counts = Counter(row["category_id"] for row in boxes)
    per_class = []
    for k, category_id in enumerate(evaluation.params.catIds):
        of_class = precision[:, :, k]
        figures = (_mean(part) for part in (of_class, of_class[:1], of_class[5:6]))  # thresholds are .5, .55 .. .95
        per_class.append(ClassResult(names[category_id], int(category_id), counts[category_id], *figures))
    stats = (None if value < 0 else float(value) for value in evaluation.stats)
    return CocoResult(
        **dict(zip(_SUMMARY, stats, strict=True)),
        images=len(image_ids),
        boxes=sum(row.boxes for row in per_class),
        detections=len(rows),
        per_class=tuple(per_class),
    )


def _mean(precision: Any) -> float | None:
    defined = precision[precision > -1]
    return float(defined.mean()) if defined.size else None


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _aligned(rows: list[list[str]]) -> list[str]:
    """Lines with aligned columns, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join((first.ljust(widths[0]), *cells)).rstrip())
    return lines
