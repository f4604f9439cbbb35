"""Letters of class names: every one is drawn, or said to be missing."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageFont

from flaxdet.results import fonts
from flaxdet.results.draw import draw_detections
from flaxdet.results.fonts import MissingLettersWarning, choose_font, load_font, missing_letters, what_is_missing

GREY = np.full((120, 300, 3), 127, np.uint8)


def drawn(name, **options):
    found = {"boxes": np.array([[20.0, 40, 280, 110]]), "labels": np.array([0])}
    return draw_detections(GREY, found, categories=[name], font_size=20, **options)


@pytest.fixture
def dejavu() -> str:
    pytest.importorskip("matplotlib", reason="an extra, which carries DejaVu Sans")
    path = fonts.dejavu()
    assert path is not None
    return path


@pytest.fixture
def no_dejavu(monkeypatch):
    monkeypatch.setattr(fonts, "dejavu", lambda: None)


@pytest.mark.parametrize("name", ["кошка", "γάτα", "chat à l'œil", "ćma", "հավ", "قطة"])
def test_names_beyond_ascii_have_their_letters(name, dejavu):
    """By DejaVu's own table of characters, read by matplotlib; each letter makes another picture."""
    from matplotlib import ft2font

    known = ft2font.FT2Font(dejavu).get_charmap()
    assert all(ord(letter) in known for letter in name)
    assert missing_letters(name, dejavu) == ""
    pictures = {drawn(letter).tobytes() for letter in set(name) if letter.isalpha()}
    assert len(pictures) == len({letter for letter in name if letter.isalpha()})


def test_missing_letters_by_the_fonts_own_table(dejavu):
    from matplotlib import ft2font

    known = ft2font.FT2Font(dejavu).get_charmap()
    text = "".join(map(chr, [*range(0x21, 0x7F), *range(0xA1, 0x250), *range(0x400, 0x460), *range(0x4E00, 0x4E20)]))
    text = "".join(letter for letter in text if letter.isprintable() and not letter.isspace())
    assert missing_letters(text, dejavu) == "".join(letter for letter in text if ord(letter) not in known)
    assert len(missing_letters(text, dejavu)) >= 32


def test_ascii_keeps_the_font_that_pillow_carries(dejavu):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_font("person .98", 12, None).path != dejavu
        assert choose_font("кошка .98", 12, None).path == dejavu


def test_letters_that_no_font_has_are_warned_of(dejavu):
    with pytest.warns(
        MissingLettersWarning, match=r"no font at hand has these letters .*: 猫; expected a font file by --font"
    ):
        drawn("猫 cat")


def test_without_dejavu_the_warning_says_what_to_install(no_dejavu):
    with pytest.warns(MissingLettersWarning, match=r": кош; expected matplotlib, .*pip install matplotlib.*--font"):
        drawn("кош")


def test_dejavu_is_found_without_an_import_of_matplotlib(monkeypatch):
    monkeypatch.setattr(fonts.importlib.util, "find_spec", lambda name: None)
    fonts.dejavu.cache_clear()
    try:
        assert fonts.dejavu() is None
    finally:
        fonts.dejavu.cache_clear()
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # find_spec then raises ValueError
    monkeypatch.undo()


def test_a_font_of_the_users_own(dejavu, no_dejavu):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = drawn("кошка", font=dejavu)
    with pytest.warns(MissingLettersWarning):
        assert not np.array_equal(own, drawn("кошка"))
    with pytest.warns(MissingLettersWarning, match=f"the font {dejavu} lacks letters of class names, .*: 猫"):
        drawn("猫", font=Path(dejavu))


def test_a_file_that_is_no_font(tmp_path):
    with pytest.raises(ValueError, match=r"none\.ttf: no such file, expected a font file"):
        load_font(tmp_path / "none.ttf", 12)
    (tmp_path / "text.ttf").write_text("no font")
    with pytest.raises(ValueError, match=r"text\.ttf: cannot be read .*expected a font file"):
        drawn("a", font=tmp_path / "text.ttf")


@pytest.mark.parametrize("name", ["two\nlines", "a\ttab", "\0", "half \udcff", "\u2028", "", "x" * 100_000])
def test_names_that_are_no_single_line(name):
    assert drawn(name).shape == GREY.shape


def test_what_is_missing_of_many_names(no_dejavu):
    assert what_is_missing(["person", "dog", ""], None) is None
    assert "кот" in str(what_is_missing(["кот", "dog"], None))
    assert isinstance(ImageFont.load_default(12), ImageFont.FreeTypeFont)
