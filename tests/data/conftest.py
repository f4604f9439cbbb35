"""Data sets of coloured rectangles: one to load, and one in files to read and to spoil."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from flaxdet.data import read_coco
from tests.tiny import write_coco


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """16 images of four shapes."""
    folder = tmp_path_factory.mktemp("data")
    images, path = write_coco(folder, 16)
    content = json.loads(path.read_text())
    for i, entry in enumerate(content["images"]):
        columns, rows = [(80, 64), (64, 80), (70, 64), (80, 64)][i % 4]
        file = images / entry["file_name"]
        Image.open(file).resize((columns, rows)).save(file)
        entry.update(width=columns, height=rows)
    path.write_text(json.dumps(content))
    return read_coco(images, path)


@pytest.fixture
def tiny(tmp_path) -> tuple[Path, Path]:
    return write_coco(tmp_path, 5)
