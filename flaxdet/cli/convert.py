"""``flaxdet convert``: converts weights from one file format to the other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from flaxdet.cli.options import (
    Key,
    ModelName,
    Quiet,
    Size,
    check_categories,
    check_sizes,
    load_model,
    read_categories,
)


@dataclass(frozen=True)
class Convert:
    """Convert weights between torchvision's .pth and .safetensors.

    Files of both formats hold torchvision's keys, and torchvision loads them with strict=True. A .safetensors file also
    holds the model's options and class names, so `flaxdet detect --weights FILE` needs no other option.

    Torch is not needed.
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """A .pth or .safetensors file, the folder of a run of flaxdet train, or the name of published weights (COCO_V1)."""

    target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TARGET")]
    """The file to write. The ending, .safetensors or .pth, selects the format."""

    key: Key = None
    """Which state_dict in the file: its name there (model_ema), or a prefix of keys (teacher). Default: the only one,
    else model, state_dict or model_state_dict."""

    model: Annotated[ModelName | None, Quiet] = None
    """The detector. Default: the detector in the file SOURCE, else fcos_resnet50_fpn."""

    categories: Annotated[Path | None, Quiet] = None
    """File of label names, the background first: COCO annotations, a JSON list, or text with one name per line."""

    min_size: Size = None
    """Store this as the model's min_size."""

    max_size: Size = None
    """Store this as the model's max_size."""

    frozen_bn: Annotated[bool | None, Quiet] = None
    """Whether the backbone's BatchNorm is frozen. Default: as in the file."""

    norm_eps: Annotated[float | None, Quiet] = None
    """eps that BatchNorm adds to the variance: 0 for a .pth of fasterrcnn_resnet50_fpn's COCO_V1. Default: the value in
    the file, else 1e-5."""

    progress: bool = True
    """Show a progress bar while downloading."""

    def run(self) -> int:
        """Runs the command; returns the exit status."""
        if self.target.suffix not in (".pth", ".safetensors"):
            raise ValueError(f"{self.target}: expected a name ending in .safetensors or .pth")
        if not self.target.parent.is_dir():
            raise ValueError(f"{self.target}: there is no folder {self.target.parent} to write it to")
        check_sizes(self.min_size, self.max_size)
        import jax

        import flaxdet

        names = None if self.categories is None else read_categories(self.categories)
        model, variables, stored_names = load_model(
            self.model,
            self.source,
            key=self.key,
            progress=self.progress,
            min_size=self.min_size,
            max_size=self.max_size,
            frozen_bn=self.frozen_bn,
            norm_eps=self.norm_eps,
        )
        if self.categories is not None and names is not None:
            check_categories(self.categories, names, model.num_classes)
        flaxdet.save(self.target, model, variables, categories=names or stored_names)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
        print(f"{type(model).__name__}, {model.num_classes} classes, {parameters:,} parameters -> {self.target}")
        return 0
