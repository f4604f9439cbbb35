from __future__ import annotations

import numpy as np
import pytest
from PIL import ImageDraw

from flaxdet.results import draw
from flaxdet.results.draw import draw_detections, side_by_side


def detection(boxes, labels=None, scores=None):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    labels = np.arange(1, len(boxes) + 1) if labels is None else np.array(labels)
    scores = np.linspace(0.9, 0.5, len(boxes)) if scores is None else np.array(scores)
    return {"boxes": boxes, "labels": labels, "scores": scores}


@pytest.fixture
def grey():
    return np.full((200, 300, 3), 127, np.uint8)


@pytest.fixture
def captions(monkeypatch):
    """The texts that are written, with the pixels that they cover."""
    written = []
    write = ImageDraw.ImageDraw.text

    def text(self, xy, text, **kwargs):
        written.append((text, self.textbbox(xy, text, font=kwargs["font"], anchor=kwargs["anchor"])))
        return write(self, xy, text, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return written


def test_draws_the_frame_and_nothing_far_from_it(grey):
    before = grey.copy()
    result = draw_detections(grey, detection([[50, 60, 250, 180]], scores=[0.75]), line_width=2)
    assert result.dtype == np.uint8
    assert result.shape == grey.shape
    np.testing.assert_array_equal(grey, before)
    colour = np.array(draw._colour(1))
    for edge in (result[60:62, 50:250], result[178:180, 50:250], result[60:180, 50:52], result[60:180, 248:250]):
        assert (edge == colour).all()
    assert (result[62:178, 52:248] == 127).all()
    assert (result[185:] == 127).all()
    assert (result[40:60, 50:70] != 127).any()  # the caption stands above


def test_captions_name_class_and_score(grey, captions):
    boxes = [[10, 40, 90, 90], [110, 40, 190, 90], [210, 40, 290, 90]]
    draw_detections(grey, detection(boxes, [0, 2, 7], [0.999, 0.5, 0.123]), categories=["cat", "dog", "emu"])
    assert [text for text, _ in captions] == ["cat 1.00", "emu 0.50", "class 7 0.12"]
    captions.clear()
    draw_detections(grey, detection(boxes, [0, 2, 7]), categories={7: "gnu"}, score_threshold=0.7)
    assert [text for text, _ in captions] == ["class 0 0.90", "class 2 0.70"]
    captions.clear()
    draw_detections(grey, {"boxes": np.array(boxes), "labels": np.array([1, 1, 1])}, categories=["", "box"])
    assert [text for text, _ in captions] == ["box"] * 3


@pytest.mark.parametrize("shape", [(200, 300), (40, 1000), (1000, 60), (64, 64), (1500, 2000)])
def test_captions_stay_inside_and_hide_none(shape, captions):
    height, width = shape
    rng = np.random.default_rng(0)
    corner = rng.uniform(-0.1, 1, (30, 2)) * [width, height]
    boxes = np.concatenate((corner, corner + rng.uniform(0, 0.5, (30, 2)) * [width, height]), axis=1)
    result = draw_detections(np.zeros((height, width, 3), np.uint8), detection(boxes, rng.integers(0, 91, 30)))
    assert result.shape == (height, width, 3)
    assert captions
    places = [place for _, place in captions]
    for x1, y1, x2, y2 in places:
        assert x1 >= 0
        assert y1 >= 0
        assert x2 <= width
        assert y2 <= height
    for i, a in enumerate(places):
        for b in places[:i]:
            assert a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3]


def test_the_best_gets_its_caption_where_there_is_room_for_one(captions):
    image = np.zeros((16, 60, 3), np.uint8)
    boxes = [[0, 0, 60, 16]] * 3
    draw_detections(image, detection(boxes, [1, 2, 3], [0.2, 0.9, 0.4]))
    assert [text for text, _ in captions] == ["class 2 0.90"]


def test_line_and_font_grow_with_the_image(monkeypatch):
    sizes = []
    choose = draw.choose_font
    monkeypatch.setattr(draw, "choose_font", lambda text, size, font: sizes.append(size) or choose(text, size, font))
    widths = []
    for side in (64, 640, 4000):
        image = draw_detections(np.zeros((side, side, 3), np.uint8), detection([[side / 4] * 2 + [side] * 2]))
        row = image[side - side // 8]
        widths.append(int((row[: side // 2] != 0).any(axis=1).sum()))
    assert widths[0] == 1
    assert widths[0] < widths[1] < widths[2]
    assert sizes[0] == 9
    assert sizes[0] < sizes[1] < sizes[2]


def test_boxes_beyond_the_image_empty_and_not_finite(grey):
    boxes = [[-50, -50, 400, 300], [500, 500, 600, 600], [20, 20, 20, 20], [90, 80, 40, 30], [np.nan, 0, 9, 9]]
    result = draw_detections(grey, detection([*boxes, [0, 0, np.inf, 9]]))
    assert result.shape == grey.shape
    unchanged = draw_detections(grey, detection(boxes[4:]))
    np.testing.assert_array_equal(unchanged, grey)
    np.testing.assert_array_equal(draw_detections(grey, detection([])), grey)
    assert draw_detections(grey[:1, :1], detection([[0, 0, 1, 1]])).shape == (1, 1, 3)


def test_classes_have_colours_of_their_own():
    colours = np.array([draw._colour(label) for label in range(91)], int)
    distances = np.abs(colours[:, None] - colours[None]).sum(axis=-1) + 999 * np.eye(91, dtype=int)
    assert distances.min() >= 15
    # the few classes of a small data set are far apart
    assert distances[:8, :8].min() >= 120
    for colour in colours:
        background = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
        assert abs(background - draw._text_colour(tuple(colour))[0]) > 90


def test_side_by_side(grey, captions):
    left, right = grey, np.zeros((100, 150, 3), np.uint8)
    picture = side_by_side(left, right, ("torchvision", "a title much too long for so small a picture"))
    bar = picture.shape[0] - 200
    assert 0 < bar < 60
    np.testing.assert_array_equal(picture[bar:, :300], left)
    np.testing.assert_array_equal(picture[bar : bar + 100, -150:], right)
    assert (picture[bar + 100 :, -150:] == 255).all()
    assert (picture[:bar] != 255).any()
    assert captions[0][0] == "torchvision"
    assert "…" in captions[1][0]
    assert captions[1][1][0] >= picture.shape[1] - 150
    assert captions[1][1][2] <= picture.shape[1]


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)]
)
def test_bad_images(image):
    with pytest.raises(ValueError, match=r"image must be uint8 \[H, W, 3\], found"):
        draw_detections(image, detection([]))


def test_bad_detections(grey):
    for change in ({"boxes": np.zeros((2, 4))}, {"scores": np.zeros(3)}, {"boxes": np.zeros((1, 5))}):
        with pytest.raises(ValueError, match=r"boxes must be \[N, 4\], labels and scores \[N\], found"):
            draw_detections(grey, detection([[0, 0, 9, 9]]) | change)
