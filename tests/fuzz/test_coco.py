"""Damaged annotations and results: each is read, or refused with a ValueError of one line that names the file."""

from __future__ import annotations

import copy
import json
import random

import numpy as np
import pytest
from PIL import Image

from flaxdet.data import read_coco
from flaxdet.evaluation.evaluate import evaluate_results
from tests.fuzz.data_cases import mutate, seeds

pytest.importorskip("pycocotools")
pytestmark = pytest.mark.filterwarnings("ignore::flaxdet.data.coco.DatasetWarning")

SIZES = [(40, 60), (30, 30), (24, 48), (48, 24)]
# what tools and people write where something else belongs
ODD = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 0.5, 1e9, -1e308, 10**30, 2**63, 1e-320, float("nan"), float("inf")),
    *("", "0", "1", "-1", "7", "007", "1.5", "1e400", "nan", "true", " ", "a", "a.png", "0.png", "..", "/", ".", "\0"),
    *(
        "x" * 300,
        "\ud800",
        "sub\\0.png",
        "my%20photo.png",
        "é",
        "%",
        [],
        {},
        [1, 2],
        [1, 2, 3, 4],
        ["1", "2", "3", "4"],
    ),
    *(
        [1, 2, 3, None],
        [[1, 2, 3, 4]],
        [0.1, 0.2, 0.3, 0.4],
        [-5, -5, 900, 900],
        {"id": 1},
        {"counts": [1], "size": [1]},
    ),
]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder of four images, one with an orientation, and its annotations."""
    folder = tmp_path_factory.mktemp("good")
    rng = np.random.default_rng(0)
    content = {"images": [], "annotations": [], "categories": [{"id": i, "name": name} for i, name in enumerate("abc")]}
    for key, (rows, columns) in enumerate(SIZES):
        exif = Image.Exif()
        exif[0x0112] = 1 if key < 3 else 6
        Image.fromarray(rng.integers(0, 256, (rows, columns, 3)).astype(np.uint8)).save(
            folder / f"{key}.png", exif=exif
        )
        content["images"].append({"id": key, "file_name": f"{key}.png", "height": rows, "width": columns})
        for _ in range(3):
            box = [*rng.integers(0, 15, 2).tolist(), *rng.uniform(2, 9, 2).round(2).tolist()]
            row = {"id": len(content["annotations"]), "image_id": key, "category_id": int(rng.integers(3)), "bbox": box}
            content["annotations"].append(row | {"iscrowd": int(rng.random() < 0.2), "area": box[2] * box[3]})
    return folder, content


def places(content, path=()):
    """The path of every value."""
    yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def with_odd_values(content, rng):
    """The content with one to three values replaced, removed, doubled or moved."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        left = [place for place in places(content) if place]
        if not left:
            return content
        *path, last = rng.choice(left)
        parent = content
        for key in path:
            parent = parent[key]
        match rng.randrange(6):
            case 0:
                del parent[last]
            case 1 if isinstance(parent, list):
                parent.append(copy.deepcopy(parent[last]))
            case 2:
                parent[last] = str(parent[last])
            case 3 if isinstance(parent[last], (int, float)):
                parent[last] = parent[last] * rng.choice((-1, 1e-3, 10, 100, 1e12))
            case 4 if isinstance(parent, dict):
                parent[rng.choice([*parent, "height", "iscrowd"])] = parent[last]
            case _:
                parent[last] = copy.deepcopy(rng.choice(ODD))
    return content


def refused(error, *names):
    """Checks the message of a documented error."""
    assert "\n" not in str(error)
    assert len(str(error)) < 2000
    assert any(str(name) in str(error) for name in names)


def check_dataset(folder, path, rng):
    """Reads a file by read_coco and evaluate_results; True if it is read."""
    options = rng.choice(
        (
            {},
            {"remove_empty": True},
            {"skip_broken": True},
            {"upright": False},
            {"upright": True},
            {"drop_unused": True},
            {"num_classes": 3},
            {"categories": ["__background__", "a", "b", "c"]},
        )
    )
    accepted = True
    try:
        evaluate_results([], path)
    except ValueError as error:
        accepted = False
        refused(error, path)
    try:
        dataset = read_coco(folder, path, **options)
    except ValueError as error:
        refused(error, path, folder)
        return False
    assert accepted, "read_coco takes what evaluate_results refuses"
    for i, record in enumerate(dataset):
        assert dataset.read_image(i).shape[:2] == record.size
        assert record.boxes.dtype == np.float32
        assert (record.boxes[:, 2:] > record.boxes[:, :2]).all()
        assert (record.boxes >= 0).all()
        assert (record.boxes[:, 2:] <= np.array(record.size[::-1], np.float32)).all()
        assert set(record.labels.tolist()) <= set(dataset.category_ids)
    assert str(dataset.summary)
    return True


def run(kind, case):
    """Runs ``case(rng)``, which tells whether the input was read, on every seed."""
    read = 0
    for seed in seeds():
        try:
            read += case(random.Random(f"{kind} {seed}"))
        except Exception as error:
            raise AssertionError(f"{kind}, seed {seed}: {type(error).__name__}: {error}") from error
    print(f"{kind}: {len(seeds())} cases, {read} of them read, no fault")
    assert 0 < read < len(seeds()) or len(seeds()) < 20  # the loop sees both outcomes


def test_odd_values(good, tmp_path):
    folder, content = good
    path = tmp_path / "a.json"

    def case(rng):
        path.write_text(json.dumps(with_odd_values(content, rng)))
        return check_dataset(folder, path, rng)

    run("values", case)


def test_damaged_json(good, tmp_path):
    folder, content = good
    path = tmp_path / "a.json"

    def case(rng):
        encoding = rng.choice(("utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"))
        path.write_bytes(mutate(json.dumps(content, ensure_ascii=False).encode(encoding), rng))
        return check_dataset(folder, path, rng)

    run("bytes", case)


def test_damaged_photos(good, tmp_path):
    """Each case damages, renames or removes one of the photos."""
    folder, content = good
    images = tmp_path / "images"
    images.mkdir()
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}

    def case(rng):
        for file in images.iterdir():
            file.unlink()
        for name, data in whole.items():
            (images / name).write_bytes(data)
        name = rng.choice(sorted(whole))
        match rng.randrange(3):
            case 0:
                (images / name).rename(images / rng.choice(("other.png", name.upper(), f"{name}.jpg")))
            case 1:
                (images / name).unlink()
            case _:
                (images / name).write_bytes(mutate(whole[name], rng))
        try:
            dataset = read_coco(images, path, skip_broken=rng.random() < 0.7, upright=rng.choice((None, True, False)))
        except ValueError as error:
            refused(error, path)
            return False
        for i, record in enumerate(dataset):
            try:
                assert dataset.read_image(i).shape[:2] == record.size
            except ValueError as error:  # damage inside the pixels, which no header tells
                refused(error, record.path)
                assert not dataset.report["skipped_images"]
        return True

    run("photos", case)


def test_odd_results(good, tmp_path):
    _, content = good
    rng = random.Random(0)
    rows = [
        {"image_id": rng.randrange(4), "category_id": rng.randrange(3), "bbox": [3, 4, 5.5, 6], "score": rng.random()}
        for _ in range(12)
    ]
    path = tmp_path / "rows.json"

    def case(rng):
        changed = with_odd_values({"rows": rows}, rng)
        path.write_text(json.dumps(changed.get("rows", changed)))
        try:
            result = evaluate_results(path, content)
        except ValueError as error:
            refused(error, path)
            return False
        assert result.ap is None or 0 <= result.ap <= 1
        return True

    run("results", case)
