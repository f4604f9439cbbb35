"""COCO's average precision and recall of any detector's results, by pycocotools."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from flaxdet.data.coco_json import load_json, read_json

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
        annotations: the content of a COCO annotation file, or the file.
        image_ids: the images to evaluate; default all of ``annotations``.

    Returns:
        The figures.

    Raises:
        ValueError: for files that can't be read or are not in COCO's format, or rows of an image or a category that
            the annotations don't have.
        ImportError: if pycocotools is not installed.
    """
    require_pycocotools()
    truth = read_annotations(annotations)
    known = {image["id"] for image in truth["images"]}
    chosen = known if image_ids is None else set(image_ids)
    if not chosen:
        raise ValueError("expected at least one image to evaluate, got none")
    if not chosen <= known:
        raise ValueError(f"image_ids: expected ids of the annotations, found {_short(sorted(chosen - known))}")
    rows = _checked_rows(results, truth, known)
    rows = [row for row in rows if row["image_id"] in chosen]
    return _pycocotools(truth, rows, chosen)


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
        ValueError: if the file can't be read, or is not in COCO's format.
    """
    content, source = annotations, "annotations"
    if isinstance(content, (str, os.PathLike)):
        content, source = load_json(Path(content)), str(content)
    if not isinstance(content, Mapping) or not {"images", "categories"} <= content.keys():
        fault = f"keys {_short(sorted(content))}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise ValueError(f"{source}: expected COCO's lists of images, annotations and categories, found {fault}")
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, keys in (("images", ["id"]), ("annotations", ["image_id", "category_id"]), ("categories", ["id"])):
        rows[name] = []
        for i, row in enumerate(content.get(name) or ()):
            if not isinstance(row, Mapping) or not all(isinstance(row.get(key), Real) for key in keys):
                raise ValueError(f"{source}: {name}[{i}] should have numbers {' and '.join(keys)}, found {_short(row)}")
            rows[name].append(dict(row))
    for i, row in enumerate(rows["annotations"]):
        if not _is_box(row.get("bbox")):
            raise ValueError(f"{source}: annotations[{i}]: bbox should be 4 finite numbers, found {_short(row)}")
        area = row.get("area")
        # pycocotools marks a matched box by its id, and so takes a box with the id 0 for unmatched
        row["id"] = i + 1
        row["area"] = area if _is_number(area) else row["bbox"][2] * row["bbox"][3]
        row["iscrowd"] = int(bool(row.get("iscrowd")))
    return rows


def _checked_rows(results: Any, truth: dict[str, Any], images: set[Any]) -> list[dict[str, Any]]:
    """A checked copy of the rows, with the keys that pycocotools' loadRes would add."""
    content, source = results, "results"
    if isinstance(results, (str, os.PathLike)):
        content, source = read_json(Path(results), "COCO results"), str(results)
    if not isinstance(content, Sequence) or isinstance(content, str):
        raise ValueError(f"{source}: expected a list of results, {_ROW}; found a {type(content).__name__}")
    categories = {category["id"] for category in truth["categories"]}
    rows = []
    for i, row in enumerate(content):
        if not isinstance(row, Mapping) or not _is_box(row.get("bbox")) or not _is_number(row.get("score")):
            raise ValueError(f"{source}: result {i}: {_ROW}, all numbers finite; found {_short(row)}")
        for key, known in (("image_id", images), ("category_id", categories)):
            if not isinstance(row.get(key), Real) or row[key] not in known:
                raise ValueError(f"{source}: result {i}: {key} {row.get(key)!r} is not in the annotations")
        x, y, width, height = (float(value) for value in row["bbox"])
        result = {"image_id": row["image_id"], "category_id": row["category_id"], "score": float(row["score"])}
        rows.append({**result, "id": i + 1, "bbox": [x, y, width, height], "area": width * height, "iscrowd": 0})
    return rows


def _pycocotools(truth: dict[str, Any], rows: list[dict[str, Any]], image_ids: set[Any]) -> CocoResult:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def indexed(annotations: list[dict[str, Any]]) -> COCO:
        coco = COCO()  # not loadRes, which fails on an empty list of results
        content: Any = {**truth, "annotations": annotations}  # without some fields that pycocotools' type demands
        coco.dataset = content
        coco.createIndex()
        return coco

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        evaluation = COCOeval(indexed(truth["annotations"]), indexed(rows), "bbox")
        evaluation.params.imgIds = sorted(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # [IoU, recall, category], all areas, 100 detections
    names = {category["id"]: str(category.get("name", category["id"])) for category in truth["categories"]}
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


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_box(value: Any) -> bool:
    return isinstance(value, (Sequence, np.ndarray)) and len(value) == 4 and all(map(_is_number, value))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


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
