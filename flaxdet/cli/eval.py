"""``flaxdet eval``: COCO's average precision of a checkpoint, in one command."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from flaxdet.cli.options import (
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

    Prints COCO's average precision and recall, and those of every class, as pycocotools computes them. With --out,
    writes OUT/metrics.json and OUT/detections.json (COCO's format of results, for other tools).

    Where the weights carry names of their labels (ours and the published ones do), categories are told by their names;
    otherwise their ids in the annotations are the labels, as in torchvision.

    Needs pycocotools: pip install 'flaxdet[train]'.
    """

    images: Path
    """Folder that the file names in the annotations are relative to."""

    annotations: Path
    """The annotations: a COCO JSON file."""

    weights: str = "COCO_V1"
    """A file (.safetensors or .pth, ours or torchvision's), or the name of published weights (downloaded once)."""

    model: Annotated[ModelName | None, Quiet] = None
    """Which detector; told by the file where WEIGHTS is one. Default fcos_resnet50_fpn."""

    out: Annotated[Path | None, Quiet] = None
    """Folder to write to. Default: nothing is written."""

    threshold: Annotated[float | None, Quiet] = None
    """Only detections with a score above this, from 0 to 1. Default: the model's (FCOS .2, Faster R-CNN .05)."""

    categories: Annotated[Path | None, Quiet] = None
    """Names of the labels, for weights that carry none: COCO annotations, a JSON list, or a name a line."""

    min_size: Size = None
    """Resize the shorter side to this many pixels. Default: 800, or what the file says."""

    max_size: Size = None
    """But the longer side to no more than this. Default: 1333, or what the file says."""

    batch_size: int = 1
    """Images at a time; the figures do not depend on it."""

    workers: int = 2
    """Threads that read images."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 is faster on GPU and TPU, and a little less exact."""

    progress: bool = True
    """Show progress bars."""

    def run(self) -> int:
        """Runs the command; returns the exit status."""
        check_threshold(self.threshold)
        check_sizes(self.min_size, self.max_size)
        for name, value in (("--batch-size", self.batch_size), ("--workers", self.workers)):
            if value < 1:
                raise ValueError(f"{name} should be at least 1, got {value}")
        from flaxdet.data.coco import read_coco
        from flaxdet.evaluation.coco_metrics import read_annotations, require_pycocotools
        from flaxdet.evaluation.evaluate import coco_results, detect_dataset, evaluate_results
        from flaxdet.files.checkpoint import replacing

        require_pycocotools()
        given = given_names(self.categories)
        truth = read_annotations(self.annotations)
        if self.out is not None:
            make_folder(self.out)
        model, variables, names = load_with_names(self, given)
        dataset = read_coco(self.images, self.annotations, categories=names, num_classes=model.num_classes)
        found = detect_dataset(
            model,
            variables,
            dataset,
            batch_size=self.batch_size,
            workers=self.workers,
            progress=self.progress,
        )
        image_ids = [dataset[i].image_id for i in range(len(dataset))]
        rows = coco_results(found, image_ids, dataset.category_ids)
        result = evaluate_results(rows, truth, image_ids=image_ids)
        print(result.table())
        if self.out is not None:
            for name, text in (("metrics.json", result.to_json()), ("detections.json", json.dumps(rows))):
                with replacing(self.out / name) as file:
                    file.write(text.encode())
            print(f"\n-> {self.out / 'metrics.json'}, {self.out / 'detections.json'}")
        return 0
