"""The loop of inference: sorts images into buckets, runs batches of a bucket by a program, returns results in order.

``predict``, ``Predictor``, ``detect_dataset`` and ``ExportedDetector`` use this loop. They differ in the source of
images, which is an iterable of samples, and in the programs, which are an object with the methods of ``Programs``.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, overload

import jax

from flaxdet.images.ahead import read_ahead
from flaxdet.images.buckets import Size, holds
from flaxdet.inference.detect import ImageDetections, unpad
from flaxdet.inference.samples import Sample
from flaxdet.structures import Detections
from flaxdet.xla import routes


class Programs(Protocol):
    """The programs that run batches. ``bucket`` is (rows, columns) of the static shape."""

    def batch_sizes(self, bucket: Size, /) -> Sequence[int]:
        """The batch sizes of the programs of a bucket."""
        ...

    def masked(self, bucket: Size, /) -> bool:
        """True if a canvas may be smaller than the bucket. Images of smaller buckets may then run in the bucket too."""
        ...

    def start(self, bucket: Size, rows: Sequence[Sample], /) -> Detections:
        """Starts a program on a batch; doesn't wait for the result.

        Args:
            bucket: (rows, columns).
            rows: the images of the batch; the number of images is one of ``batch_sizes(bucket)``.

        Returns:
            The detections, boxes [B, K, 4] in the pixels of the original images.
        """
        ...


class Failed(NamedTuple):
    """Stands in for the sample of an image that can't be read or placed.

    Attributes:
        number: position of the error in the results.
        error: the error.
    """

    number: int
    error: Exception


@overload
def run(samples: Iterable[Sample], programs: Programs, *, patience: int | None = None) -> Iterator[ImageDetections]: ...


@overload
def run(
    samples: Iterable[Sample | Failed], programs: Programs, *, patience: int | None = None
) -> Iterator[ImageDetections | Exception]: ...


def run(
    samples: Iterable[Sample | Failed], programs: Programs, *, patience: int | None = None
) -> Iterator[ImageDetections | Exception]:
    """Runs samples in batches. The device gets the next batch before the host waits for the result of the last batch.

    Args:
        samples: samples with the numbers 0, 1, 2, ... in this order; may be endless.
        programs: the programs that run the batches.
        patience: a batch that is not full runs after this many later samples; after twice as many, the host waits for
            the result. None: batches that are not full run at the end.

    Yields:
        For each sample, in order, {"boxes": [N, 4] xyxy in pixels of the original image, "scores": [N], "labels": [N]},
        or the error of a failed sample.

    Raises:
        MemoryError: if the device has too little memory for a batch; the message names the bucket.
    """
    waiting: dict[Size, list[Sample]] = {}  # in the order of the oldest sample
    running: deque[tuple[list[Sample], Size, int, Detections]] = deque()
    done: dict[int, ImageDetections | Exception] = {}
    next_number = 0

    def settle() -> None:
        rows, bucket, count, detections = running.popleft()
        with naming_bucket(bucket, count):
            results = unpad(detections)
        for sample, result in zip(rows, results, strict=False):  # further results belong to copies
            done[sample.number] = result

    def start(bucket: Size) -> None:
        rows, count = _take(waiting, bucket, programs)
        with naming_bucket(bucket, count):
            detections = programs.start(bucket, rows + rows[:1] * (count - len(rows)))
        running.append((rows, bucket, count, detections))
        if len(running) > 1:
            settle()

    for sample in samples:
        if isinstance(sample, Failed):
            done[sample.number] = sample.error
        else:
            queue = waiting.setdefault(sample.bucket, [])
            queue.append(sample)
            if len(queue) == max(programs.batch_sizes(sample.bucket)):
                start(sample.bucket)
        if patience is not None:
            oldest, queue = next(iter(waiting.items()), (None, []))
            if oldest is not None and sample.number - queue[0].number >= patience:
                start(oldest)
            # if few images follow, no next batch fetches the results of this batch
            while running and sample.number - min(row.number for row in running[0][0]) >= 2 * patience:
                settle()
        while next_number in done:
            yield done.pop(next_number)
            next_number += 1
    while waiting:
        start(max(waiting, key=lambda bucket: bucket[0] * bucket[1]))
    while running:
        settle()
    yield from (done[number] for number in sorted(done))


def stream(
    load: Callable[[Any], Sample | Failed],
    items: Iterable[Any],
    programs: Programs,
    *,
    ahead: int,
    workers: int,
    patience: int,
) -> Generator[ImageDetections | Exception]:
    """``run`` on images that threads read ahead of the device.

    Args:
        load: ``item -> sample``; called in a thread.
        items: the images; may be endless.
        programs: the programs that run the batches.
        ahead: largest number of samples in memory, besides the samples that wait in buckets.
        workers: number of threads.
        patience: as for ``run``.

    Yields:
        As ``run``.

    Raises:
        Exception: any error of ``load``.
        MemoryError: as ``run``.
    """
    with contextlib.closing(read_ahead(load, items, ahead=ahead, workers=workers)) as samples:
        yield from run(samples, programs, patience=patience)


def _take(waiting: dict[Size, list[Sample]], bucket: Size, programs: Programs) -> tuple[list[Sample], int]:
    """Takes the samples of the next batch of a bucket out of the queues; also returns the batch size.

    If too few images wait in this bucket, images that wait in smaller buckets join the batch.
    """
    fill = routes.platform() != "cpu"
    count = split_batch(len(waiting[bucket]), programs.batch_sizes(bucket), fill=fill)[0]
    others = [other for other in waiting if other != bucket and programs.masked(bucket) and holds(bucket, other)]
    rows: list[Sample] = []
    for key in [bucket, *others]:
        free = count - len(rows)
        rows += waiting[key][:free]
        waiting[key] = waiting[key][free:]
        if not waiting[key]:
            del waiting[key]
    return rows, count


def split_batch(count: int, sizes: Iterable[int], *, fill: bool) -> list[int]:
    """Divides images into batches, for programs of fixed batch sizes.

    Args:
        count: number of images.
        sizes: batch sizes of the programs.
        fill: True if one batch that is not full costs less than several small batches, as on a GPU or TPU.

    Returns:
        The batch size of each call. Only the last call may have free places, which are filled up with copies.
    """
    calls = []
    while count > 0:
        smaller, larger = [size for size in sizes if size <= count], [size for size in sizes if size >= count]
        calls.append(min(larger) if larger and (fill or not smaller) else max(smaller))
        count -= calls[-1]
    return calls


@contextlib.contextmanager
def naming_bucket(bucket: Size, count: int) -> Iterator[None]:
    """Replaces XLA's out-of-memory error by a MemoryError that names the bucket.

    Args:
        bucket: (rows, columns) of the batch.
        count: number of images in the batch.

    Raises:
        MemoryError: instead of XLA's error.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not out_of_memory(error):
            raise
        remedy = "make the batch, or the model's min_size and max_size, smaller"
        if count == 1:
            remedy = "make the model's min_size and max_size smaller"
        raise MemoryError(
            f"out of memory in bucket {bucket[0]}x{bucket[1]} (rows x columns) in batches of {count}: {remedy}"
        ) from error


def out_of_memory(error: Exception) -> bool:
    """Whether XLA raised the error because a device has too little memory."""
    return "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error)
