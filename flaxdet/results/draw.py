"""Detections drawn into pictures."""

from __future__ import annotations

import colorsys
import os
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from flaxdet.results.fonts import MissingLettersWarning, choose_font, what_is_missing

Colour = tuple[int, int, int]

_LONGEST_NAME = 200  # letters
_NOT_DRAWN = {"Cc", "Cs", "Zl", "Zp"}  # control characters, halves of characters, ends of lines and paragraphs


class _Rectangle(NamedTuple):
    x1: float
    y1: float
    x2: float
    y2: float

    def overlaps(self, other: _Rectangle) -> bool:
        return self.x1 < other.x2 and other.x1 < self.x2 and self.y1 < other.y2 and other.y1 < self.y2


def draw_detections(
    image: UInt8[np.ndarray, "H W 3"],
    detection: Mapping[str, Any],
    *,
    categories: Sequence[str] | Mapping[int, str] | None = None,
    score_threshold: float = 0.0,
    line_width: int | None = None,
    font_size: int | None = None,
    font: str | os.PathLike[str] | None = None,
) -> UInt8[np.ndarray, "H W 3"]:
    """Draws boxes with a caption of class and score, in one colour per class.

    Args:
        image: [H, W, 3] uint8 RGB; it is not changed.
        detection: {"boxes": [N, 4] xyxy in pixels of the image, "labels": [N] integers, and optionally
            "scores": [N]}, as ``flaxdet.predict`` returns them. Boxes may reach beyond the image; boxes with a
            coordinate that is not finite are left out.
        categories: names by label, a sequence or a mapping. A label without a name is captioned "class 7".
        score_threshold: draw only detections with at least this score.
        line_width: in pixels. Default: grows with the image.
        font_size: in pixels. Default: grows with the image.
        font: a font file (.ttf, .otf, .ttc). Default: the font that Pillow carries; for a caption with letters that
            this font lacks, DejaVu Sans, if matplotlib is installed, which carries it.

    Returns:
        [H, W, 3] uint8, the picture. Captions stay inside the picture and don't hide each other: if there is no
        room for all, the detections with the lowest scores get no caption.

    Raises:
        ValueError: if ``image`` is no uint8 [H, W, 3], boxes, labels and scores don't fit each other, or ``font`` is no
            font file.

    Warns:
        MissingLettersWarning: if no font has all letters of the captions. These letters are drawn as boxes.
    """
    options: dict[str, Any] = {"line_width": line_width, "font_size": font_size, "font": font}
    picture = draw_picture(image, detection, categories=categories, score_threshold=score_threshold, **options)
    return np.array(picture)


def draw_picture(
    image: UInt8[np.ndarray, "H W 3"],
    detection: Mapping[str, Any],
    *,
    categories: Sequence[str] | Mapping[int, str] | None = None,
    score_threshold: float = 0.0,
    line_width: int | None = None,
    font_size: int | None = None,
    font: str | os.PathLike[str] | None = None,
) -> Image.Image:
    """``draw_detections``, but returns Pillow's image, which can be saved without a copy of the pixels.

    Args:
        image: as for ``draw_detections``.
        detection: as for ``draw_detections``.
        categories: as for ``draw_detections``.
        score_threshold: as for ``draw_detections``.
        line_width: as for ``draw_detections``.
        font_size: as for ``draw_detections``.
        font: as for ``draw_detections``.

    Returns:
        The picture, RGB.

    Raises:
        ValueError: as ``draw_detections``.

    Warns:
        MissingLettersWarning: as ``draw_detections``.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or not image.size:
        raise ValueError(f"image must be uint8 [H, W, 3], found {image.dtype} {list(image.shape)}")
    boxes, labels = np.asarray(detection["boxes"], np.float64), np.asarray(detection["labels"])
    scores = np.asarray(detection["scores"], np.float64) if "scores" in detection else None
    if boxes.shape != (len(labels), 4) or (scores is not None and scores.shape != labels.shape):
        raise ValueError(
            "boxes must be [N, 4], labels and scores [N], found "
            f"{list(boxes.shape)}, {list(labels.shape)} and {None if scores is None else list(scores.shape)}"
        )
    height, width = image.shape[:2]
    picture = Image.fromarray(image)
    canvas = ImageDraw.Draw(picture)
    line = line_width or max(1, round((height + width) / 700))
    letters = font_size or _default_font_size(height, width)

    shown = np.isfinite(boxes).all(axis=1) if len(boxes) else np.zeros(0, bool)
    if scores is not None:
        shown &= scores >= score_threshold
    order = np.flatnonzero(shown)
    if scores is not None:
        order = order[np.argsort(-scores[order], kind="stable")]

    limit = np.array([width, height, width, height])
    corners = np.clip(boxes, 0, limit)
    frames = {i: _frame(corners[i], width, height) for i in order}
    for i in order[::-1]:  # the best is drawn last, on top
        _draw_frame(canvas, frames[i], _colour(int(labels[i])), line)

    names = {label: _name(label, categories) for label in dict.fromkeys(labels[order].tolist())}
    if missing := what_is_missing(names.values(), font):
        warnings.warn(missing, MissingLettersWarning, stacklevel=3)
    taken: list[_Rectangle] = []
    for i in order:  # the best is placed first, where there is most room
        label = int(labels[i])
        text = names[label] if scores is None else f"{names[label]} {scores[i]:.2f}"
        face = choose_font(text, letters, font)
        text, size = _fit(canvas, text, face, width)
        place = _place(frames[i], size, (width, height), taken)
        if place is None:
            continue
        taken.append(place)
        canvas.rectangle((place.x1, place.y1, place.x2 - 1, place.y2 - 1), fill=_colour(label))
        centre = ((place.x1 + place.x2) / 2, (place.y1 + place.y2) / 2)
        canvas.text(centre, text, fill=_text_colour(_colour(label)), font=face, anchor="mm")
    return picture


def side_by_side(
    left: UInt8[np.ndarray, "H W 3"], right: UInt8[np.ndarray, "H W 3"], titles: tuple[str, str]
) -> UInt8[np.ndarray, "H2 W2 3"]:
    """Two pictures next to each other on white, each under a title.

    Args:
        left: [H, W, 3] uint8 RGB.
        right: [H, W, 3] uint8 RGB, of any size; aligned with the top of ``left``.
        titles: of ``left`` and ``right``; a title that is wider than its picture is shortened.

    Returns:
        uint8 RGB: as high as the higher picture and the titles, as wide as the two pictures and a gap.
    """
    height = max(left.shape[0], right.shape[0])
    size = _default_font_size(height, max(left.shape[1], right.shape[1]))
    bar = round(size * 1.2 * 1.6)
    gap = max(2, size // 2)
    picture = Image.new("RGB", (left.shape[1] + gap + right.shape[1], bar + height), "white")
    canvas = ImageDraw.Draw(picture)
    x = 0
    for image, title in zip((left, right), titles, strict=True):
        picture.paste(Image.fromarray(image), (x, bar))
        font = choose_font(title, round(size * 1.2), None)
        text, _ = _fit(canvas, title, font, image.shape[1])
        canvas.text((x + image.shape[1] / 2, bar / 2), text, fill="black", font=font, anchor="mm")
        x += image.shape[1] + gap
    return np.array(picture)


def _default_font_size(height: int, width: int) -> int:
    # letters below 9 pixels can't be read, however small the picture is
    return max(9, min(round((height + width) / 90), round(min(height, width) / 12)))


def _colour(label: int) -> Colour:
    # Steps of the golden ratio keep the hues of neighbouring labels apart. Hues nearly repeat after 13, 21, 34 or 55
    # labels. 4 divides none of these numbers, so four pairs of saturation and value tell such labels apart.
    hue = (0.02 + label * 0.6180339887) % 1
    saturation, value = ((0.85, 1.0), (0.5, 1.0), (0.95, 0.75), (0.65, 0.87))[label % 4]
    r, g, b = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(r * 255), round(g * 255), round(b * 255)


def _text_colour(background: Colour) -> Colour:
    r, g, b = background
    return (0, 0, 0) if 0.299 * r + 0.587 * g + 0.114 * b > 120 else (255, 255, 255)


def _name(label: int, categories: Sequence[str] | Mapping[int, str] | None) -> str:
    """The name of a label in one line: Pillow can't measure text of several."""
    name = f"class {label}"
    if isinstance(categories, Mapping):
        name = str(categories.get(label, name))
    elif categories is not None and 0 <= label < len(categories):
        name = str(categories[label])
    name = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
    return "".join(" " if unicodedata.category(letter) in _NOT_DRAWN else letter for letter in name)


def _frame(corners: np.ndarray, width: int, height: int) -> _Rectangle:
    """The box in whole pixels inside the picture, at least one pixel wide and high."""
    x1, x2 = sorted((round(corners[0]), round(corners[2])))
    y1, y2 = sorted((round(corners[1]), round(corners[3])))
    x1, y1 = min(x1, width - 1), min(y1, height - 1)
    return _Rectangle(x1, y1, max(x2, x1 + 1), max(y2, y1 + 1))


def _draw_frame(canvas: ImageDraw.ImageDraw, frame: _Rectangle, colour: Colour, line: int) -> None:
    canvas.rectangle((frame.x1, frame.y1, frame.x2 - 1, frame.y2 - 1), outline=colour, width=line)


def _fit(canvas: ImageDraw.ImageDraw, text: str, font: Any, width: int) -> tuple[str, tuple[float, float]]:
    """The text, shortened in the middle if it is wider than the picture, and the size of the text with a margin."""
    ascent, descent = font.getmetrics()
    margin = max(2, round(font.size / 4))
    short = text
    for length in range(len(text) - 1, 0, -1):
        if canvas.textlength(short, font=font) + 2 * margin <= width:
            break
        tail = min(length // 2, 5)  # the score, at the end of a caption, stays
        short = f"{text[: length - tail]}…{text[len(text) - tail :]}"
    return short, (round(canvas.textlength(short, font=font)) + 2 * margin, ascent + descent + 2)


def _place(
    frame: _Rectangle, size: tuple[float, float], picture: tuple[int, int], taken: list[_Rectangle]
) -> _Rectangle | None:
    """The free place of a caption: above the box, inside at the top, below, or inside at the bottom; else None."""
    w, h = size
    width, height = picture
    for y in (frame.y1 - h, frame.y1, frame.y2, frame.y2 - h):
        for x in (frame.x1, frame.x2 - w):
            left, top = max(0, min(x, width - w)), max(0, min(y, height - h))
            place = _Rectangle(left, top, left + w, top + h)
            if not any(place.overlaps(other) for other in taken):
                return place
    return None
