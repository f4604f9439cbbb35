"""Making a batch and each image of it: reading, augmenting, resizing and padding, in numpy alone.

Nothing here uses a device, so worker processes can run it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from flaxdet.data.augment import choose_min_size, fixed_size_crop, horizontal_flip, scale_jitter
from flaxdet.data.batches import BatchPlan, EvalPlan, TrainPlan
from flaxdet.data.coco import Record
from flaxdet.images.buckets import Size
from flaxdet.images.resize import resize_array
from flaxdet.images.transform import canvas_size, resized_size
from flaxdet.models.labels import check_labels
from flaxdet.structures import TransformConfig

BatchDict = dict[str, np.ndarray]  # ``data.loader`` lists the names and shapes
BucketCanvas = Literal["image", "bucket"]  # of ``images.transform.Canvas``: a batch's arrays are its whole bucket


class Dataset(Protocol):
    """A data set to train on: ``CocoDataset``, or any class with the same three methods."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Record:
        """Image ``i`` without its pixels."""
        ...

    def read_image(self, i: int, /) -> np.ndarray:
        """[H, W, 3] uint8, of the record's size."""
        ...


def check_dataset_labels(dataset: Dataset, allowed: range) -> None:
    """Checks that a model allows the labels of all boxes of a data set.

    Args:
        dataset: the images.
        allowed: ``target_labels`` of the model.

    Raises:
        TypeError: for labels that are not integers.
        ValueError: for a label outside ``allowed``. Either message names the image's file and id, the box, and the
            class if it has a name.
    """
    categories: Sequence[str] = getattr(dataset, "categories", ())
    for i in range(len(dataset)):
        record = dataset[i]

        def name(box: int, record: Record = record) -> str:
            label, text = int(record.labels[box]), f"{record.path} (image_id {record.image_id}), box {box}"
            return f'{text}, "{categories[label]}"' if 0 <= label < len(categories) else text

        check_labels(record.labels, np.ones(len(record.labels), bool), allowed, name)


@dataclass(frozen=True)
class Options:
    """How an image becomes a row of a batch.

    Attributes:
        config: ``model.transform``.
        min_sizes: sizes of the shorter side, of which one is chosen at random.
        flip: probability of a horizontal flip.
        jitter: limits of the scale of large-scale jitter, with ``crop``; ``min_sizes`` is then unused.
        crop: (rows, columns) of the jittered image.
        max_boxes: slots for boxes.
        canvas: "image" or "bucket".
        masked: True if batches have "canvas".
        seed: seed of the augmentation; None turns augmentation off.
    """

    config: TransformConfig
    min_sizes: tuple[int, ...]
    flip: float
    jitter: tuple[float, float] | None
    crop: Size | None
    max_boxes: int
    canvas: BucketCanvas
    masked: bool
    seed: int | None


class BatchSource:
    """One process's rows of batch ``i`` of a run; random access, so that any worker can make any batch.

    Args:
        dataset: the images.
        plan: the images of batch ``i``.
        options: how each image becomes a row.
        rows: this process's rows of a global batch.
        start: number of the batch that is item 0.
        count: number of batches.
    """

    def __init__(
        self, dataset: Dataset, plan: TrainPlan | EvalPlan, options: Options, rows: slice, start: int, count: int
    ):
        self.dataset, self.plan, self.options, self.rows = dataset, plan, options, rows
        self.start, self.count = start, count

    def __len__(self) -> int:
        return self.count

    def after(self, count: int) -> BatchSource:
        """The batches of this source without the first ``count``."""
        return BatchSource(
            self.dataset, self.plan, self.options, self.rows, self.start + count, max(self.count - count, 0)
        )

    def __getitem__(self, i: Any) -> BatchDict:  # i may be an integer type of grain
        plan = self.plan[self.start + int(i)]
        samples = [make_sample(self.dataset, int(n), self.options, plan) for n in plan.indices[self.rows]]
        stacked = {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}
        stacked["image_id"][~plan.real[self.rows]] = -1
        return stacked


def make_sample(dataset: Dataset, index: int, options: Options, plan: BatchPlan) -> dict[str, np.ndarray]:
    """One image as a row of a batch; the augmentation depends on (seed, epoch, index) alone.

    Args:
        dataset: the images.
        index: index of the image in the data set.
        options: how the image becomes a row.
        plan: the plan of the batch, of which epoch and bucket are used.

    Returns:
        "pixels" [H, W, 3] float32, "size", "original_size" and, if ``options.masked``, "canvas" [2] int32,
        "boxes" [G, 4] float32 xyxy in the resized image, "labels" [G] int32, "valid" [G], "image_id" int64.
    """
    record, config = dataset[index], options.config
    image, boxes, labels = dataset.read_image(index), record.boxes, record.labels
    # always four numbers in this order, so that no option changes the random numbers of another
    flip, choice, scale, place = np.ones(4)
    if options.seed is not None:
        flip, choice, scale, place = np.random.default_rng([options.seed, plan.epoch, index]).random(4).tolist()
    if options.jitter is not None and options.crop is not None:
        low, high = options.jitter
        image, boxes = scale_jitter(image, boxes, target=options.crop, scale=low + scale * (high - low))
        fill = [round(255 * mean) for mean in config.image_mean]
        image, boxes, keep = fixed_size_crop(image, boxes, size=options.crop, chance=place, fill=fill)
        boxes, labels = boxes[keep], labels[keep]
        size = options.crop
    else:
        min_size = choose_min_size(options.min_sizes, choice) if options.seed is not None else options.min_sizes[-1]
        size = resized_size(record.size, config, min_size=min_size, name=str(record.path))
    if flip < options.flip:
        image, boxes = horizontal_flip(image, boxes)

    original = image.shape[:2]
    # torchvision's resize_boxes: float32 quotients
    across, down = (np.float32(size[axis]) / np.float32(original[axis]) for axis in (1, 0))
    boxes = boxes * np.array([across, down, across, down], np.float32)
    pixels = resize_array(
        image,
        size,
        bucket=plan.bucket,
        mean=config.image_mean,
        std=config.image_std,
    )
    slots, n = options.max_boxes, len(boxes)
    canvas = plan.bucket if options.canvas == "bucket" else canvas_size(size, config)
    sample = {
        "pixels": pixels,
        "size": np.array(size, np.int32),
        "original_size": np.array(record.size, np.int32),
        "canvas": np.array(canvas, np.int32),
        "boxes": np.zeros((slots, 4), np.float32),
        "labels": np.zeros(slots, np.int32),
        "valid": np.arange(slots) < n,
        "image_id": np.array(record.image_id, np.int64),
    }
    sample["boxes"][:n], sample["labels"][:n] = boxes, labels
    if not options.masked:
        del sample["canvas"]
    return sample
