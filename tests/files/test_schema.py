"""The schema of flaxdet's JSON, and JSON that is refused before."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from flaxdet.files import json_text, schema
from flaxdet.train import _note

GOOD_NAMES = ["a", "model.safetensors", "detect-64x96-batch8.stablehlo", "Ω.pth", ".hidden", "console.txt", "com.txt"]
BAD_NAMES = [
    "",
    ".",
    "..",
    "../a",
    "/a",
    "a/b",
    "a\\b",
    "C:a",
    "\\\\s\\a",
    "nul",
    "NUL.txt",
    "com1",
    "Lpt9.x",
    "a ",
    " a",
    "a.",
]
BAD_NAMES += ["a\x00", "a\nb", "x" * 300, "a*", "a?", '"a"', "<a>", "a|b", None, 3, ["a"], "\ud800"]


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_names_of_files(name):
    schema.file_name(name, "file")


@pytest.mark.parametrize("name", BAD_NAMES)
def test_paths_and_devices(name):
    with pytest.raises(ValueError, match=r"file should be (the name of a file|a text of one line)"):
        schema.file_name(name, "file")


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (schema.number, [0, -1.5, 1e38, 2**60], [True, None, "1", float("nan"), float("inf"), 1e39, 10**40, [1]]),
        (schema.integer(1, 5), [1, 5], [0, 6, 1.0, True, None, "1"]),
        (schema.boolean, [True, False], [0, 1, None, "true"]),
        (schema.sha256, ["0" * 64, "af" * 32], ["0" * 63, "0" * 65, "G" * 64, "A" * 64, 3, None]),
        (
            schema.date,
            ["2026-01-31", "2024-02-29"],
            ["2026-02-30", "2025-02-29", "20260131", "2026-1-1", 20260131, None, ""],
        ),
        (schema.one_of("cpu", "tpu"), ["cpu"], ["gpu", "", None, ["cpu"], 1]),
        (schema.optional(schema.boolean), [None, True], [0]),
        (schema.list_of(schema.boolean, 1, 2), [[True], [True, False]], [[], [True] * 3, (True,), None, [1], {}]),
        (schema.mapping(schema.number, 2), [{}, {"a": 1}], [[], {"a": None}, {"a": 1, "b": 2, "c": 3}, {"a\nb": 1}]),
        (
            schema.record({"a": schema.number}, {"b": schema.number}),
            [{"a": 1}, {"a": 1, "b": 2, "c": None}],
            [{}, {"a": "1"}],
        ),
        (schema.record({"a": schema.number}, {"b": schema.number}), [], [{"a": 1, "b": "2"}, [], None]),
        (
            schema.CATEGORIES,
            [None, [], ["a", "Ω 👨‍👩‍👧"]],
            ["a", [1], [None], ["a\x1b[2J"], ["a\u202eb"], ["\ud800"], ["x" * 1001], {}],
        ),
        (
            schema.METRICS,
            [None, {}, {"AP": 0.5, "AP50": None}],
            [[], {"AP": "0.5"}, {"AP": [1]}, {"AP": float("nan")}, 3],
        ),
    ],
)
def test_checks(check, good, bad):
    for value in good:
        check(value, "here")
    for value in bad:
        with pytest.raises(ValueError, match=r"here") as info:
            check(value, "here")
        assert len(str(info.value)) < 300


def test_where_a_fault_is():
    check = schema.record(
        {"programs": schema.list_of(schema.record({"bucket": schema.list_of(schema.integer(1), 2, 2)}))}
    )
    with pytest.raises(
        ValueError, match=r"^programs\[1\]\.bucket\[0\] should be an integer from 1 to 2147483647, got 0$"
    ):
        check({"programs": [{"bucket": [1, 2]}, {"bucket": [0, 2]}]}, "")
    with pytest.raises(ValueError, match=r"^programs\[0\]\.bucket is missing$"):
        check({"programs": [{}]}, "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("NaN", "NaN is no number"),
        ("[-Infinity]", "-Infinity is no number"),
        ('{"a": 1e999}', "the number 1e999 is not finite"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' occurs twice"),
        ('"\\ud800"', "no text in UTF-8"),
        (b"\xff\xfe", "no text in UTF-8"),
        ("[" * 10**6, "nested too deep"),
        ('{"a":' * 10**5, "nested too deep"),
        ("1" * 5000, "Exceeds the limit"),
        ("[1,]", "Expecting value|Illegal trailing comma"),
        ("", "Expecting value"),
        (b" " * (5 << 20), "5,242,880 bytes, expected at most 4,194,304"),
    ],
    ids=lambda value: str(value)[:20].strip(),
)
def test_json_that_is_refused(text, expected):
    with pytest.raises(ValueError, match=expected):
        json_text.loads(text)


def test_json_that_is_read():
    assert json_text.loads('{"a": [1, -2.5e3, null, true, "\\u00e9\\ud83d\\ude00"]}') == {
        "a": [1, -2500.0, None, True, "é😀"]
    }
    assert json_text.loads(b"\xef\xbb\xbf[1]") == [1]


def test_metrics_json(tmp_path):
    """The figures of a checkpoint: as an older flaxdet wrote them, and with a checksum; NaN is null."""
    path = tmp_path / _note.METRICS
    assert _note.read_metrics(tmp_path) is None
    path.write_text('{"AP": 0.5, "AP50": null}')
    np.testing.assert_equal(_note.read_metrics(tmp_path), {"AP": 0.5, "AP50": np.nan})
    _note.write_metrics(tmp_path, {"AP": np.nan, "AP50": 0.25})
    assert json.loads(path.read_text())["metrics"] == {"AP": None, "AP50": 0.25}
    np.testing.assert_equal(_note.read_metrics(tmp_path), {"AP": np.nan, "AP50": 0.25})
    path.write_text(path.read_text().replace("0.25", "0.35"))
    with pytest.raises(ValueError, match="metrics changed since the save"):
        _note.read_metrics(tmp_path)
    for content in ('{"AP": NaN}', '{"AP": "x"}', "[]", "<html>", "version https://git-lfs.github.com/spec/v1\n", ""):
        path.write_text(content)
        with pytest.raises(ValueError) as info:  # noqa: PT011  (each has words of its own)
            _note.read_metrics(tmp_path)
        assert str(info.value).isprintable()
    path.unlink()
    os.mkfifo(path)
    assert _note.read_metrics(tmp_path) is None  # no pipe is waited for
