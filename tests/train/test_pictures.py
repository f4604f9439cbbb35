"""Pictures of a run: what is in the log is in the picture, and nothing is drawn where nothing is."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from PIL import Image

from flaxdet.train import pictures
from flaxdet.train.logs import JsonLinesWriter
from flaxdet.train.pictures import draw_curves, draw_predictions
from tests.tolerances import OP_F64

NAMES = {1: "cat", 2: "dog"}
AP_BLUE = (0x1F, 0x5F, 0xA8)


def rows(steps: int, *, evaluate_every: int = 0) -> list[dict[str, float]]:
    found = []
    for step in range(1, steps + 1):
        found.append({"step": step, "classification": 1 / step, "loss": 1 + 2 / step, "learning_rate": 0.01})
        if evaluate_every and step % evaluate_every == 0:
            found.append({"step": step, "AP": step / steps / 2, "AP50": step / steps, "AP75": 0.1, "AP_small": -1.0})
    return found


def read(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.array(image.convert("RGB"))


def pixels(image: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int(np.all(image == colour, axis=-1).sum())


@pytest.mark.parametrize("steps", [1, 2, 11, 12, 300])
def test_curves(tmp_path, steps, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # its global state stays out of this
    draw_curves(rows(steps, evaluate_every=1), tmp_path / "all.png")
    draw_curves(rows(steps), tmp_path / "loss.png")
    evaluated, alone = read(tmp_path / "all.png"), read(tmp_path / "loss.png")
    assert evaluated.shape[0] > alone.shape[0]  # one panel more
    assert pixels(evaluated, AP_BLUE) > 20
    assert not pixels(alone, AP_BLUE)
    assert pixels(alone, (0x22, 0x22, 0x22)) > 20


def test_the_validation_loss_is_drawn(tmp_path):
    found = rows(20)
    draw_curves([*found, *({"step": step, "val/loss": 2.5, "AP": math.nan} for step in (10, 20))], tmp_path / "a.png")
    draw_curves(found, tmp_path / "b.png")
    assert pixels(read(tmp_path / "a.png"), (0xC5, 0x1B, 0x7D)) > 20
    assert not pixels(read(tmp_path / "b.png"), (0xC5, 0x1B, 0x7D))


def test_curves_of_a_file_and_of_its_rows_are_the_same(tmp_path):
    writer = JsonLinesWriter(tmp_path / "log")
    for row in rows(20, evaluate_every=5):
        writer.scalars(int(row["step"]), {name: value for name, value in row.items() if name != "step"})
    writer.close()
    draw_curves(tmp_path / "log", tmp_path / "a.png")
    draw_curves(rows(20, evaluate_every=5), tmp_path / "b.png")
    assert np.array_equal(read(tmp_path / "a.png"), read(tmp_path / "b.png"))


@pytest.mark.parametrize(
    "log",
    [
        [],
        [{"step": 1}],
        [{"step": 1, "loss": math.nan}],
        [{"step": 1, "loss": 0.0}, {"step": 2, "loss": -1.0}],
        [{"step": 1, "loss": 1e-12}, {"step": 2, "loss": 1e12}],
        [{"step": 5, "AP": 0.0}],
        [{"step": 5, "AP": -1.0}],
        [{"step": 5, "AP": math.nan, "AP50": 1.0}],
        [{"step": i, "loss": math.nan if i == 15 else 1.0 + i % 3, "learning_rate": 0.0} for i in range(30)],
    ],
)
def test_curves_of_logs_with_little_or_odd_in_them(tmp_path, log):
    draw_curves(log, tmp_path / "curves.png")
    assert read(tmp_path / "curves.png").std() > 0


def test_the_smoothed_line_keeps_the_level_and_lags_behind_nothing():
    assert np.allclose(pictures._smooth(np.full(100, 3.0)), 3.0, rtol=OP_F64)
    ramp = np.arange(200.0)
    inner = slice(20, -20)
    assert np.allclose(pictures._smooth(ramp)[inner], ramp[inner], rtol=OP_F64)
    noise = np.random.default_rng(0).normal(size=600)
    assert pictures._smooth(noise).std() < 0.3 * noise.std()


def test_matplotlib_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'flaxdet\[train\]'"):
        draw_curves([], tmp_path / "curves.png")


def test_a_picture_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "curves.png").write_bytes(b"old")

    def full(_):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"curves\.png: cannot be written"):
        draw_curves([], tmp_path / "curves.png")
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
    assert (tmp_path / "curves.png").read_bytes() == b"old"


# ---------------------------------------------------------------------------------------------------- predictions


def example(size, score=0.9):
    height, width = size
    box = np.array([[0.25 * width, 0.5 * height, 0.75 * width, 0.9 * height]])
    image = np.full((height, width, 3), (30, 40, 50), np.uint8)
    return image, {"boxes": box, "labels": [1]}, {"boxes": box, "labels": [1], "scores": [score]}


def draw(path, *examples, **options):
    images, truths, predictions = zip(*examples, strict=True)
    draw_predictions(images, truths, predictions, NAMES, path, **options)
    return read(path)


@pytest.mark.parametrize("size", [(64, 80), (64, 64), (480, 640), (2000, 3000), (10, 900), (900, 10)])
def test_every_size_of_image_is_drawn_about_as_large(tmp_path, size):
    sheet = draw(tmp_path / "sheet.png", example(size))
    shown = np.all(sheet == (30, 40, 50), axis=-1)
    assert 300 < max(shown.any(axis=1).sum(), shown.any(axis=0).sum() / 2) <= pictures._SIDE
    colour = [tuple(c) for c in np.unique(sheet.reshape(-1, 3), axis=0) if int(max(c)) - int(min(c)) > 60]
    assert colour  # a box


def test_truth_left_and_prediction_right_above_the_threshold(tmp_path):
    for score, found in [(0.9, True), (0.29, False)]:
        sheet = draw(tmp_path / "sheet.png", example((64, 80), score)).astype(int)
        vivid = sheet.max(axis=-1) - sheet.min(axis=-1) > 60
        middle = sheet.shape[1] // 2
        assert vivid[:, :middle].any()
        assert vivid[:, middle:].any() == found
    sheet = draw(tmp_path / "sheet.png", example((64, 80), 0.29), score_threshold=0.2).astype(int)
    assert (sheet.max(axis=-1) - sheet.min(axis=-1))[:, middle:].max() > 60


def test_boxes_keep_their_place_when_the_image_is_scaled(tmp_path):
    sheet = draw(tmp_path / "sheet.png", example((60, 80))).astype(int)
    inner = sheet[:, : sheet.shape[1] // 2]
    ys, xs = np.nonzero(inner.max(axis=-1) - inner.min(axis=-1) > 60)
    left = np.nonzero(np.all(inner == (30, 40, 50), axis=-1).any(axis=0))[0][0]
    assert abs(xs.min() - left - 0.25 * 480) <= 2
    assert abs(xs.max() - left - 0.75 * 480) <= 2
    assert abs(ys.max() - ys.min() - 0.4 * 360 - 17) <= 6  # with its caption above


def test_sheets_of_many_images_have_two_columns(tmp_path):
    few = draw(tmp_path / "few.png", *[example((64, 80))] * 3)
    many = draw(tmp_path / "many.png", *[example((64, 80)), example((80, 64))] * 3)
    assert many.shape[1] > 1.9 * few.shape[1]
    assert max(many.shape) < 2100


def test_no_boxes_at_all(tmp_path):
    image, _, _ = example((64, 80))
    nothing = {"boxes": np.zeros((0, 4)), "labels": []}
    sheet = draw(tmp_path / "sheet.png", (image, nothing, {**nothing, "scores": []})).astype(int)
    assert (sheet.max(axis=-1) - sheet.min(axis=-1)).max() < 30


def test_bad_input(tmp_path):
    image, truth, prediction = example((64, 80))
    with pytest.raises(ValueError, match="at least one, got 0, 0 and 0"):
        draw_predictions([], [], [], NAMES, tmp_path / "sheet.png")
    with pytest.raises(ValueError, match="got 1, 2 and 1"):
        draw_predictions([image], [truth, truth], [prediction], NAMES, tmp_path / "sheet.png")
    assert not any(tmp_path.iterdir())
