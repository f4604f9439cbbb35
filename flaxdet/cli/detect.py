"""``flaxdet detect``: detects objects in images, and writes JSON and annotated pictures."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from flaxdet.cli.demo import check_demo, demo_photos, load_demo, print_next
from flaxdet.cli.detections_file import DetectionsFile
from flaxdet.cli.options import (
    Key,
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

    Writes OUT/detections.json (boxes as x1, y1, x2, y2 in pixels of the image) and one annotated picture per image, as
    soon as an image is done. A full disk loses pictures, not detections.
    If an image is missing or can't be read, the command reports the image, continues with the other images, and exits
    with status 1.

    An option with several values ends at the next option, so images come first:
    flaxdet detect photo.jpg 'more/*.png' --classes person dog

    flaxdet detect --demo needs no image and downloads nothing.
    """

    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE...", help_behavior_hint="")]
    """Files, folders (with their subfolders) or patterns such as 'photos/*.jpg'."""

    demo: tyro.conf.FlagCreatePairsOff[bool] = False
    """Find blood cells in two photos. The photos and the weights are part of flaxdet."""

    weights: str = "COCO_V1"
    """A file (.safetensors or .pth, flaxdet's or torchvision's), the folder of a run of flaxdet train, or the name of
    published weights (downloaded once)."""

    key: Key = None
    """Which state_dict in the file: its name there (model_ema), or a prefix of keys (teacher). Default: the only one,
    else model, state_dict or model_state_dict."""

    model: Annotated[ModelName | None, Quiet] = None
    """The detector. Default: the detector in the file WEIGHTS, else fcos_resnet50_fpn."""

    out: Path = Path("detections")
    """Folder to write to."""

    threshold: Annotated[float | None, Quiet] = None
    """Keep scores above this, from 0 to 1. Default: the model's value (FCOS .2, Faster R-CNN .05), .4 with --demo."""

    classes: Annotated[tuple[str, ...], Quiet, tyro.conf.arg(metavar="CLASS...")] = ()
    """Keep only these classes, by name (person 'traffic light') or by label number. Default: all classes."""

    categories: Annotated[Path | None, Quiet] = None
    """File of label names, for weights without names: COCO annotations, a JSON list, or text with one name per line."""

    min_size: Size = None
    """Resize the shorter side to this many pixels. Default: the value in the file, else 800."""

    max_size: Size = None
    """Limit of the longer side after the resize, in pixels. Default: the value in the file, else 1333."""

    batch_size: int = 1
    """Images per batch; the detections do not depend on it."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 is faster on GPU and TPU, and a little less precise."""

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
        labels = labels_of(self.classes, names, model.num_classes)

        pictures: dict[int, Path] = {}  # by index of the image's record

        def make_room(records: list[dict[str, Any]]) -> int | None:
            """On a full disk: removes the last picture, so that the detections have room."""
            if not pictures:
                return None
            index, picture = pictures.popitem()
            picture.unlink(missing_ok=True)
            del records[index]["picture"]
            message = f"{picture}: removed, since the disk is full and the detections need its room"
            tqdm.write(message, file=sys.stderr)
            written.failed.append({"file": records[index]["file"], "error": message})
            return index

        target = self.out / "detections.json"
        written = DetectionsFile(target, "demo" if self.demo else self.weights, make_room=make_room)
        written.failed.extend(failed)
        # a picture must not replace a photo, as would happen in `detect . --out .`
        taken = {path.name.casefold() for path in paths if path.resolve().parent == self.out.resolve()}
        images: dict[int, np.ndarray] = {}  # the images in progress, to draw the pictures on

        def source(number: int) -> Callable[[], np.ndarray]:
            def read() -> np.ndarray:
                images[number] = read_image(paths[number])
                return images[number]

            return read

        predictor = Predictor(model, variables, batch_size=self.batch_size)
        del variables  # the predictor holds folded variables
        stream = predictor.stream(source(number) for number in range(len(paths)))
        results = tqdm(stream, total=len(paths), unit="image", disable=not self.progress or len(paths) < 2)
        for (number, path), detection in zip(enumerate(paths), results, strict=True):
            image = images.pop(number, None)
            try:
                if isinstance(detection, Exception):
                    raise detection
                assert image is not None
                if labels is not None:
                    selected = np.isin(detection["labels"], sorted(labels))
                    detection = {field: values[selected] for field, values in detection.items()}
                record: dict[str, Any] = {"file": str(path), "height": image.shape[0], "width": image.shape[1]}
                rows = {"detections": _rows(detection, names)}
                written.add({**record, **rows})  # before the picture, for which the disk may have no room
                if self.pictures:
                    picture = self.out / _picture_name(path, taken)
                    drawn = Image.fromarray(draw_detections(image, detection, categories=names))
                    with replacing(picture) as file:
                        drawn.save(file, format="PNG" if picture.suffix == ".png" else "JPEG", quality=92)
                    pictures[len(written.images) - 1] = picture
                    written.replace_last({**record, "picture": str(picture), **rows})
            except (ImageError, ValueError, OSError) as error:  # only this image failed: continue with the others
                message = str(error) if str(path) in str(error) else f"{path}: {error}"
                tqdm.write(message, file=sys.stderr)
                written.fail({"file": str(path), "error": message})

        written.close()
        count, records, failed = len(paths) + len(failed), written.images, written.failed
        total = sum(len(record["detections"]) for record in records)
        print(f"{total} detections in {len(records)} images -> {target}")
        if failed:
            print(f"{len({row['file'] for row in failed})} of {count} failed (listed in {target})", file=sys.stderr)
        if self.demo:
            print_next([Path(record["picture"]) for record in records if "picture" in record])
        return 1 if failed else 0

    def _find(self) -> tuple[list[Path], list[dict[str, str]]]:
        """The image files, sorted, and the arguments that match no image, each with an error."""
        from flaxdet.images.decode import ImageError, find_images

        images: dict[Path, Path] = {}  # resolved path -> path as given
        failed: list[dict[str, str]] = []
        out = self.out.resolve()
        for argument in self.images:
            try:
                files = find_images([argument])
            except ImageError as error:
                failed.append({"file": argument, "error": str(error)})
                continue
            # subfolders are searched, except the folder with the results of an earlier run
            holds_out = Path(argument).expanduser().resolve() in out.parents
            for file in files:
                if not (holds_out and out in file.resolve().parents):
                    images.setdefault(file.resolve(), file)
        if not images:
            raise ImageError("; ".join(row["error"] for row in failed) or f"no images besides those in {self.out}")
        for row in failed:
            print(row["error"], file=sys.stderr)
        return sorted(images.values()), failed


def _picture_name(path: Path, taken: set[str]) -> str:
    """The image's name with the ending .jpg or .png, and with a number if the name is taken."""
    return free_name(path.stem, ".png" if path.suffix.lower() == ".png" else ".jpg", taken)


def _rows(detection: dict[str, Any], names: list[str] | None) -> list[dict[str, Any]]:
    rows = []
    for box, score, label in zip(detection["boxes"], detection["scores"], detection["labels"], strict=True):
        row = {"box": [float(x) for x in box], "score": float(score), "label": int(label)}
        if names is not None and int(label) < len(names):
            row["category"] = names[int(label)]
        rows.append(row)
    return rows
