"""Photos that a camera stored turned: upright by default, boxes too; and what tells when boxes were drawn otherwise."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from flaxdet.data import DatasetWarning, ImageError, read_coco

ROWS, COLUMNS = 40, 60  # of the upright photos
# how a camera stores an upright photo, for each value of the tag (as in test_decode)
STORED = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: np.rot90(p, 1),
    7: lambda p: np.rot90(p, 2).swapaxes(0, 1),
    8: lambda p: np.rot90(p, -1),
}
WIDE = [45, 5, 10, 10]  # fits 40x60 (rows x columns), not 60x40
TALL = [5, 45, 10, 10]  # fits 60x40 alone
BOTH = [5, 5, 10, 10]


def photo(seed=0, shape=(ROWS, COLUMNS)):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def write(folder, entries, extension="png"):
    """Entries (orientation, stated size or None, boxes, shape of the upright photo)."""
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    for key, (orientation, stated, boxes, *shape) in enumerate(entries):
        exif = Image.Exif()
        exif[0x0112] = orientation
        pixels = np.ascontiguousarray(STORED[orientation](photo(key, *shape)))
        name = f"{key}.{extension}"
        Image.fromarray(pixels).save(folder / name, exif=exif)
        entry = {"id": key, "file_name": name}
        content["images"].append(entry | ({} if stated is None else {"height": stated[0], "width": stated[1]}))
        content["annotations"] += [{"image_id": key, "category_id": 1, "bbox": box} for box in boxes]
    path = folder / "a.json"
    path.write_text(json.dumps(content))
    return folder, path


@pytest.mark.parametrize("stated", [(40, 60), (60, 40), None])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_upright_whichever_size_is_stated(orientation, stated, tmp_path):
    found = read_coco(*write(tmp_path, [(orientation, stated, [WIDE])]))
    assert found[0].size == (40, 60)
    np.testing.assert_array_equal(found[0].boxes, [[45, 5, 55, 15]])
    np.testing.assert_array_equal(found.read_image(0), photo())
    assert found.report["oriented"] == 1
    assert found.report["clipped"] == 0
    assert (
        "1 of 1 photos carry an EXIF orientation: photos and boxes are taken upright (--as-stored: as stored)"
        in str(found.summary).splitlines()
    )
    assert found.summary.warnings == ()


@pytest.mark.parametrize("stated", [(40, 60), (60, 40), None])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_as_stored(orientation, stated, tmp_path):
    pair = write(tmp_path, [(orientation, stated, [TALL])])
    with pytest.raises(ImageError, match=r"a\.json: .*\(0\.png: 1 in all\).*\(1 in all\).*--as-stored .*--upright"):
        read_coco(*pair)
    found = read_coco(*pair, upright=False)
    assert found[0].size == (60, 40)
    np.testing.assert_array_equal(found[0].boxes, [[5, 45, 15, 55]])
    np.testing.assert_array_equal(found.read_image(0), STORED[orientation](photo()))
    assert "taken as stored" in str(found.summary)
    with pytest.warns(DatasetWarning, match="1 photo with boxes that leave the photo upright and fit it as stored"):
        forced = read_coco(*pair, upright=True)
    assert (forced[0].size, forced.report["outside"]) == ((40, 60), 1)


def test_as_stored_although_the_boxes_are_upright(tmp_path):
    with pytest.warns(DatasetWarning, match="1 photo with boxes that leave the photo as stored and fit it upright"):
        read_coco(*write(tmp_path, [(6, (60, 40), [WIDE])]), upright=False)


@pytest.mark.parametrize(
    ("entries", "count"),
    [
        ([(3, (40, 60), [WIDE])], 1),
        ([(2, (40, 60), [BOTH]), (4, None, [BOTH]), (1, None, [BOTH])], 2),
        ([(6, (50, 50), [BOTH], (50, 50))], 1),
        ([(6, (60, 40), [BOTH])], 1),
        ([(6, None, [BOTH])], 1),
        ([(6, (40, 60), [BOTH])], 0),  # the size says that the tool turned the photo
        ([(6, (60, 40), [BOTH]), (6, (60, 40), [WIDE])], 0),  # the other photo says so
        ([(3, (40, 60), [BOTH]), (6, (60, 40), [WIDE])], 1),  # but tools may differ where the size is the same
        ([(3, (40, 60), []), (6, (60, 40), [])], 0),  # no box can be wrong
        ([(1, (40, 60), [BOTH])], 0),
    ],
)
def test_where_nothing_tells_there_is_a_warning_with_the_count(entries, count, tmp_path):
    pair = write(tmp_path, entries)
    if not count:
        assert read_coco(*pair).summary.warnings == ()
        return
    noun = "photo" if count == 1 else "photos"
    with pytest.warns(DatasetWarning, match=f"nothing tells whether the boxes of {count} {noun} .* taken upright"):
        read_coco(*pair)
    with pytest.warns(DatasetWarning) as caught:
        read_coco(*pair, upright=False)
    assert any("taken as stored" in str(warning.message) for warning in caught)


def test_rounding_does_not_make_an_error(tmp_path):
    """A box that reaches out of the upright photo by less than a pixel."""
    pair = write(tmp_path, [(6, (40, 60), [[10, 30.5, 9, 10.2]])])
    assert read_coco(*pair)[0].boxes[0, 3] == 40


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("options", [{}, {"upright": False}, {"upright": True}])
def test_a_size_that_agrees_with_neither(orientation, options, tmp_path):
    pair = write(tmp_path, [(orientation, (41, 60), [BOTH])])
    text = r"0\.png: is 40x60 pixels \(rows x columns\), but .*a\.json says 41x60"
    if orientation == 6:
        text = r"0\.png: is 60x40 pixels \(rows x columns\) as stored and 40x60 upright, but .*a\.json says 41x60"
    with pytest.raises(ImageError, match=text):
        read_coco(*pair, **options)


@pytest.mark.parametrize("extension", ["jpg", "tif", "webp"])
def test_in_every_format(extension, tmp_path):
    found = read_coco(*write(tmp_path, [(6, (60, 40), [WIDE])], extension))
    assert (found[0].size, found.read_image(0).shape) == ((40, 60), (40, 60, 3))


def test_the_real_case(shared):
    folder = shared / "cases" / "exif-eval-labelstudio"
    found = read_coco(folder / "images", folder / "train.json")
    assert (found.report["oriented"], found.report["clipped"], found.summary.warnings) == (8, 0, ())
    assert {record.size for record in found} == {(480, 640)}
