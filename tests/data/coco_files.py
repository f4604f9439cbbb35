"""COCO files of one image, and changes to those on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image


def changed(path: Path, change) -> Path:
    """The file with its content changed in place by a function."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))
    return path


def one_image(folder: Path, boxes: list[Any], size=(20, 30), **extra: Any) -> tuple[Path, Path]:
    """A file of one image with these boxes (or whole annotations)."""
    Image.new("RGB", size[::-1]).save(folder / "a.png")
    own = [box if isinstance(box, dict) else {"bbox": box} for box in boxes]
    content = {
        "images": [{"id": 7, "file_name": "a.png", "height": size[0], "width": size[1]}],
        "annotations": [{"id": i, "image_id": 7, "category_id": 4, **box} for i, box in enumerate(own)],
        "categories": [{"id": 4, "name": "thing"}],
        **extra,
    }
    path = folder / "a.json"
    path.write_text(json.dumps(content))
    return folder, path
