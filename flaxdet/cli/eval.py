"""``flaxdet eval``: COCO's average precision of a model on a data set."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from flaxdet.cli.data_options import DataOptions
from flaxdet.cli.options import (
    Key,
    ModelName,
    Quiet,
    Size,
    check_sizes,
    check_threshold,
    given_names,
    load_with_names,
    make_folder,
)


@dataclass(frozen=True)
class Eval:
    """Evaluate a model on a data set in COCO's format.

    Prints COCO's average precision and recall, and the average precision of every class, computed by pycocotools. With
    --out, writes OUT/metrics.json and OUT/detections.json (COCO's format of results, for other tools).

    If the weights have label names (published weights and files of flaxdet have), the label of a category is found by
    the category's name. Otherwise the category's id in the annotations is the label, as in torchvision.

    Prints on stderr what was read: boxes of each class, boxes that were clipped or left out, photos with an EXIF
    orientation, and what looks wrong.

    Needs pycocotools: pip install 'flaxdet[train]'.
    """

    images: Path
    """Folder of the images; file names in the annotations are relative to this folder."""

    annotations: Path
    """The annotations: a COCO JSON file."""

    weights: str = "COCO_V1"
    """A file (.safetensors or .pth, flaxdet's or torchvision's), the folder of a run of flaxdet train, or the name of
    published weights (downloaded once)."""

    key: Key = None
    """Which state_dict in the file: its name there (model_ema), or a prefix of keys (teacher). Default: the only one,
    else model, state_dict or model_state_dict."""

    model: Annotated[ModelName | None, Quiet] = None
    """The detector. Default: the detector in the file WEIGHTS, else fcos_resnet50_fpn."""

    out: Annotated[Path | None, Quiet] = None
    """Folder to write to. Default: nothing is written."""

    threshold: Annotated[float | None, Quiet] = None
    """Keep scores above this, from 0 to 1. Default: the model's value (FCOS .2, Faster R-CNN .05)."""

    categories: Annotated[Path | None, Quiet] = None
    """File of label names, for weights without names: COCO annotations, a JSON list, or text with one name per line."""

    min_size: Size = None
    """Resize the shorter side to this many pixels. Default: the value in the file, else 800."""

    max_size: Size = None
    """Limit of the longer side after the resize, in pixels. Default: the value in the file, else 1333."""

    batch_size: int = 1
    """Images per batch; the figures do not depend on it."""

    workers: int = 2
    """Threads that read images."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 is faster on GPU and TPU, and a little less precise."""

    progress: bool = True
    """Show progress bars."""

    data: tyro.conf.OmitArgPrefixes[DataOptions] = field(default_factory=DataOptions)

    def run(self) -> int:
        """Runs the command; returns the exit status."""
        check_threshold(self.threshold)
        check_sizes(self.min_size, self.max_size)
        self.data.check()
        for name, value in (("--batch-size", self.batch_size), ("--workers", self.workers)):
            if value < 1:
                raise ValueError(f"{name} should be at least 1, got {value}")
        from flaxdet.evaluation.coco_metrics import read_annotations, require_pycocotools
        from flaxdet.evaluation.evaluate import evaluate_with_rows
        from flaxdet.files.checkpoint import replacing

        require_pycocotools()
        given = given_names(self.categories)
        truth = read_annotations(self.annotations)  # faults show before weights are downloaded
        if self.out is not None:
            make_folder(self.out)
        model, variables, names = load_with_names(self, given)
        labels = {"categories": names, "num_classes": model.num_classes}
        dataset = self.data.read("eval", self.images, self.annotations, **labels)
        result, rows = evaluate_with_rows(
            model,
            variables,
            dataset,
            truth,
            batch_size=self.batch_size,
            workers=self.workers,
            progress=self.progress,
        )
        try:
            print(result.table())
        finally:  # the files are written even if nobody reads the table
            if self.out is not None:
                for name, text in (("metrics.json", result.to_json()), ("detections.json", json.dumps(rows))):
                    with replacing(self.out / name) as file:
                        file.write(text.encode())
        if self.out is not None:
            print(f"\n-> {self.out / 'metrics.json'}, {self.out / 'detections.json'}")
        return 0
