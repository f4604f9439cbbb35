"""The options of ``flaxdet train``."""

from __future__ import annotations

import hashlib
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from flaxdet.cli.data_options import DataOptions, Flag
from flaxdet.cli.options import Key, ModelName, Quiet, Size, check_font, check_key, check_sizes, is_file_name

Folder = Path
Annotations = Path
# Options that change neither the data nor the arithmetic, and may differ when a run is resumed.
_FREE_ON_RESUME = {"train", "val", "out", "resume", "workers", "log_every", "save_every", "tensorboard", "progress"}
_FREE_ON_RESUME |= {"data", "coordinator", "process_count", "process_index", "max_pixels", "font"}


@dataclass(frozen=True)
class TrainOptions:
    """The options of a training run. The docstrings of the attributes are the help texts of the command."""

    train: tuple[Folder, Annotations]
    """Folder of the training images, and the annotations of these images: a COCO JSON file."""

    val: Annotated[tuple[Folder, Annotations] | None, Quiet] = None
    """Folder and annotations of the validation images, on which COCO mAP is computed. Default: no validation."""

    out: Path = Path("run")
    """Folder to write to."""

    model: Annotated[ModelName | None, Quiet] = None
    """The detector. Default: the detector in the file WEIGHTS, else fcos_resnet50_fpn."""

    weights: str = "COCO_V1"
    """Initial weights: a file (.safetensors or .pth), the folder of a run, published weights (downloaded once),
    'backbone' (a ResNet-50 pretrained on ImageNet, downloaded once), or 'none' (from scratch: needs far more data and
    time)."""

    key: Key = None
    """Which state_dict in the file: its name there (model_ema), or a prefix of keys (teacher). Default: the only one,
    else model, state_dict or model_state_dict."""

    resume: bool = False
    """Continue from the last checkpoint in OUT. The other options must be the same, but EPOCHS may be more."""

    epochs: int = 12
    """Number of passes over the training images."""

    batch_size: int = 4
    """Images per step, over all devices."""

    learning_rate: Annotated[float | None, Quiet] = None
    """Rate after the warm-up. Default: torchvision's, scaled to the batch size (FCOS .01, Faster R-CNN .02 for 16
    images)."""

    schedule: Literal["step", "cosine", "constant"] = "step"
    """After the warm-up. step: divide by 10 after 2/3 and after 11/12 of the epochs. cosine: half a cosine to 0.
    constant: no change."""

    warmup_steps: Annotated[int | None, Quiet] = None
    """Number of updates with linear warm-up. Default: one epoch, at most 1000."""

    momentum: float = 0.9
    """Momentum of SGD."""

    weight_decay: float = 1e-4
    """Weight decay of SGD, for every parameter that trains."""

    norm_weight_decay: Annotated[float | None, Quiet] = None
    """Weight decay for the parameters of normalisation layers. Default: WEIGHT-DECAY."""

    clip: Annotated[float | None, Quiet] = None
    """Clip gradients to this global norm. Default: no clipping."""

    accumulate: int = 1
    """Steps whose gradients are averaged into one update."""

    ema: Annotated[float | None, Quiet] = None
    """Decay of a moving average of the variables. The average is then evaluated and saved. Default: no average."""

    trainable_layers: Annotated[int | None, Quiet] = None
    """Number of backbone stages that train, from the last stage: 0 to 5. Default: 3, from scratch 5."""

    freeze_bn: Annotated[bool | None, Quiet] = None
    """Normalise with the running statistics of BatchNorm and do not update them. Default: only with trained weights."""

    copy_classes: Annotated[tuple[str, ...], Quiet, tyro.conf.arg(metavar="CLASS...")] = ()
    """Copy the rows of these classes from the weights into the new class layers, by class name."""

    keep_classes: bool = False
    """Keep the class layers of the weights. Labels follow the class names (without names, category ids are labels)."""

    min_size: Size = None
    """Resize the shorter side to this many pixels. Default: the value in the file, else 800."""

    max_size: Size = None
    """Limit of the longer side after the resize, in pixels. Default: the value in the file, else 1333."""

    multi_scale: Annotated[tuple[int, ...], Quiet, tyro.conf.arg(metavar="SIZE...")] = ()
    """In training, use one of these sizes at random instead of MIN-SIZE."""

    crop: Annotated[int | None, Quiet] = None
    """Large-scale jitter: images are scaled by .1 to 2 and cropped to squares of this side. Default: no jitter."""

    flip: float = 0.5
    """Probability of a horizontal flip in training."""

    max_boxes: Annotated[int | None, Quiet] = None
    """Largest number of boxes per image. Default: the largest number in the data set."""

    keep_empty: bool = False
    """Train on images without boxes too."""

    drop_unused: Flag = False
    """Make no classes of categories that no annotation of the training images uses."""

    data: tyro.conf.OmitArgPrefixes[DataOptions] = field(default_factory=DataOptions)

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the computation; parameters stay float32. bfloat16 is faster on GPU and TPU, and takes less memory."""

    remat: bool = False
    """Rematerialise activations in the backward pass: less memory, more time."""

    workers: int = 0
    """Number of processes that read images. 0: threads of the training process read images."""

    seed: int = 0
    """Seed of image order, augmentation, new layers and sampling."""

    eval_every: float = 1.0
    """Epochs between evaluations."""

    save_every: int = 500
    """Steps between checkpoints. Each evaluation saves a checkpoint too."""

    log_every: int = 10
    """Steps between lines of the log."""

    tensorboard: bool = True
    """Write OUT/tensorboard."""

    font: Annotated[Path | None, Quiet] = None
    """Font file (.ttf, .otf) for class names in predictions.png. Default: a font that has the letters."""

    progress: bool = True
    """Show progress bars."""

    coordinator: Annotated[str | None, Quiet] = None
    """HOST:PORT of the first of several processes, or 'auto' on a cluster that jax detects. Default: one process."""

    process_count: Annotated[int | None, Quiet] = None
    """Number of processes that train together."""

    process_index: Annotated[int | None, Quiet] = None
    """Index of this process, from 0."""

    def check(self) -> None:
        """Raises ValueError for values out of range and for options that exclude each other."""
        self.data.check()
        check_font(self.font)
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
                raise ValueError(f"{flag(name)} should be at least {low}, got {value}")
        for name in ("learning_rate", "clip", "eval_every"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{flag(name)} should be above 0, got {value}")
        for name in ("momentum", "ema", "flip"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{flag(name)} should be from 0 to 1, got {value}")
        if self.trainable_layers is not None and not 0 <= self.trainable_layers <= 5:
            raise ValueError(f"--trainable-layers should be from 0 to 5, got {self.trainable_layers}")
        if self.crop is not None and self.multi_scale:
            raise ValueError("--crop resizes by itself: expected --crop or --multi-scale, got both")
        if any(size < 1 for size in self.multi_scale):
            raise ValueError(f"--multi-scale should be sizes of at least 1 pixel, got {list(self.multi_scale)}")
        if not is_file_name(self.weights):
            check_key(self.weights, self.key)
        if self.pretrained is False and (self.keep_classes or self.copy_classes):
            raise ValueError("--keep-classes and --copy-classes need trained --weights")
        if self.keep_classes and self.drop_unused:
            raise ValueError("--keep-classes keeps every class of the weights: expected no --drop-unused beside it")
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
        """The options that must be the same when a run is resumed; annotations as a hash of the file's content."""
        values: dict[str, Any] = {}
        for name, value in {**vars(self), **vars(self.data)}.items():
            if name not in _FREE_ON_RESUME:
                values[name] = stored_value(value)
        for name, pair in (("train", self.train), ("val", self.val)):
            values[name] = None if pair is None else f"sha256 {hashlib.sha256(_content(pair[1])).hexdigest()[:16]}"
        return values

    def resume_command(self) -> str:
        """The command line that resumes this run."""
        given = sys.argv[1:] if sys.argv[1:2] == ["train"] else ["train", "..."]
        return shlex.join(["flaxdet", *(word for word in given if word != "--resume"), "--resume"])


def stored_value(value: Any) -> Any:
    """The value of an option as ``config`` has it."""
    return value if isinstance(value, (int, float, type(None))) else str(value)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        from flaxdet.data.coco_json import read_content

        read_content(path, text_ids=False)  # raises the same error as reading the data set does
        raise


def flag(name: str) -> str:
    """The option on the command line."""
    return "--" + name.replace("_", "-")
