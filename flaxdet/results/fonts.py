"""Fonts for captions: one that has the letters of the caption."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import ImageFont

_NO_CHARACTER = "\U0010fffe"  # which no font has: drawn as the font's sign for missing letters


class MissingLettersWarning(UserWarning):
    """A caption has letters that no font at hand has; they are drawn as boxes."""


def load_font(path: str | os.PathLike[str] | None, size: int) -> Any:
    """A font for Pillow.

    Args:
        path: a font file, or None for the font that Pillow carries, which has little beyond ASCII.
        size: in pixels.

    Raises:
        ValueError: if the file is no font that Pillow can read.
    """
    if path is None:
        return ImageFont.load_default(size=size)
    if not os.path.isfile(path):  # Pillow would search the system's folders for the name
        raise ValueError(f"font {path}: no such file, expected a font file (.ttf, .otf, .ttc)")
    try:
        return ImageFont.truetype(os.fspath(path), size)
    except (OSError, ValueError) as error:
        raise ValueError(f"font {path}: cannot be read ({error}), expected a font file (.ttf, .otf, .ttc)") from error


def choose_font(text: str, size: int, font: str | os.PathLike[str] | None) -> Any:
    """The font for a caption: the one that is given, else the first that has all letters, else that with the most.

    Args:
        text: the caption.
        size: in pixels.
        font: a font file, or None.

    Returns:
        A font of Pillow.

    Raises:
        ValueError: if ``font`` is no font file.
    """
    if font is not None:
        return _loaded(os.fspath(font), size)
    if text.isascii():
        return _loaded(None, size)
    candidates = [None, dejavu()] if dejavu() else [None]
    return _loaded(min(candidates, key=lambda path: len(missing_letters(text, path))), size)


def missing_letters(text: str, font: str | os.PathLike[str] | None) -> str:
    """The letters of a text, each once, that a font does not have.

    Args:
        text: any text.
        font: a font file, or None for the font that Pillow carries.
    """
    path = None if font is None else os.fspath(font)
    return "".join(letter for letter in dict.fromkeys(text) if not _has(letter, path))


def what_is_missing(texts: Iterable[str], font: str | os.PathLike[str] | None) -> str | None:
    """A warning, if no font at hand has the letters of some text; else None.

    Args:
        texts: class names.
        font: the font file that the user gave, or None.
    """
    missing: dict[str, None] = {}
    for text in texts:
        paths = [font] if font is not None else [None, dejavu()] if dejavu() else [None]
        missing |= dict.fromkeys(min((missing_letters(text, path) for path in paths), key=len))
    if not missing:
        return None
    letters = "".join(missing)
    shown = letters if len(letters) <= 20 else f"{letters[:20]}..."
    if font is not None:
        return f"the font {font} lacks letters of class names, which are drawn as boxes: {shown}"
    remedy = "a font file by --font (font=)"
    if dejavu() is None:
        remedy = (
            f"matplotlib, whose font DejaVu Sans has Greek, Cyrillic and more (pip install matplotlib), or {remedy}"
        )
    return f"no font at hand has these letters of class names, which are drawn as boxes: {shown}; expected {remedy}"


@functools.cache
def dejavu() -> str | None:
    """The path of DejaVu Sans, which matplotlib carries; None without matplotlib, which is not imported."""
    try:
        found = importlib.util.find_spec("matplotlib")
    except (ImportError, ValueError):  # ValueError: of a module without a spec
        return None
    for folder in (found.submodule_search_locations or ()) if found else ():
        path = Path(folder, "mpl-data", "fonts", "ttf", "DejaVuSans.ttf")
        if path.is_file():
            return str(path)
    return None


@functools.lru_cache(maxsize=32)
def _loaded(path: str | None, size: int) -> Any:
    return load_font(path, size)


@functools.lru_cache(maxsize=4096)
def _has(letter: str, path: str | None) -> bool:
    if (letter.isascii() and letter.isprintable()) or letter.isspace() or not letter.isprintable():
        return True
    font = _loaded(path, 20)
    drawn, missing = (font.getmask(each) for each in (letter, _NO_CHARACTER))
    return drawn.size != missing.size or bytes(drawn) != bytes(missing)
