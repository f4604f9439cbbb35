"""``flaxdet detect``: detects objects in images, and writes JSON and annotated pictures."""

from __future__ import annotations

import dataclasses
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from flaxdet.cli.data_options import PhotoOptions, printable
from flaxdet.cli.demo import check_demo, demo_photos, load_demo, print_next
from flaxdet.cli.detections_file import DetectionsFile
from flaxdet.cli.options import (
    Key,
    ModelName,
    Quiet,
    Size,
    check_font,
    check_sizes,
    check_threshold,
    free_name,
    given_names,
    labels_of,
    load_with_names,
    make_folder,
)
from flaxdet.data.summary import counted

if TYPE_CHECKING:
    import numpy as np

_MAX_NAMED = 5  # skipped files that a message names
_LONGEST_STEM = 200  # bytes of a picture's name: file systems take 255, and a temporary file adds some


@dataclass(frozen=True)
class Detect:
    """Detect objects in images.

    Writes OUT/detections.json (boxes as x1, y1, x2, y2 in pixels of the image) and one annotated picture per image, as
    soon as an image is done. A full disk loses pictures, not detections.
    If an image is missing or can't be read, the command reports the image, continues with the other images, and exits
    with status 1. Files of a folder in a format that Pillow can't read (HEIC, raw camera files) are skipped, counted
    and named.

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

    font: Annotated[Path | None, Quiet] = None
    """Font file (.ttf, .otf) for class names in the pictures. Default: a font that has the letters."""

    progress: bool = True
    """Show progress bars."""

    photos: tyro.conf.OmitArgPrefixes[PhotoOptions] = field(default_factory=PhotoOptions)

    def run(self) -> int:
        """Runs the command; returns the exit status."""
        check_threshold(self.threshold)
        check_sizes(self.min_size, self.max_size)
        check_font(self.font)
        self.photos.check()
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
        from tqdm import tqdm

        from flaxdet.files.checkpoint import replacing
        from flaxdet.images.decode import ImageError, decode
        from flaxdet.inference.predictor import Predictor
        from flaxdet.results.draw import draw_picture
        from flaxdet.results.fonts import MissingLettersWarning, what_is_missing

        given = given_names(self.categories)
        make_folder(self.out)
        paths, failed, skipped = self._find()
        model, variables, names = load_demo(self) if self.demo else load_with_names(self, given)
        labels = labels_of(self.classes, names, model.num_classes)
        if self.pictures and (missing := what_is_missing(names or [], self.font)):
            _warn(missing)

        pictures: dict[int, Path] = {}  # by index of the image's record

        def make_room(records: list[dict[str, Any]]) -> int | None:
            """On a full disk: removes the last picture, so that the detections have room."""
            if not pictures:
                return None
            index, picture = pictures.popitem()
            picture.unlink(missing_ok=True)
            del records[index]["picture"]
            message = printable(f"{picture}: removed, since the disk is full and the detections need its room")
            tqdm.write(message, file=sys.stderr)
            written.failed.append({"file": records[index]["file"], "error": message})
            return index

        target = self.out / "detections.json"
        left_out = [{"file": printable(path), "reason": reason} for path, reason in skipped]
        written = DetectionsFile(target, "demo" if self.demo else self.weights, left_out, make_room=make_room)
        written.failed.extend(failed)
        # a picture must not replace a photo, as would happen in `detect . --out .`
        out = Path(os.path.realpath(self.out))
        taken = {path.name.casefold() for path in paths if Path(os.path.realpath(path)).parent == out}
        narrow: dict[int, str] = {}  # images that use under 1% of their range
        images: dict[int, np.ndarray] = {}  # the images in progress, to draw the pictures on

        def source(number: int) -> Callable[[], np.ndarray]:
            def read() -> np.ndarray:
                options = self.photos
                images[number], text = decode(
                    paths[number],
                    upright=not options.as_stored,
                    pixel_range=options.pixel_range,
                    max_pixels=options.max_pixels,
                )
                if text is not None:
                    narrow[number] = text
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
                if number in narrow and number == min(narrow):
                    tqdm.write(f"warning: {printable(path)}: {narrow[number]}", file=sys.stderr)
                record: dict[str, Any] = {"file": printable(path), "height": image.shape[0], "width": image.shape[1]}
                rows = {"detections": _rows(detection, names)}
                written.add({**record, **rows})  # before the picture, for which the disk may have no room
                if self.pictures:
                    picture = self.out / _picture_name(path, taken)
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore", MissingLettersWarning)  # it is told once, above
                        drawn = draw_picture(image, detection, categories=names, font=self.font)
                    with replacing(picture) as file:
                        drawn.save(file, format="PNG" if picture.suffix == ".png" else "JPEG", quality=92)
                    pictures[len(written.images) - 1] = picture
                    written.replace_last({**record, "picture": printable(picture), **rows})
            except (ImageError, ValueError, OSError) as error:  # only this image failed: continue with the others
                message = printable(str(error) if str(path) in str(error) else f"{path}: {error}")
                tqdm.write(message, file=sys.stderr)
                written.fail({"file": printable(path), "error": message})

        written.close()
        count, records, failed = len(paths) + len(failed), written.images, written.failed
        total = sum(len(record["detections"]) for record in records)
        print(f"{total} detections in {len(records)} images -> {printable(target)}")
        if len(narrow) > 1:
            _warn(
                f"{len(narrow)} images use under 1% of the range of their values: --pixel-range LOW HIGH sets another"
            )
        if failed:
            print(f"{len({row['file'] for row in failed})} of {count} failed (listed in {target})", file=sys.stderr)
        if self.demo:
            print_next([Path(record["picture"]) for record in records if "picture" in record])
        return 1 if failed else 0

    def _find(self) -> tuple[list[Path], list[dict[str, str]], list[tuple[Path, str]]]:
        """The image files, sorted; arguments that match no image, each with an error; skipped files with the reason."""
        from flaxdet.images.find import find
        from flaxdet.images.opened import ImageError

        images: dict[str, Path] = {}  # resolved path -> path as given
        skipped: dict[str, tuple[Path, str]] = {}
        failed: list[dict[str, str]] = []
        out = os.path.realpath(self.out)
        for argument in self.images:
            try:
                found = find([argument])
            except ImageError as error:
                failed.append({"file": printable(argument), "error": printable(str(error))})
                continue
            # subfolders are searched, except the folder with the results of an earlier run
            searched = os.path.realpath(Path(argument).expanduser())
            holds_out = Path(searched) in Path(out).parents
            for file in found.images:
                real = os.path.realpath(file)
                if not (holds_out and Path(out) in Path(real).parents):
                    images.setdefault(real, file)
            skipped |= {os.path.realpath(path): (path, reason) for path, reason in found.skipped}
        if not images:
            raise ImageError("; ".join(row["error"] for row in failed) or f"no images besides those in {self.out}")
        for row in failed:
            print(row["error"], file=sys.stderr)
        if skipped:
            named = "; ".join(f"{path} ({reason})" for path, reason in list(skipped.values())[:_MAX_NAMED])
            more = "; ..." if len(skipped) > _MAX_NAMED else ""
            print(f"skipped {counted(len(skipped), 'file')}: {printable(named)}{more}", file=sys.stderr)
        return sorted(images.values()), failed, list(skipped.values())


def _warn(text: str) -> None:
    print(f"warning: {printable(text)}", file=sys.stderr)


def _picture_name(path: Path, taken: set[str]) -> str:
    """The image's name, shortened if it is long, with the ending .jpg or .png, and a number if the name is taken."""
    stem = os.fsencode(path.stem)
    if len(stem) > _LONGEST_STEM:
        stem = stem[:_LONGEST_STEM].decode("utf-8", "ignore").encode()
    return free_name(os.fsdecode(stem), ".png" if path.suffix.lower() == ".png" else ".jpg", taken)


def _rows(detection: dict[str, Any], names: list[str] | None) -> list[dict[str, Any]]:
    rows = []
    for box, score, label in zip(detection["boxes"], detection["scores"], detection["labels"], strict=True):
        row = {"box": [float(x) for x in box], "score": float(score), "label": int(label)}
        if names is not None and int(label) < len(names):
            row["category"] = names[int(label)]
        rows.append(row)
    return rows
