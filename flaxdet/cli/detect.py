"""``flaxdet detect``: images in, JSON and annotated pictures out."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from flaxdet.cli.demo import check_demo, demo_photos, load_demo, print_next
from flaxdet.cli.options import (
    ModelName,
    Quiet,
    Size,
    check_sizes,
    check_threshold,
    free_name,
    given_names,
    labels_of,
    load_with_names,
    make_folder,
)

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Detect:
    """Detect objects in images.

    Writes OUT/detections.json (boxes as x1, y1, x2, y2 in pixels of each image) and one annotated picture an image.
    An image that is missing or can't be read is reported, the others are done; the exit status is then 1.

    Options that take several values end with the next option, so images come first:
    flaxdet detect photo.jpg 'more/*.png' --classes person dog

    flaxdet detect --demo needs no image and downloads nothing.
    """

    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE...", help_behavior_hint="")]
    """Files, folders (with their subfolders) or patterns such as 'photos/*.jpg'."""

    demo: tyro.conf.FlagCreatePairsOff[bool] = False
    """Find blood cells in two photos that come with flaxdet, by weights that come with it too."""

    weights: str = "COCO_V1"
    """A file (.safetensors or .pth, ours or torchvision's), or the name of published weights (downloaded once)."""

    model: Annotated[ModelName | None, Quiet] = None
    """Which detector; told by the file where WEIGHTS is one. Default fcos_resnet50_fpn."""

    out: Path = Path("detections")
    """Folder to write to."""

    threshold: Annotated[float | None, Quiet] = None
    """Only scores above this, from 0 to 1. Default: the model's (FCOS .2, Faster R-CNN .05), .4 with --demo."""

    classes: Annotated[tuple[str, ...], Quiet, tyro.conf.arg(metavar="CLASS...")] = ()
    """Only these classes, by name (person 'traffic light') or number. Default: all."""

    categories: Annotated[Path | None, Quiet] = None
    """Names of the labels, for weights that carry none: COCO annotations, a JSON list, or a name a line."""

    min_size: Size = None
    """Resize the shorter side to this many pixels. Default: 800, or what the file says."""

    max_size: Size = None
    """But the longer side to no more than this. Default: 1333, or what the file says."""

    batch_size: int = 1
    """Images at a time; the answers do not depend on it."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 is faster on GPU and TPU, and a little less exact."""

    pictures: bool = True
    """Write annotated pictures."""

    progress: bool = True
    """Show progress bars."""

    def run(self) -> int:
        """Runs the command; returns the exit status."""
        check_threshold(self.threshold)
        check_sizes(self.min_size, self.max_size)
        if self.batch_size < 1:
            raise ValueError(f"--batch-size should be at least 1, got {self.batch_size}")
        if self.demo:
            check_demo(self)
            return dataclasses.replace(self, images=demo_photos())._detect()
        if not self.images:
            raise ValueError("expected at least one image, folder or pattern, before the options")
        return self._detect()

    def _detect(self) -> int:
        import numpy as np
        from PIL import Image
        from tqdm import tqdm

        from flaxdet.files.checkpoint import replacing
        from flaxdet.images.decode import ImageError, read_image
        from flaxdet.inference.predictor import Predictor
        from flaxdet.results.draw import draw_detections

        given = given_names(self.categories)
        make_folder(self.out)
        paths, failed = self._find()
        model, variables, names = load_demo(self) if self.demo else load_with_names(self, given)
        wanted = labels_of(self.classes, names, model.num_classes)

        done: list[dict[str, Any]] = []
        # a picture must not replace one of the photos, as `detect . --out .` would
        taken = {path.name.casefold() for path in paths if path.resolve().parent == self.out.resolve()}
        images: dict[int, np.ndarray] = {}  # those on their way, for their pictures

        def source(number: int) -> Callable[[], np.ndarray]:
            def read() -> np.ndarray:
                images[number] = read_image(paths[number])
                return images[number]

            return read

        predictor = Predictor(model, variables, batch_size=self.batch_size)
        del variables  # the predictor has its own, folded
        stream = predictor.stream(source(number) for number in range(len(paths)))
        results = tqdm(stream, total=len(paths), unit="image", disable=not self.progress or len(paths) < 2)
        for (number, path), found in zip(enumerate(paths), results, strict=True):
            image = images.pop(number, None)
            try:
                if isinstance(found, Exception):
                    raise found
                assert image is not None
                if wanted is not None:
                    kept = np.isin(found["labels"], sorted(wanted))
                    found = {field: values[kept] for field, values in found.items()}
                record: dict[str, Any] = {"file": str(path), "height": image.shape[0], "width": image.shape[1]}
                if self.pictures:
                    target = self.out / _picture_name(path, taken)
                    drawn = Image.fromarray(draw_detections(image, found, categories=names))
                    with replacing(target) as file:
                        drawn.save(file, format="PNG" if target.suffix == ".png" else "JPEG", quality=92)
                    record["picture"] = str(target)
                done.append({**record, "detections": _rows(found, names)})
            except (ImageError, ValueError, OSError) as error:  # this image's fault: the others are done all the same
                message = str(error) if str(path) in str(error) else f"{path}: {error}"
                failed.append({"file": str(path), "error": message})
                tqdm.write(message, file=sys.stderr)

        result = {"weights": "demo" if self.demo else self.weights, "images": done, "failed": failed}
        target = self.out / "detections.json"
        with replacing(target) as file:
            file.write(json.dumps(result, indent=1).encode())
        total = sum(len(record["detections"]) for record in done)
        print(f"{total} detections in {len(done)} images -> {target}")
        if failed:
            print(f"{len(failed)} of {len(failed) + len(done)} failed (listed in {target})", file=sys.stderr)
        if self.demo:
            print_next([Path(record["picture"]) for record in done if self.pictures])
        return 1 if failed else 0

    def _find(self) -> tuple[list[Path], list[dict[str, str]]]:
        """The image files, sorted, and the arguments that match none."""
        from flaxdet.images.decode import ImageError, find_images

        found: dict[Path, Path] = {}
        failed: list[dict[str, str]] = []
        out = self.out.resolve()
        for argument in self.images:
            try:
                files = find_images([argument])
            except ImageError as error:
                failed.append({"file": argument, "error": str(error)})
                continue
            # a folder's subfolders count, but not the one with the results of the last run
            below = Path(argument).expanduser().resolve() in out.parents
            for file in files:
                if not (below and out in file.resolve().parents):
                    found.setdefault(file.resolve(), file)
        if not found:
            raise ImageError("; ".join(row["error"] for row in failed) or f"no images besides those in {self.out}")
        for row in failed:
            print(row["error"], file=sys.stderr)
        return sorted(found.values()), failed


def _picture_name(path: Path, taken: set[str]) -> str:
    """The image's name as .jpg or .png, numbered where folders hold the same name twice."""
    return free_name(path.stem, ".png" if path.suffix.lower() == ".png" else ".jpg", taken)


def _rows(found: dict[str, Any], names: list[str] | None) -> list[dict[str, Any]]:
    rows = []
    for box, score, label in zip(found["boxes"], found["scores"], found["labels"], strict=True):
        row = {"box": [float(x) for x in box], "score": float(score), "label": int(label)}
        if names is not None and int(label) < len(names):
            row["category"] = names[int(label)]
        rows.append(row)
    return rows
