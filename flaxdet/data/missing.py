"""Image files that a COCO file names and a folder does not have, and similar names that the folder has."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote

_MAX_NAMED = 3  # a message names this many files
_MAX_LISTED = 300_000  # files of a folder that are looked at for a hint


def missing_files(folder: Path, names: Sequence[str]) -> list[str]:
    """The names, relative to a folder, of which no file exists."""
    listed: dict[str, set[str]] = {}  # listing each folder once is much quicker than testing every file

    def exists(name: str) -> bool:
        place, base = os.path.split(os.path.join(folder, name))
        if place not in listed:
            listed[place] = set(os.listdir(place)) if os.path.isdir(place) else set()
        # on a file system that ignores case, the listing may have the name in another case
        return base in listed[place] or os.path.lexists(os.path.join(place, base))

    return [name for name in names if not exists(name)]


def describe_missing(folder: Path, missing: Sequence[str], count: int) -> str:
    """How many of ``count`` files are missing, the names of some, and a hint where the folder has them otherwise."""
    more = ", ..." if len(missing) > _MAX_NAMED else ""
    text = f"{len(missing)} of its {count} image files are missing in {folder}: {', '.join(missing[:_MAX_NAMED])}{more}"
    return f"{text}{_hint(folder, missing)}"


def _hint(folder: Path, missing: Sequence[str]) -> str:
    files = _by_key(folder)
    for name in missing[:100]:
        wanted = _parts(name)
        found = files.get(wanted[-1]) or files.get(_stem(wanted[-1]))
        if not found:
            continue
        # of several files of the name, the one whose folders agree best
        best = max(found, key=lambda path: (_common_tail(_parts(path), wanted), -len(path)))
        return f'; the folder has "{best}", which differs from "{name}" in {_difference(folder, name, best)}'
    return ""


def _by_key(folder: Path) -> Mapping[str, list[str]]:
    """Files below a folder, relative to it, by base name without case and Unicode form, and without the extension."""
    files: dict[str, list[str]] = {}
    count = 0
    for root, folders, bases in os.walk(folder):
        folders.sort()
        for base in bases:
            path = os.path.relpath(os.path.join(root, base), folder)
            key = _parts(base)[-1]
            for each in {key, _stem(key)}:
                files.setdefault(each, []).append(path)
            count += 1
        if count > _MAX_LISTED:
            break
    return files


def _parts(name: str) -> list[str]:
    """A path's parts, in a form that all ways to write it share."""
    plain = unicodedata.normalize("NFC", unquote(name).replace("\\", "/")).casefold()
    return [part.strip() for part in plain.split("/") if part not in ("", ".")] or [plain]


def _stem(base: str) -> str:
    return f"{os.path.splitext(base)[0]}/"  # no base name has a slash


def _common_tail(a: Sequence[str], b: Sequence[str]) -> int:
    count = 0
    while count < min(len(a), len(b)) and a[-1 - count] == b[-1 - count]:
        count += 1
    return count


def _difference(folder: Path, name: str, found: str) -> str:
    """The differences between a name in the annotations and the name of a file: "letter case, and in its extension"."""
    steps, plain = [], name
    if "\\" in plain and "\\" not in found:
        plain = plain.replace("\\", "/")
        steps.append("backslashes, as written on Windows, where / is expected")
    if unquote(plain) != plain and unquote(plain).rsplit("/", 1)[-1] != "" and "%" not in found:
        plain = unquote(plain)
        steps.append("percent signs, as written in a URL, %20 for a space")
    own, other = plain.replace(os.sep, "/").split("/"), found.replace(os.sep, "/").split("/")
    own = [part for part in own if part not in ("", ".")]
    if plain.startswith("/") and len(own) <= len(other):
        steps.append("the / at its beginning")
    if any(part != part.strip() for part in own) and not any(part != part.strip() for part in other):
        own = [part.strip() for part in own]
        steps.append("spaces at its ends")
    if len(own) > len(other):
        steps.append(f'a folder too many, "{"/".join(own[: len(own) - len(other)])}"')
    elif len(own) < len(other):
        deeper = folder.joinpath(*other[: len(other) - len(own)])
        steps.append(f'a folder too few: expected "{deeper}" as the folder of the images')
    tails = list(zip(own[::-1], other[::-1], strict=False))
    normal = [tuple(unicodedata.normalize("NFC", part) for part in pair) for pair in tails]
    if tails != normal and any(a != b for a, b in tails):
        steps.append("the Unicode form, NFC or NFD, which look the same")
    if any(a != b and a.casefold() == b.casefold() for a, b in normal):
        steps.append("letter case")
    if normal and os.path.splitext(normal[0][0].casefold())[1] != os.path.splitext(normal[0][1].casefold())[1]:
        steps.append("its extension")
    return ", and in ".join(steps) or "its folder"
