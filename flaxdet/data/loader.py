"""Batches for training and evaluation: reproducible, resumable, split among processes, made by threads or workers.

A *batch* is a dict of numpy arrays. B is the number of rows of this process, (H, W) the bucket, G the slots for boxes:

- "pixels" [B, H, W, 3] float32, normalised, zero beyond each image
- "size", "original_size" [B, 2] int32, (rows, columns) after and before the resize
- "canvas" [B, 2] int32; absent where every canvas is the whole bucket, so that no masks are traced
- "boxes" [B, G, 4] float32 xyxy in pixels of the resized image, "labels" [B, G] int32, "valid" [B, G] bool
- "image_id" [B] int64; -1 in rows that only fill up the last batch of an evaluation
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from flaxdet.data.augment import check_jitter
from flaxdet.data.batches import EvalPlan, TrainPlan
from flaxdet.data.samples import BatchDict, BatchSource, BucketCanvas, Dataset, Options, check_dataset_labels
from flaxdet.data.streams import import_grain, open_stream
from flaxdet.images.buckets import Size, assign, canvases, choose_buckets, sort_buckets
from flaxdet.images.transform import check_canvas
from flaxdet.structures import TransformConfig

_SLOT_STEP = 8  # the default number of slots for boxes is a multiple of this


def train_batches(
    dataset: Dataset,
    config: TransformConfig,
    *,
    batch_size: int,
    steps: int,
    seed: int = 0,
    flip: float = 0.5,
    min_size: int | Sequence[int] | None = None,
    jitter: tuple[float, float] | None = None,
    crop: int | Size | None = None,
    buckets: Sequence[Size] | None = None,
    max_boxes: int | None = None,
    canvas: BucketCanvas = "image",
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """The batches of a whole training run.

    Batch i depends on the arguments alone. It does not depend on the number of workers, and the rows of all processes
    together are the rows that a single process would get. ``TrainPlan`` describes an epoch; the augmentation of an
    image depends on (seed, epoch, index of the image) alone.

    Args:
        dataset: the result of ``read_coco``.
        config: ``model.transform``.
        batch_size: rows of a batch, of all processes together.
        steps: number of batches of the run.
        seed: not negative.
        flip: probability of a horizontal flip.
        min_size: pixels of the shorter side; if several, one is chosen at random for each image. Default
            ``config.min_size``.
        jitter: (low, high) limits of the scale of large-scale jitter; torchvision has (.1, 2.). ``min_size`` and the
            size options of ``config`` are then unused; every image fills ``crop``.
        crop: pixels of a side, or (rows, columns), of the jittered image; default 1024.
        buckets: shapes [(rows, columns)] of the batches' arrays; default three, by ``choose_buckets``.
        max_boxes: G; default the largest number of boxes of an image, rounded up to a multiple of 8.
        canvas: "image": each image is padded to a canvas of its own, so that the losses do not depend on the
            bucket. "bucket": each image is padded to the whole bucket, and no masks are computed.
        workers: number of grain's worker processes that make batches. With 0, two threads make them.
        process_index: number of this process.
        process_count: each process gets ``batch_size / process_count`` rows of every batch.

    Returns:
        An iterator of ``steps`` batches: dicts of numpy arrays, whose names and shapes are listed at the head of
        ``flaxdet.data.loader``.

    Raises:
        ValueError: for arguments out of range, and for an image that fits no bucket or has more boxes than
            ``max_boxes``; the message names the image.
        ImportError: for workers if grain is not installed.
    """
    if not 0 <= flip <= 1:
        raise ValueError(f"flip should be a probability, got {flip!r}")
    if steps < 0 or seed < 0:
        raise ValueError(f"steps and seed should not be negative, got {steps} and {seed}")
    choices = (config if min_size is None else replace(config, min_size=min_size)).min_size
    scales, cut = check_jitter(jitter, crop, min_size)
    # large-scale jitter makes every image as large as the crop, and the image is not resized after that
    geometry = config if cut is None else replace(config, fixed_size=cut[::-1])
    layout = _layout(dataset, geometry, choices, buckets, max_boxes, canvas)
    rows = _rows(batch_size, process_index, process_count)
    plan = TrainPlan(layout.canvases, layout.buckets, batch_size, seed)
    options = Options(
        config, choices, flip, scales, cut, layout.max_boxes, canvas=canvas, masked=layout.masked, seed=seed
    )
    source = BatchSource(dataset, plan, options, rows, 0, steps)
    return Batches(source, workers, {"seed": seed, "batch_size": batch_size, "images": len(dataset)})


def eval_batches(
    dataset: Dataset,
    config: TransformConfig,
    *,
    batch_size: int,
    workers: int = 0,
    buckets: Sequence[Size] | None = None,
    max_boxes: int | None = None,
    canvas: BucketCanvas = "image",
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Every image once, resized as for evaluation, bucket by bucket, in the order of the data set.

    The last batch of a bucket is filled up with copies of the batch's first image, with "image_id" -1.

    Args:
        dataset: the result of ``read_coco``.
        config: ``model.transform``.
        batch_size: rows of a batch, of all processes together.
        workers: as for ``train_batches``.
        buckets: as for ``train_batches``.
        max_boxes: as for ``train_batches``.
        canvas: as for ``train_batches``.
        process_index: number of this process.
        process_count: each process gets ``batch_size / process_count`` rows of every batch.

    Returns:
        A finite iterator with a length, of batches as of ``train_batches``.

    Raises:
        ValueError: as ``train_batches``.
        ImportError: for workers if grain is not installed.
    """
    choices = (config.min_size[-1],)
    layout = _layout(dataset, config, choices, buckets, max_boxes, canvas)
    rows = _rows(batch_size, process_index, process_count)
    plan = EvalPlan(layout.canvases, layout.buckets, batch_size)
    options = Options(
        config, choices, 0.0, None, None, layout.max_boxes, canvas=canvas, masked=layout.masked, seed=None
    )
    source = BatchSource(dataset, plan, options, rows, 0, plan.steps_per_epoch)
    return Batches(source, workers, {"batch_size": batch_size, "images": len(dataset)})


class Batches:
    """A resumable iterator over the batches of a run; ``train_batches`` and ``eval_batches`` make it.

    ``get_state`` and ``set_state`` save and restore the position. ``close``, or a ``with`` statement, stops the threads
    or workers early. An error in a thread or worker is raised by ``next``, at the batch that the error concerns.

    Attributes:
        buckets: the shapes (rows, columns) of the batches, the smallest first.
        steps_per_epoch: number of batches of an epoch.
        max_boxes: G.
        masked: True if batches have "canvas".
    """

    def __init__(self, source: BatchSource, workers: int, fingerprint: dict[str, int]):
        if workers < 0:
            raise ValueError(f"workers should not be negative, got {workers}")
        if workers:
            import_grain()
        self._source, self._workers, self._fingerprint = source, workers, fingerprint
        self._delivered, self._stream = 0, None
        self.buckets, self.steps_per_epoch = source.plan.buckets, source.plan.steps_per_epoch
        self.max_boxes, self.masked = source.options.max_boxes, source.options.masked

    def __len__(self) -> int:
        """The number of batches of the whole run."""
        return len(self._source)

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> BatchDict:
        if self._delivered >= len(self):
            self.close()
            raise StopIteration
        if self._stream is None:
            self._stream = open_stream(self._source.after(self._delivered), self._workers)
        try:
            batch = next(self._stream)
        except BaseException:  # drops the prefetched batches; the next call starts again at this batch
            self.close()
            raise
        self._delivered += 1
        return batch

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def check_labels(self, allowed: range) -> None:
        """Checks that a model allows the labels of all boxes of the data set.

        Args:
            allowed: ``target_labels`` of the model.

        Raises:
            TypeError: for labels that are not integers.
            ValueError: for a label outside ``allowed``. Either message names the image's file and id, and the box.
        """
        check_dataset_labels(self._source.dataset, allowed)

    def get_state(self) -> dict[str, int]:
        """The position, for JSON: the number of delivered batches, and the seed and sizes that define the plan."""
        return {"batches": self._delivered, **self._fingerprint}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restores a position; the process and the number of workers may differ.

        Args:
            state: the result of ``get_state``.

        Raises:
            ValueError: if the state is of another plan: another seed, batch size or number of images.
        """
        for key, value in self._fingerprint.items():
            if state.get(key) != value:
                raise ValueError(f"the state is of a run with {key}={state.get(key)}, this one has {key}={value}")
        self.close()
        self._delivered = int(state["batches"])

    def close(self) -> None:
        """Stops the threads or workers; a further ``next`` starts them again."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()


class _Layout(NamedTuple):
    canvases: np.ndarray
    buckets: list[Size]
    max_boxes: int
    masked: bool


def _layout(
    dataset: Dataset,
    config: TransformConfig,
    choices: tuple[int, ...],
    buckets: Sequence[Size] | None,
    max_boxes: int | None,
    canvas: BucketCanvas,
) -> _Layout:
    """The shapes of all batches: the canvases of the images (the largest of each), the buckets, G, and masks."""
    check_canvas(canvas, ("image", "bucket"))
    records = [dataset[i] for i in range(len(dataset))]
    if not records:
        raise ValueError("expected at least one image, the data set has none")
    names, sizes = [record.path for record in records], [record.size for record in records]
    counts = [len(record.boxes) for record in records]
    slots = max(-(-max(counts) // _SLOT_STEP), 1) * _SLOT_STEP if max_boxes is None else max_boxes
    if slots < 1 or max(counts) > slots:
        i = int(np.argmax(counts))
        raise ValueError(f"{names[i]}: has {counts[i]} boxes, more than max_boxes={slots}: raise it")

    smallest, largest = (canvases(sizes, config, min_size=end(choices), names=names) for end in (min, max))
    shapes = choose_buckets(sizes, config, min_size=max(choices)) if buckets is None else sort_buckets(buckets)
    used = np.unique(assign(largest, shapes, names=names))
    if len(used) == 1:  # with several, an unused bucket may still take the incomplete batches of smaller buckets
        shapes = [shapes[used[0]]]
    whole = len(shapes) == 1 and (smallest == shapes).all() and (largest == shapes).all()
    masked = canvas == "image" and not whole
    if masked and (int(config.size_divisible) % 32 or any(side % 32 for shape in shapes for side in shape)):
        raise ValueError(
            f"canvases smaller than their bucket need multiples of 32, got size_divisible={config.size_divisible} and "
            f'buckets {shapes}: use canvas="bucket", or multiples of 32'
        )
    return _Layout(largest, shapes, slots, masked)


def _rows(batch_size: int, process_index: int, process_count: int) -> slice:
    if batch_size < 1 or process_count < 1 or not 0 <= process_index < process_count:
        raise ValueError(
            f"expected a positive batch_size and process_index < process_count, got {batch_size}, {process_index} and "
            f"{process_count}"
        )
    if batch_size % process_count:
        raise ValueError(f"batch_size={batch_size} should be a multiple of the {process_count} processes")
    count = batch_size // process_count
    return slice(count * process_index, count * (process_index + 1))
