"""Pictures of a training run: curves, and predictions beside the ground truth."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from flaxdet.files.checkpoint import replacing
from flaxdet.results.draw import draw_detections, side_by_side
from flaxdet.train.logs import is_loss, read_log

Rows = Sequence[Mapping[str, float]]
_SCORES = {"AP": "#1f5fa8", "AP50": "#e08214", "AP75": "#35978f"}
_TOTAL, _FAINT, _VALIDATION = "#222222", "#bbbbbb", "#c51b7d"
_FEW = 12  # curves of fewer points are not smoothed, and have a mark at each point
_SIDE = 480  # pixels: the longer side of each image in the sheet
_MARGIN = 12


def draw_curves(log: str | os.PathLike[str] | Rows, path: str | os.PathLike[str]) -> None:
    """Draws losses, the validation loss, AP and the learning rate over the steps.

    Args:
        log: the path of a log in JSON lines, or the rows of ``read_log``.
        path: the PNG file, which is written atomically.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if the file is no log.
        OSError: if a file cannot be read or written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures of training need matplotlib: pip install 'flaxdet[train]'") from error
    rows = read_log(log) if isinstance(log, (str, os.PathLike)) else log
    names = {name: None for row in rows for name in row}  # in the order of their first appearance
    losses = [name for name in names if is_loss(name)]
    scores = [name for name in _SCORES if name in names]
    panels = [
        *([(3.0, _draw_losses, losses)] if losses else []),
        *([(3.0, _draw_scores, scores)] if scores else []),
        *([(1.1, _draw_rate, ["learning_rate"])] if "learning_rate" in names else []),
    ]
    heights = [height for height, _, _ in panels] or [1.5]
    figure = Figure(figsize=(8, 0.6 + sum(heights)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (_, draw, shown) in zip(axes, panels, strict=False):
        draw(axis, rows, shown)
        axis.grid(True, color="#e6e6e6", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    if not panels:
        axes[0].text(0.5, 0.5, "no step is logged yet", ha="center", va="center", color="#777777")
        axes[0].set_axis_off()
    axes[-1].set_xlabel("step")
    with replacing(path) as file:
        figure.savefig(file, format="png")


def draw_predictions(
    images: Sequence[UInt8[np.ndarray, "H W 3"]],
    truths: Sequence[Mapping[str, Any]],
    predictions: Sequence[Mapping[str, Any]],
    categories: Sequence[str] | Mapping[int, str] | None,
    path: str | os.PathLike[str],
    *,
    score_threshold: float = 0.3,
    font: str | os.PathLike[str] | None = None,
) -> None:
    """Draws a sheet of images, each twice: with the ground truth on the left, with the predictions on the right.

    Args:
        images: uint8 RGB of any sizes; small images are enlarged, large ones reduced.
        truths: for each image {"boxes": [N, 4] xyxy in pixels of the image, "labels": [N]}.
        predictions: for each image {"boxes", "labels", "scores"}, as ``flaxdet.predict`` returns them.
        categories: names by label, or ``None``.
        path: the PNG file, which is written atomically.
        score_threshold: predictions with a lower score are not drawn.
        font: as for ``draw_detections``.

    Raises:
        ValueError: if there is no image, the numbers of images, truths and predictions differ, or an array has
            another shape.
        OSError: if the file cannot be written.
    """
    if not len(images) or not len(images) == len(truths) == len(predictions):
        counts = f"{len(images)}, {len(truths)} and {len(predictions)}"
        raise ValueError(f"expected as many images as truths and predictions, at least one, got {counts}")
    pairs = [_pair(*row, categories, score_threshold, font) for row in zip(images, truths, predictions, strict=True)]
    columns = 1 if len(pairs) < 4 else 2
    width = max(pair.shape[1] for pair in pairs)
    lines = [pairs[i : i + columns] for i in range(0, len(pairs), columns)]
    heights = [max(pair.shape[0] for pair in line) for line in lines]
    sheet = Image.new(
        "RGB",
        (columns * (width + 2 * _MARGIN) + _MARGIN, sum(heights) + (len(lines) + 1) * _MARGIN),
        "white",
    )
    y = _MARGIN
    for line, height in zip(lines, heights, strict=True):
        for column, pair in enumerate(line):
            x = _MARGIN + column * (width + 2 * _MARGIN) + (width - pair.shape[1]) // 2
            sheet.paste(Image.fromarray(pair), (x, y))
        y += height + _MARGIN
    with replacing(path) as file:
        sheet.save(file, format="png")


def _pair(
    image: np.ndarray,
    truth: Mapping[str, Any],
    prediction: Mapping[str, Any],
    categories: Any,
    threshold: float,
    font: str | os.PathLike[str] | None,
) -> np.ndarray:
    height, width = image.shape[:2]
    scale = _SIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    # small images are enlarged without interpolation, which would hide how few pixels they have
    resample = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS
    shown = np.array(Image.fromarray(image).resize(size, resample))
    stretch = np.array([size[0] / width, size[1] / height] * 2)

    def drawn(boxes: Mapping[str, Any], **options: Any) -> np.ndarray:
        scaled = {**boxes, "boxes": np.asarray(boxes["boxes"], np.float64).reshape(-1, 4) * stretch}
        style: dict[str, Any] = {"line_width": 2, "font_size": 12, "font": font}
        return draw_detections(shown, scaled, categories=categories, **style, **options)

    count = int(np.sum(np.asarray(prediction["scores"]) >= threshold))
    titles = (f"truth: {len(truth['labels'])}", f"found: {count} (score {threshold:g} or more)")
    return side_by_side(drawn(truth), drawn(prediction, score_threshold=threshold), titles)


def _points(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of one curve."""
    points = [(row["step"], row[name]) for row in rows if name in row and math.isfinite(row[name])]
    steps, values = np.array(points, np.float64).reshape(-1, 2).T
    return steps, values


def _smooth(values: np.ndarray) -> np.ndarray:
    """Gaussian-weighted mean, centred so that the line has no lag; the standard deviation is 1/60 of the points."""
    reach = max(1.0, len(values) / 60)
    offsets = np.arange(-round(3 * reach), round(3 * reach) + 1)
    weights = np.exp(-0.5 * (offsets / reach) ** 2)
    centre = slice(len(offsets) // 2, len(offsets) // 2 + len(values))  # the middle part of the full convolution
    return np.convolve(values, weights)[centre] / np.convolve(np.ones_like(values), weights)[centre]


def _draw_losses(axis: Any, rows: Rows, names: Sequence[str]) -> None:
    """The total loss, the smoothed total, in thin lines each smoothed loss, and the total on the validation images."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    lowest, highest = math.inf, 0.0
    for name in sorted(names, key=lambda name: name != "loss"):
        steps, values = _points(rows, name)
        if not len(steps):
            continue
        few = len(steps) < _FEW
        line = values if few else _smooth(values)
        if name == "loss":
            if not few:
                axis.plot(steps, values, color=_FAINT, linewidth=0.8, zorder=1)
            axis.plot(steps, line, color=_TOTAL, linewidth=2, marker="o" if few else None, ms=4, label=name, zorder=3)
        else:
            axis.plot(steps, line, linewidth=1.2, marker="." if few else None, label=name, zorder=2)
        lowest, highest = min(lowest, line.min()), max(highest, line.max())
    steps, values = _points(rows, "val/loss")
    if len(steps):
        axis.plot(steps, values, "--", color=_VALIDATION, linewidth=1.5, marker="o", ms=3, label="validation", zorder=4)
        lowest, highest = min(lowest, values.min()), max(highest, values.max())
    if 0 < lowest < highest / 10:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_ylabel("loss")
    _legend(axis, "upper right")


def _draw_scores(axis: Any, rows: Rows, names: Sequence[str]) -> None:
    """AP, AP50 and AP75, with a mark and the step of the best AP."""
    top = 0.0
    for name in names:
        steps, values = _points(rows, name)
        if not len(steps):
            continue
        axis.plot(
            steps, values, color=_SCORES[name], linewidth=2 if name == "AP" else 1.3, marker="o", ms=3, label=name
        )
        top = max(top, values.max())
        if name == "AP":
            best = int(values.argmax())
            axis.plot(steps[best], values[best], "o", ms=9, mfc="none", mec=_SCORES[name], mew=1.5)
            axis.set_title(
                f"best AP {values[best]:.3f} at step {steps[best]:,.0f}", loc="right", fontsize=9, color=_SCORES[name]
            )
    axis.set_ylim(0, min(1.03, max(0.05, 1.15 * top)))
    axis.set_ylabel("average precision")
    _legend(axis, "lower right")


def _draw_rate(axis: Any, rows: Rows, names: Sequence[str]) -> None:
    for name in names:
        axis.plot(*_points(rows, name), color="#777777", linewidth=1.2)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("learning\nrate")
    axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))


def _legend(axis: Any, place: str) -> None:
    if axis.lines:
        axis.legend(loc=place, fontsize=8, frameon=True, framealpha=0.85, edgecolor="none", ncols=3)
