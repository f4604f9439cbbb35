"""``flaxdet export``: exports a detector as StableHLO, for programs that use jax without flaxdet."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

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
class Export:
    """Export a detector as StableHLO.

    Writes OUT/signature.json, OUT/weights.safetensors and one program per bucket. A program is the whole pipeline from
    pixels to detections, lowered for CPU, CUDA and TPU. Only jax is needed to run a program; README.md shows how.
    """

    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder to write to."""

    weights: str = "COCO_V1"
    """A file (.safetensors or .pth, flaxdet's or torchvision's), the folder of a run of flaxdet train, or the name of
    published weights (downloaded once)."""

    key: Key = None
    """Which state_dict in the file: its name there (model_ema), or a prefix of keys (teacher). Default: the only one,
    else model, state_dict or model_state_dict."""

    model: Annotated[ModelName | None, Quiet] = None
    """The detector. Default: the detector in the file WEIGHTS, else fcos_resnet50_fpn."""

    buckets: Annotated[tuple[str, ...], Quiet, tyro.conf.arg(metavar="ROWSxCOLUMNS...")] = ()
    """Buckets, one program each, in pixels after the resize, multiples of 32. Default: seven, which hold any image."""

    batch_sizes: Annotated[tuple[int, ...], Quiet, tyro.conf.arg(metavar="B...")] = ()
    """Fixed batch sizes, one program each. Default: one program for any batch size."""

    raw_size: int = 1280
    """Side of the square input arrays, in pixels. Larger photos must be made smaller first."""

    platforms: tuple[Literal["cpu", "cuda", "rocm", "tpu"], ...] = ("cpu", "cuda", "tpu")
    """Platforms that each program is lowered for."""

    threshold: Annotated[float | None, Quiet] = None
    """Keep scores above this, from 0 to 1. Default: the model's value (FCOS .2, Faster R-CNN .05)."""

    categories: Annotated[Path | None, Quiet] = None
    """File of label names, for weights without names: COCO annotations, a JSON list, or text with one name per line."""

    min_size: Size = None
    """Resize the shorter side to this many pixels. Default: the value in the file, else 800."""

    max_size: Size = None
    """Limit of the longer side after the resize, in pixels. Default: the value in the file, else 1333."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 is faster on GPU and TPU, and a little less precise."""

    progress: bool = True
    """Show progress bars."""

    def run(self) -> int:
        """Runs the command; returns the exit status."""
        check_threshold(self.threshold)
        check_sizes(self.min_size, self.max_size)
        buckets = [_bucket(text) for text in self.buckets]
        given = given_names(self.categories)
        make_folder(self.out)
        from flaxdet.inference.export import export

        model, variables, names = load_with_names(self, given)
        signature = export(
            self.out,
            model,
            variables,
            buckets=buckets or None,
            batch_sizes=self.batch_sizes or None,
            raw_size=self.raw_size,
            platforms=self.platforms,
            categories=names,
            progress=self.progress,
        )
        files = [signature["weights"]["file"], *(program["file"] for program in signature["programs"])]
        size = sum((self.out / file).stat().st_size for file in files) / 1e6
        print(f"{len(files) - 1} programs for {', '.join(self.platforms)}, {size:.0f} MB -> {self.out}")
        return 0


def _bucket(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise ValueError(f"--buckets should be ROWSxCOLUMNS such as 800x1088, got {text!r}")
    return int(match[1]), int(match[2])
