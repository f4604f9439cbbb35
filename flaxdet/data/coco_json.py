"""The parts of a COCO file, checked: every fault is a ValueError of one line that names the file and the entry."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from flaxdet.images.decode import read_image

BACKGROUND = "__background__"
NO_CATEGORY = "N/A"  # torchvision's name for a label that no category has

_MAX_NAMED = 3  # an error about missing files names this many of them


def load_json(path: Path) -> dict[str, list[Any]]:
    """The lists of a COCO file: images, annotations (empty if the file has none) and categories."""
    content = read_json(path, "a COCO JSON file")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: is not COCO's JSON: expected an object of lists, found a {type(content).__name__}")
    lists: dict[str, list[Any]] = {}
    for key in ("images", "annotations", "categories"):
        value = content.get(key)
        if key == "annotations":
            value = value or []  # files of images to predict have none
        if not isinstance(value, list):
            raise ValueError(f'{path}: is not COCO\'s JSON: expected a list "{key}", found {short(value)}')
        lists[key] = value
    return lists


def read_json(path: Path, expected: str) -> Any:
    """The content of a JSON file; ``expected`` says in the error what the file should be."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}), expected {expected}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON ({error})") from error


def by_id(path: Path, what: str, entries: list[Any]) -> dict[int, Mapping[str, Any]]:
    """Entries by id; raises ValueError for an id that is no integer or occurs twice."""
    result: dict[int, Mapping[str, Any]] = {}
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ValueError(f"{path}: {what} number {number} (from 0) should be an object, found {short(entry)}")
        key = integer(entry.get("id"))
        if key is None:
            stated = short(entry.get("id"))
            raise ValueError(f"{path}: {what} number {number} (from 0) should have an integer id, found {stated}")
        if key in result:
            raise ValueError(f"{path}: {what} id {key} occurs twice")
        result[key] = entry
    return result


def integer(value: Any) -> int | None:
    """The value as an integer, or None if it is none; 3.0 counts as an integer."""
    if isinstance(value, float) and value.is_integer():  # tables such as pandas' write integers as floats
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
        return value
    return None


def file_name(path: Path, key: int, entry: Mapping[str, Any]) -> str:
    """An image's ``file_name``."""
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{path}: image {key} should have a file_name, found {short(name)}")
    return name


def check_files(path: Path, folder: Path, names: Iterable[str]) -> None:
    """Looks for all image files; raises ValueError with the names of some missing files."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: is not a folder, expected the one that holds the images of {path}")
    listed: dict[str, set[str]] = {}  # listing each folder once is much quicker than testing every file

    def exists(name: str) -> bool:
        place, base = os.path.split(os.path.join(folder, name))
        if place not in listed:
            listed[place] = set(os.listdir(place)) if os.path.isdir(place) else set()
        # on a file system that ignores case, the listing may have the name in another case
        return base in listed[place] or os.path.exists(os.path.join(place, base))

    names = list(names)
    missing = [name for name in names if not exists(name)]
    if missing:
        more = ", ..." if len(missing) > _MAX_NAMED else ""
        raise ValueError(
            f"{path}: {len(missing)} of its {len(names)} image files are missing in {folder}: "
            f"{', '.join(missing[:_MAX_NAMED])}{more}"
        )


def image_size(path: Path, key: int, entry: Mapping[str, Any], file: Path) -> tuple[int, int]:
    """(rows, columns) of an image: as the entry states, else from the header of the image file."""
    stated = entry.get("height"), entry.get("width")
    if None in stated:
        try:
            with Image.open(file) as image:
                return image.height, image.width
        except Exception:  # read_image raises an error that says how the image is broken
            return read_image(file, upright=False).shape[:2]
    rows, columns = (integer(side) for side in stated)
    if rows is None or columns is None or rows < 1 or columns < 1:
        raise ValueError(
            f"{path}: image {key} should have a positive integer width and height, found {short(stated[1])} "
            f"and {short(stated[0])}"
        )
    return rows, columns


def category_names(path: Path, known: Mapping[int, Mapping[str, Any]], used: Collection[int | None]) -> dict[int, str]:
    """Names by category id, in the order of ids. Of the categories that share a name, only one may have annotations."""
    ids: dict[str, list[int]] = {}
    for key in sorted(known):
        name = known[key].get("name")
        if not isinstance(name, str) or not name:
            raise ValueError(f"{path}: category {key} should have a name, found {short(name)}")
        ids.setdefault(name, []).append(key)
    for name, keys in ids.items():
        with_boxes = [key for key in keys if key in used]
        if len(with_boxes) > 1 or (name == BACKGROUND and with_boxes):
            what = "is reserved for label 0" if name == BACKGROUND else f"is the name of categories {with_boxes}"
            raise ValueError(f'{path}: "{name}" {what}, expected a name of its own for each category')
        ids[name] = (with_boxes or keys)[:1]  # some tools write an unused category of the same name, the super-category
    ids.pop(BACKGROUND, None)
    return dict(sorted((keys[0], name) for name, keys in ids.items()))


def category_labels(
    path: Path,
    names: Mapping[int, str],
    used: Collection[int | None],
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
                    f'{path}: category id {key} ("{names[key]}") is no label of a model of {num_classes} classes: '
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
            raise ValueError(f'{path}: category {key} "{name}" {fault} the names of the labels ({listed})')
    return list(categories), {key: list(categories).index(name) for key, name in names.items() if name in categories}


def short(value: Any) -> str:
    """A value of the file for an error message."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
