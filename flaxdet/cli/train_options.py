"""The options of ``flaxdet train``."""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from flaxdet.cli.options import ModelName, Quiet, Size, check_sizes

Folder = Path
Annotations = Path
# Options that change neither the data nor the arithmetic, and may be others when a run goes on.
_FREE_ON_RESUME = {"train", "val", "out", "resume", "workers", "log_every", "save_every", "tensorboard", "progress"}
_FREE_ON_RESUME |= {"coordinator", "process_count", "process_index"}


@dataclass(frozen=True)
class TrainOptions:
    """What can be chosen about a training run; the attributes' texts are the command's help."""

    train: tuple[Folder, Annotations]
    """Folder of images, and their annotations."""

    val: Annotated[tuple[Folder, Annotations] | None, Quiet] = None
    """The same for validation; COCO mAP is computed on them. Default: no validation."""

    out: Path = Path("run")
    """Folder to write to."""

    model: Annotated[ModelName | None, Quiet] = None
    """Which detector; told by the file where WEIGHTS is one. Default fcos_resnet50_fpn."""

    weights: str = "COCO_V1"
    """Where to start: a file (.safetensors or .pth), published weights (downloaded once), 'backbone' (a ResNet-50
    pretrained on ImageNet, downloaded once), or 'none' (from scratch: needs far more data and time)."""

    resume: bool = False
    """Go on from the last checkpoint in OUT, with the same other options."""

    epochs: int = 12
    """How often each image is seen."""

    batch_size: int = 4
    """Images in a step, over all devices."""

    learning_rate: Annotated[float | None, Quiet] = None
    """At its height. Default: torchvision's, scaled to the batch size (FCOS .01, Faster R-CNN .02 for 16 images)."""

    schedule: Literal["step", "cosine", "constant"] = "step"
    """After the warm-up: a tenth after 2/3 and again after 11/12 of the epochs, half a cosine to 0, or no change."""

    warmup_steps: Annotated[int | None, Quiet] = None
    """Updates of linear warm-up. Default: the first epoch, at most 1000."""

    momentum: float = 0.9
    """Of SGD."""

    weight_decay: float = 1e-4
    """Of SGD; on every trained parameter."""

    norm_weight_decay: Annotated[float | None, Quiet] = None
    """Another one for the parameters of normalisation layers. Default: the same."""

    clip: Annotated[float | None, Quiet] = None
    """Clip gradients to this global norm. Default: not."""

    accumulate: int = 1
    """Steps whose gradients are averaged into one update."""

    ema: Annotated[float | None, Quiet] = None
    """Decay of a moving average of the variables, which is then what is evaluated and saved. Default: none."""

    trainable_layers: Annotated[int | None, Quiet] = None
    """Stages of the backbone that train, from the last: 0 to 5. Default: 3, from scratch 5."""

    freeze_bn: Annotated[bool | None, Quiet] = None
    """Leave the statistics of live BatchNorm as they are. Default: where trained weights are given."""

    copy_classes: Annotated[tuple[str, ...], Quiet, tyro.conf.arg(metavar="CLASS...")] = ()
    """Start the new class layers with the rows of these classes of the weights, known by the same names."""

    keep_classes: bool = False
    """Keep the class layers of the weights, and label by their names (without names, category ids are labels)."""

    min_size: Size = None
    """Resize the shorter side to this many pixels. Default: 800, or what the file says."""

    max_size: Size = None
    """But the longer side to no more than this. Default: 1333, or what the file says."""

    multi_scale: Annotated[tuple[int, ...], Quiet, tyro.conf.arg(metavar="SIZE...")] = ()
    """In training, one of these at random in place of MIN-SIZE."""

    crop: Annotated[int | None, Quiet] = None
    """Large-scale jitter: images resized by .1 to 2 times and cropped to squares of this many pixels. Default: none."""

    flip: float = 0.5
    """Share of training images that are mirrored."""

    max_boxes: Annotated[int | None, Quiet] = None
    """Most boxes in an image. Default: what the data set has."""

    keep_empty: bool = False
    """Train on images without boxes too."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Computes; parameters stay float32. bfloat16 is faster on GPU and TPU, and takes less memory."""

    remat: bool = False
    """Recompute activations in the backward pass, for a GPU or TPU short of memory: less of it, more time."""

    workers: int = 0
    """Processes that read images; 0: threads of this one."""

    seed: int = 0
    """Of the order of images, augmentation, new layers and sampling."""

    eval_every: float = 1.0
    """Epochs between evaluations."""

    save_every: int = 500
    """Steps between checkpoints, besides those of the evaluations."""

    log_every: int = 10
    """Steps between lines of the log."""

    tensorboard: bool = True
    """Write OUT/tensorboard."""

    progress: bool = True
    """Show progress bars."""

    coordinator: Annotated[str | None, Quiet] = None
    """HOST:PORT of the first of several processes; 'auto' where the cluster tells. Default: one process."""

    process_count: Annotated[int | None, Quiet] = None
    """How many processes train together."""

    process_index: Annotated[int | None, Quiet] = None
    """Which of them this is, from 0."""

    def check(self) -> None:
        """Raises ValueError for values that no run could have."""
        check_sizes(self.min_size, self.max_size)
        least: dict[str, float] = {"epochs": 1, "batch_size": 1, "accumulate": 1, "save_every": 1, "log_every": 1}
        least |= {
            "warmup_steps": 0,
            "max_boxes": 1,
            "workers": 0,
            "weight_decay": 0,
            "norm_weight_decay": 0,
            "crop": 32,
        }
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{_flag(name)} should be at least {low}, got {value}")
        for name in ("learning_rate", "clip", "eval_every"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{_flag(name)} should be above 0, got {value}")
        for name in ("momentum", "ema", "flip"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{_flag(name)} should be from 0 to 1, got {value}")
        if self.trainable_layers is not None and not 0 <= self.trainable_layers <= 5:
            raise ValueError(f"--trainable-layers should be from 0 to 5, got {self.trainable_layers}")
        if self.crop is not None and self.multi_scale:
            raise ValueError("--crop resizes by itself: expected --crop or --multi-scale, got both")
        if any(size < 1 for size in self.multi_scale):
            raise ValueError(f"--multi-scale should be sizes of at least 1 pixel, got {list(self.multi_scale)}")
        if self.pretrained is False and (self.keep_classes or self.copy_classes):
            raise ValueError("--keep-classes and --copy-classes need trained --weights")
        if self.keep_classes and self.copy_classes:
            raise ValueError("expected --keep-classes or --copy-classes, got both")
        together = (self.coordinator, self.process_count, self.process_index)
        if self.coordinator not in (None, "auto") and None in together:
            raise ValueError("--coordinator HOST:PORT needs --process-count and --process-index")

    @property
    def pretrained(self) -> bool:
        """Whether the whole detector starts from trained weights."""
        return self.weights not in ("none", "backbone")

    def config(self) -> dict[str, Any]:
        """What has to be the same when a run goes on; the annotations by their content."""
        values: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            if field.name not in _FREE_ON_RESUME:
                value = getattr(self, field.name)
                values[field.name] = value if isinstance(value, (int, float, type(None))) else str(value)
        for name, pair in (("train", self.train), ("val", self.val)):
            values[name] = None if pair is None else f"sha256 {hashlib.sha256(pair[1].read_bytes()).hexdigest()[:16]}"
        return values

    def resume_command(self) -> str:
        """The command line that goes on with this run."""
        given = sys.argv[1:] if sys.argv[1:2] == ["train"] else ["train", "..."]
        return shlex.join(["flaxdet", *(word for word in given if word != "--resume"), "--resume"])


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
