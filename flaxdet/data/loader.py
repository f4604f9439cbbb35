"""Batches for training and evaluation: reproducible, resumable, split among processes, made by threads or workers.

A *batch* is a dict of numpy arrays; B are the rows of this process, H, W the bucket, G the slots for boxes:

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
from flaxdet.data.samples import BatchSource, BucketCanvas, Dataset, Options, check_dataset_labels
from flaxdet.data.streams import import_grain, open_stream
from flaxdet.images.buckets import Size, assign, canvases, choose_buckets, sort_buckets
from flaxdet.images.transform import check_canvas
from flaxdet.structures import TransformConfig

_SLOT_STEP = 8  # slots for boxes are a multiple of it

BatchDict = dict[str, np.ndarray]


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

    Batch i depends on the arguments and on nothing else: not on the number of workers, and the rows of all processes
    together are those of one. ``TrainPlan`` says how an epoch is made up; the augmentation of an image depends on
    (seed, epoch, its index) alone.

    Args:
        dataset: of ``read_coco``.
        config: ``model.transform``.
        batch_size: of all processes together.
        steps: batches of the run.
        seed: not negative.
        flip: probability of a horizontal flip.
        min_size: pixels of the shorter side. Several: one is chosen at random for each image. Default
            ``config.min_size``.
        jitter: large-scale jitter, torchvision's is (.1, 2.): the range of the scale. ``min_size`` and the size
            options of ``config`` then mean nothing; every image fills ``crop``.
        crop: pixels of a side, or (rows, columns), of the jittered image; default 1024.
        buckets: shapes [(rows, columns)] of the batches' arrays; default three that ``choose_buckets`` finds.
        max_boxes: G; default the most boxes of an image, rounded up to a multiple of 8.
        canvas: "image": each image counts as padded to its own canvas, so that its losses do not depend on the
            bucket. "bucket": as padded to the whole bucket, in which case no masks are computed.
        workers: processes that make batches, by grain. With 0, two threads do.
        process_index: of this process.
        process_count: each process gets ``batch_size / process_count`` rows of every batch.

    Returns:
        An iterator of ``steps`` batches: dicts of numpy arrays, whose names and shapes are listed at the head of
        ``flaxdet.data.loader``.

    Raises:
        ValueError: for arguments that can't be met, among them an image that fits no bucket or has more boxes than
            ``max_boxes``; it names the image.
        ImportError: for workers without grain.
    """
    if not 0 <= flip <= 1:
        raise ValueError(f"flip should be a probability, got {flip!r}")
    if steps < 0 or seed < 0:
        raise ValueError(f"steps and seed should not be negative, got {steps} and {seed}")
    choices: Any = (config if min_size is None else replace(config, min_size=min_size)).min_size
    scales, cut = check_jitter(jitter, crop, min_size)
    # large-scale jitter makes every image a square that is resized no more
    geometry = config if cut is None else replace(config, fixed_size=cut[::-1])
    layout = _layout(dataset, geometry, choices, buckets, max_boxes, canvas)
    rows = _rows(batch_size, process_index, process_count)
    plan = TrainPlan(layout.own, layout.buckets, batch_size, seed)
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
    buckets: Sequence[Size] | None = None,
    max_boxes: int | None = None,
    canvas: BucketCanvas = "image",
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Every image once, resized as for evaluation, in its order within its bucket.

    The last batch of a bucket is filled up with its first image, whose "image_id" is then -1.

    Args:
        dataset: of ``read_coco``.
        config: ``model.transform``.
        batch_size: of all processes together.
        buckets: as for ``train_batches``.
        max_boxes: as for ``train_batches``.
        canvas: as for ``train_batches``.
        workers: as for ``train_batches``.
        process_index: of this process.
        process_count: each process gets ``batch_size / process_count`` rows of every batch.

    Returns:
        An iterator, finite, of known length, of dicts as ``train_batches`` gives them.

    Raises:
        ValueError: as ``train_batches``.
        ImportError: for workers without grain.
    """
    choices = (config.min_size[-1],)  # pyright: ignore[reportIndexIssue]
    layout = _layout(dataset, config, choices, buckets, max_boxes, canvas)
    rows = _rows(batch_size, process_index, process_count)
    plan = EvalPlan(layout.own, layout.buckets, batch_size)
    options = Options(
        config, choices, 0.0, None, None, layout.max_boxes, canvas=canvas, masked=layout.masked, seed=None
    )
    source = BatchSource(dataset, plan, options, rows, 0, plan.steps_per_epoch)
    return Batches(source, workers, {"batch_size": batch_size, "images": len(dataset)})


class Batches:
    """An iterator over the batches of a run, which can say where it stands and go on from there.

    ``train_batches`` and ``eval_batches`` make it.

    ``close`` it, or use it in a ``with`` statement, to stop its threads or workers early. An error in one of these is
    raised here, at the batch that it concerns.

    Attributes:
        buckets: the shapes (rows, columns) that batches come in, the smallest first.
        steps_per_epoch: batches of an epoch.
        max_boxes: G.
        masked: whether batches have "canvas".
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
        """The batches of the whole run."""
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
        except BaseException:  # what was prefetched is lost; the next call would start anew at this batch
            self.close()
            raise
        self._delivered += 1
        return batch

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def check_labels(self, allowed: range) -> None:
        """Makes sure that all boxes of the data set have labels of a model.

        Args:
            allowed: ``target_labels`` of the model.

        Raises:
            TypeError: for labels that are not integers.
            ValueError: for another label; both name the image's file and id, and the box.
        """
        check_dataset_labels(self._source.dataset, allowed)

    def get_state(self) -> dict[str, int]:
        """Where it stands, for JSON: the number of batches delivered, and what the plan was made from."""
        return {"batches": self._delivered, **self._fingerprint}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on where ``get_state`` was called, in this or another process, with any number of workers.

        Args:
            state: of ``get_state``.

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
    own: np.ndarray
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
    """What is the same for every batch: the images' canvases (the largest of each), the buckets, G, and masks."""
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

    smallest, own = (canvases(sizes, config, min_size=end(choices), names=names) for end in (min, max))
    shapes = choose_buckets(sizes, config, min_size=max(choices)) if buckets is None else sort_buckets(buckets)
    used = np.unique(assign(own, shapes, names=names))
    if len(used) == 1:  # otherwise buckets that hold no image of their own still take what is left over in others
        shapes = [shapes[used[0]]]
    whole = len(shapes) == 1 and (smallest == shapes).all() and (own == shapes).all()
    masked = canvas == "image" and not whole
    if masked and (int(config.size_divisible) % 32 or any(side % 32 for shape in shapes for side in shape)):
        raise ValueError(
            f"canvases smaller than their bucket need multiples of 32, got size_divisible={config.size_divisible} and "
            f'buckets {shapes}: use canvas="bucket", or multiples of 32'
        )
    return _Layout(own, shapes, slots, masked)


def _rows(batch_size: int, process_index: int, process_count: int) -> slice:
    if batch_size < 1 or process_count < 1 or not 0 <= process_index < process_count:
        raise ValueError(
            f"expected a positive batch_size and process_index < process_count, got {batch_size}, {process_index} and "
            f"{process_count}"
        )
    if batch_size % process_count:
        raise ValueError(f"batch_size={batch_size} should be a multiple of the {process_count} processes")
    own = batch_size // process_count
    return slice(own * process_index, own * (process_index + 1))
