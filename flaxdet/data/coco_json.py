"""The parts of a COCO file, checked: every fault is a ValueError of one line that names the file and the entry.

``read_coco`` and ``evaluate_results`` read annotations by ``read_content``, so that they accept the same files. A
number may be written as a string (``"iscrowd": "0"``): one rule for every field, in ``coco_values``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flaxdet.data.coco_values import Id, identifier, integer, number, short

BACKGROUND = "__background__"
NO_CATEGORY = "N/A"  # torchvision's name for a label that no category has

_MAX_COORDINATE = 1e9  # pixels: boxes beyond it lose all precision in float32


class Annotation(NamedTuple):
    """One annotation, checked.

    Attributes:
        image: id of the image.
        category: id of the category.
        bbox: x, y, width and height in pixels, as the file has them.
        crowd: ``iscrowd``.
        area: ``area``; None if it is missing.
    """

    image: Id
    category: int
    bbox: tuple[float, float, float, float]
    crowd: bool
    area: float | None


class Content(NamedTuple):
    """The content of a COCO file, checked.

    Attributes:
        source: name of the file, for errors.
        images: entries by id, in the order of the file.
        annotations: in the order of the file.
        categories: entries by id, in the order of the file.
        repeated_ids: annotations whose id an earlier annotation has.
    """

    source: str
    images: dict[Id, Mapping[str, Any]]
    annotations: list[Annotation]
    categories: dict[int, Mapping[str, Any]]
    repeated_ids: int


def read_content(annotations: Any, *, text_ids: bool) -> Content:
    """Reads and checks COCO annotations.

    Args:
        annotations: the content of a COCO annotation file, or the file.
        text_ids: accept ids of images that are no integers, as pycocotools does.

    Returns:
        The content. Ids of annotations are not used, and may be missing or repeated.

    Raises:
        ValueError: if the file can't be read, is not JSON or not COCO's; names the entry and the field.
    """
    source, content = "annotations", annotations
    if isinstance(annotations, (str, os.PathLike)):
        source = str(annotations)
        content = read_json(Path(annotations), "a COCO JSON file")
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise ValueError(f"{source}: is not COCO's JSON: expected an object of lists, found a {kind}")
    lists: dict[str, Sequence[Any]] = {}
    for key in ("images", "annotations", "categories"):
        value = content.get(key)
        if key == "annotations" and value is None:
            value = []  # files of images to predict have none
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ValueError(f'{source}: is not COCO\'s JSON: expected a list "{key}", found {short(value)}')
        lists[key] = value
    images = _by_id(source, "image", lists["images"], text_ids)
    if not images:
        raise ValueError(f"{source}: has no images")
    categories: dict[Any, Any] = _by_id(source, "category", lists["categories"], False)
    ids: set[Any] = set()
    rows, repeated = [], 0
    for place, entry in enumerate(lists["annotations"]):
        rows.append(_annotation(source, place, entry, images, categories))
        key = entry.get("id")
        if isinstance(key, (int, str)):
            repeated += key in ids
            ids.add(key)
    return Content(source, images, rows, categories, repeated)


def read_json(path: Path, expected: str) -> Any:
    """The content of a JSON file; ``expected`` says in the error what the file should be."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}), expected {expected}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON ({error})") from error


def _by_id(source: str, what: str, entries: Sequence[Any], text_ids: bool) -> dict[Id, Mapping[str, Any]]:
    """Entries by id; raises ValueError for an id that is none or occurs twice."""
    result: dict[Id, Mapping[str, Any]] = {}
    for place, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            raise ValueError(f"{source}: {what} number {place} (from 0) should be an object, found {short(entry)}")
        key = identifier(entry.get("id"))
        if key is None or (isinstance(key, str) and not text_ids):
            raise ValueError(
                f"{source}: {what} number {place} (from 0) should have an integer id, found {short(entry.get('id'))}"
            )
        if key in result:
            raise ValueError(f"{source}: {what} id {key} occurs twice")
        result[key] = entry
    return result


def _annotation(
    source: str, place: int, entry: Any, images: Mapping[Id, Any], categories: Mapping[Any, Any]
) -> Annotation:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{source}: annotation number {place} (from 0) should be an object, found {short(entry)}")
    name = f"number {place} (from 0)" if entry.get("id") is None else short(entry["id"])
    references = []
    for what, expected in (("image", images), ("category", categories)):
        reference = identifier(entry.get(f"{what}_id"))
        if reference is None or reference not in expected:
            stated = short(entry.get(f"{what}_id"))
            raise ValueError(f"{source}: annotation {name} refers to {what} {stated}, which the file doesn't have")
        references.append(reference)
    bbox = read_box(entry.get("bbox"))
    if bbox is None:
        found = short(entry.get("bbox"))
        raise ValueError(f"{source}: bbox of annotation {name} should be 4 finite numbers, found {found}")
    crowd, area = entry.get("iscrowd"), entry.get("area")
    is_crowd = 0 if crowd is None else int(crowd) if isinstance(crowd, (bool, np.bool_)) else number(crowd)
    if is_crowd not in (0, 1):
        raise ValueError(f"{source}: iscrowd of annotation {name} should be 0 or 1, found {short(crowd)}")
    size = number(area)
    if size is None and not (area is None or (isinstance(area, float) and np.isnan(area))):
        raise ValueError(f"{source}: area of annotation {name} should be a number, found {short(area)}")
    return Annotation(references[0], references[1], bbox, bool(is_crowd), size)


def read_box(value: Any) -> tuple[float, float, float, float] | None:
    """Four finite numbers, or None."""
    if not isinstance(value, (list, tuple, np.ndarray)) or len(value) != 4:
        return None
    numbers = [each for each in map(number, value) if each is not None and abs(each) < _MAX_COORDINATE]
    if len(numbers) != 4:
        return None
    x, y, width, height = numbers
    return x, y, width, height


def stated_size(source: str, key: Id, entry: Mapping[str, Any]) -> tuple[int, int] | None:
    """(rows, columns) that an image's entry states; None if it states none: missing, 0 or -1, as VIA writes."""
    stated = entry.get("height"), entry.get("width")
    sides = [integer(side) for side in stated]
    unknown = [side is None or value in (0, -1) for side, value in zip(stated, sides, strict=True)]
    if any(value is None or value < -1 for value, skip in zip(sides, unknown, strict=True) if not skip):
        raise ValueError(
            f"{source}: image {key} should have a positive integer width and height, found {short(stated[1])} "
            f"and {short(stated[0])}"
        )
    rows, columns = sides
    return None if any(unknown) or rows is None or columns is None else (rows, columns)


def file_name(source: str, key: Id, entry: Mapping[str, Any]) -> str:
    """An image's ``file_name``."""
    name = entry.get("file_name")
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"{source}: image {key} should have a file_name, found {short(name)}")
    return name


def category_names(source: str, known: Mapping[int, Mapping[str, Any]], used: Collection[int]) -> dict[int, str]:
    """Names by category id, in the order of ids. Of the categories that share a name, only one may have annotations."""
    ids: dict[str, list[int]] = {}
    for key in sorted(known):
        name = known[key].get("name")
        if not isinstance(name, str) or not name:
            raise ValueError(f"{source}: category {key} should have a name, found {short(name)}")
        ids.setdefault(name, []).append(key)
    for name, keys in ids.items():
        with_boxes = [key for key in keys if key in used]
        if len(with_boxes) > 1 or (name == BACKGROUND and with_boxes):
            what = "is reserved for label 0" if name == BACKGROUND else f"is the name of categories {with_boxes}"
            raise ValueError(f'{source}: "{name}" {what}, expected a name of its own for each category')
        ids[name] = (with_boxes or keys)[:1]  # some tools write an unused category of the same name, the super-category
    ids.pop(BACKGROUND, None)
    return dict(sorted((keys[0], name) for name, keys in ids.items()))


def category_labels(
    source: str,
    names: Mapping[int, str],
    used: Collection[int],
    categories: Sequence[str] | None,
    num_classes: int | None,
) -> tuple[list[str], dict[int, int]]:
    """Names by label, and the label of each category id; ``read_coco`` describes the rules."""
    if categories is None and num_classes is None:
        return [BACKGROUND, *names.values()], {key: label for label, key in enumerate(names, 1)}
    if categories is None:
        assert num_classes is not None
        for key in names:
            if key in used and not 0 < key < num_classes:
                raise ValueError(
                    f'{source}: category id {key} ("{names[key]}") is no label of a model of {num_classes} classes: '
                    f"expected ids from 1 to {num_classes - 1}, or the names that its labels stand for"
                )
        label_of = {key: key for key in names if 0 < key < num_classes}
        return [BACKGROUND, *(names.get(label, NO_CATEGORY) for label in range(1, num_classes))], label_of
    if num_classes is not None and num_classes != len(categories):
        raise ValueError(f"expected as many categories as num_classes={num_classes}, got {len(categories)}")
    for key, name in names.items():
        if key in used and list(categories).count(name) != 1:
            fault = "occurs twice among" if name in categories else "is not one of"
            listed = ", ".join(other for other in categories if other not in (BACKGROUND, NO_CATEGORY))
            raise ValueError(f'{source}: category {key} "{name}" {fault} the names of the labels ({listed})')
    return list(categories), {key: list(categories).index(name) for key, name in names.items() if name in categories}
