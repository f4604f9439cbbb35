"""The one loop of inference: images into buckets, batches of a bucket through a program, results in order.

``predict``, ``Predictor``, ``detect_dataset`` and ``ExportedDetector`` differ in the programs that they run and in
where images come from; an object of the class ``Programs`` stands for the first, an iterable of samples for the second.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax

from flaxdet.images.ahead import read_ahead
from flaxdet.images.buckets import Size, holds
from flaxdet.inference.detect import Found, unpad
from flaxdet.inference.samples import Sample
from flaxdet.structures import Detections
from flaxdet.xla import routes


class Programs(Protocol):
    """What runs batches. ``bucket`` is (rows, columns) of the static shape."""

    def batch_sizes(self, bucket: Size, /) -> Sequence[int]:
        """The numbers of images that the programs of a bucket take."""
        ...

    def masked(self, bucket: Size, /) -> bool:
        """Whether a canvas may be smaller than the bucket, so that images of smaller buckets may run in it too."""
        ...

    def start(self, bucket: Size, rows: Sequence[Sample], /) -> Detections:
        """Starts a program on as many images as it takes; doesn't wait for the result.

        Returns:
            A row for each image, boxes [B, K, 4] in the pixels of the original images.
        """
        ...


class Failed(NamedTuple):
    """In place of a sample: an image that can't be computed.

    Attributes:
        number: place of the error among the results.
        error: why.
    """

    number: int
    error: Exception


def run(
    samples: Iterable[Sample | Failed], programs: Programs, *, patience: int | None = None
) -> Iterator[Found | Exception]:
    """Runs samples in batches; the device has its next batch before the host waits for the last.

    Args:
        samples: numbered 0, 1, 2, ... in this order; may be endless.
        programs: what runs them.
        patience: samples after which a batch that is not full runs all the same; after twice as many the host waits for
            the result. None: batches that are not full run last.

    Yields:
        For each sample, in order, {"boxes": [N, 4] xyxy in pixels of the original image, "scores": [N], "labels": [N]},
        or the error of one that failed.

    Raises:
        MemoryError: if the device has too little memory for a batch; names the bucket.
    """
    waiting: dict[Size, list[Sample]] = {}  # in the order of the oldest
    running: deque[tuple[list[Sample], Size, int, Detections]] = deque()
    done: dict[int, Found | Exception] = {}
    given = 0

    def settle() -> None:
        rows, bucket, count, detections = running.popleft()
        with naming_bucket(bucket, count):
            results = unpad(detections)
        for sample, found in zip(rows, results, strict=False):  # the rest are copies
            done[sample.number] = found

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
            # where few images follow, no next batch makes room for the results of the last
            while running and sample.number - min(row.number for row in running[0][0]) >= 2 * patience:
                settle()
        while given in done:
            yield done.pop(given)
            given += 1
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
) -> Generator[Found | Exception]:
    """``run`` on images that threads read ahead of the device.

    Args:
        load: makes the sample of an item, in a thread.
        items: taken one by one; may be endless.
        programs: what runs the samples.
        ahead: samples held at most besides those that wait in buckets.
        workers: threads.
        patience: as for ``run``.

    Yields:
        As ``run``.

    Raises:
        Exception: what ``load`` raises.
        MemoryError: as ``run``.
    """
    with contextlib.closing(read_ahead(load, items, ahead=ahead, workers=workers)) as samples:
        yield from run(samples, programs, patience=patience)


def _take(waiting: dict[Size, list[Sample]], bucket: Size, programs: Programs) -> tuple[list[Sample], int]:
    """The samples of the next batch of a bucket, taken out of the queues, and the batch size of its program.

    Empty places go to images that wait for smaller buckets.
    """
    fill = routes.platform() != "cpu"
    count = split_batch(len(waiting[bucket]), programs.batch_sizes(bucket), fill=fill)[0]
    others = [other for other in waiting if other != bucket and programs.masked(bucket) and holds(bucket, other)]
    rows: list[Sample] = []
    for one in [bucket, *others]:
        places = count - len(rows)
        rows += waiting[one][:places]
        waiting[one] = waiting[one][places:]
        if not waiting[one]:
            del waiting[one]
    return rows, count


def split_batch(count: int, sizes: Iterable[int], *, fill: bool) -> list[int]:
    """The batches that some images run in, by programs of fixed batch sizes.

    Args:
        count: images.
        sizes: batch sizes of the programs.
        fill: whether a batch that is not full costs less than several small ones, as on a GPU or TPU.

    Returns:
        The batch size of each call; at most the last call is filled up with copies.
    """
    calls = []
    while count > 0:
        smaller, larger = [size for size in sizes if size <= count], [size for size in sizes if size >= count]
        calls.append(min(larger) if larger and (fill or not smaller) else max(smaller))
        count -= calls[-1]
    return calls


@contextlib.contextmanager
def naming_bucket(bucket: Size, count: int) -> Iterator[None]:
    """Turns XLA's error of too little memory into one that names the bucket.

    Args:
        bucket: (rows, columns) of the batch at work.
        count: images of the batch.

    Raises:
        MemoryError: instead of XLA's error.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "Out of memory" not in str(error):
            raise
        remedy = "make the batch, or the model's min_size and max_size, smaller"
        if count == 1:
            remedy = "make the model's min_size and max_size smaller"
        raise MemoryError(
            f"out of memory in bucket {bucket[0]}x{bucket[1]} (rows x columns) in batches of {count}: {remedy}"
        ) from error
