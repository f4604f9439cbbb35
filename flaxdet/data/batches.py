"""Which images share a batch, and in an array of which shape: buckets, and the plan of an epoch.

All of it is decided from sizes alone, before an image is read, and is the same in every process. Sizes, canvases and
buckets are (rows, columns) in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from flaxdet.structures import TransformConfig
from flaxdet.transform import canvas_size, resized_size

Size = tuple[int, int]
Sizes = Int[np.ndarray, "N 2"]

_MOST_SHAPES = 64  # of canvases, before they are rounded up to fewer


class Batch(NamedTuple):
    """One batch of all processes together.

    Attributes:
        epoch: from 0.
        bucket: (rows, columns) of its array.
        indices: [B] of its images in the data set.
        real: [B] bool, False where an image only fills up the last batch of an evaluation.
    """

    epoch: int
    bucket: Size
    indices: Int[np.ndarray, " B"]
    real: np.ndarray


def canvases(
    sizes: Sequence[Size], config: TransformConfig, *, min_size: int | None = None, names: Sequence[Any] | None = None
) -> Sizes:
    """[N, 2] canvas of each image after its resize.

    Args:
        sizes: of the original images.
        config: ``model.transform``.
        min_size: overrides the last of ``config.min_size``.
        names: what to call the images in errors; default their numbers.

    Raises:
        ValueError: if an image is so elongated that a side would have no pixel left.
    """
    names = [f"image {i}" for i in range(len(sizes))] if names is None else names
    resized = (
        resized_size(size, config, min_size=min_size, name=str(name)) for size, name in zip(sizes, names, strict=True)
    )
    return np.array([canvas_size(size, config) for size in resized], np.int64).reshape(-1, 2)


def choose_buckets(
    sizes: Sequence[Size], config: TransformConfig, count: int = 3, *, min_size: int | None = None
) -> list[Size]:
    """A few shapes that hold the canvas of every image and waste little.

    Starts from all canvases that occur, and joins two of them into the smallest shape that holds both, those first
    that waste the fewest pixels by it, until ``count`` are left.

    Args:
        sizes: of the original images.
        config: ``model.transform``.
        count: at most so many buckets.
        min_size: overrides the last of ``config.min_size``; for multi-scale training the largest.

    Returns:
        Buckets, the smallest first; their sides are multiples of ``config.size_divisible``.

    Raises:
        ValueError: for no sizes or a count below 1, and as ``canvases``.
    """
    if count < 1 or not len(sizes):
        raise ValueError(f"expected at least one image and one bucket, got {len(sizes)} and {count}")
    every, step = canvases(sizes, config, min_size=min_size), int(config.size_divisible)
    shapes, images = np.unique(every, axis=0, return_counts=True)
    while len(shapes) > max(count, _MOST_SHAPES):
        step *= 2
        shapes, images = np.unique(-(-every // step) * step, axis=0, return_counts=True)
    while len(shapes) > count:
        union = np.maximum(shapes[:, None], shapes[None])
        pixels = shapes.prod(-1) * images
        waste = union.prod(-1) * (images[:, None] + images[None]) - pixels[:, None] - pixels[None]
        np.fill_diagonal(waste, np.iinfo(np.int64).max)
        a, b = np.unravel_index(waste.argmin(), waste.shape)
        shapes[a], images[a] = union[a, b], images[a] + images[b]
        shapes, images = np.delete(shapes, b, 0), np.delete(images, b)
    buckets = sort_buckets(shapes.tolist())
    while True:  # an image may fit a smaller bucket than the one that grew around it, which can then shrink
        members = assign(every, buckets)
        shrunk = sort_buckets([every[members == i].max(axis=0).tolist() for i in np.unique(members)])
        if shrunk == buckets:
            return buckets
        buckets = shrunk


def assign(own: Sizes, buckets: Sequence[Size], *, names: Sequence[Any] | None = None) -> Int[np.ndarray, " N"]:
    """[N] number of the smallest bucket that holds each canvas.

    Args:
        own: the images' canvases.
        buckets: the smallest first.
        names: what to call the images in errors; default their numbers.

    Raises:
        ValueError: naming an image that no bucket holds.
    """
    fits = (own[:, None] <= np.asarray(buckets)[None]).all(-1)
    bad = ~fits.any(-1)
    if bad.any():
        i = int(bad.argmax())
        shapes = ", ".join(f"{rows}x{columns}" for rows, columns in buckets)
        raise ValueError(
            f"{f'image {i}' if names is None else names[i]}: its canvas of {own[i, 0]}x{own[i, 1]} (rows x columns) "
            f"fits none of the buckets {shapes} ({int(bad.sum())} of {len(own)} images fit none)"
        )
    return fits.argmax(-1)


class TrainPlan:
    """Every batch of a training run, each a pure function of its number.

    An epoch has ceil(images / batch_size) batches, and its plan depends on (seed, epoch) alone. It shuffles the images
    and groups them by bucket. What is left over in a bucket joins the next larger one that holds it. What then is less
    than a batch is filled up with other images of the epoch, from the start of its order. Where buckets do not contain
    each other (portrait and landscape), several such rests may be more than the epoch has batches left; the smallest
    of them then sit this epoch out, other images each time.

    Args:
        own: [N, 2] canvases.
        buckets: the smallest first, each holding some canvas.
        batch_size: of all processes together.
        seed: of the shuffle.
    """

    def __init__(self, own: Sizes, buckets: Sequence[Size], batch_size: int, seed: int):
        self.buckets, self.batch_size, self.seed = list(buckets), batch_size, seed
        self.steps_per_epoch = -(-len(own) // batch_size)
        self._own, self._assigned = own, assign(own, buckets)
        self._epoch: tuple[int, list[Batch]] = (-1, [])

    def __getitem__(self, i: int) -> Batch:
        epoch, place = divmod(i, self.steps_per_epoch)
        kept, plan = self._epoch  # read and written as one, since threads share it
        if kept != epoch:
            plan = self.epoch(epoch)
            self._epoch = epoch, plan
        return plan[place]

    def epoch(self, epoch: int) -> list[Batch]:
        """The batches of one epoch in their order."""
        count, size = len(self._own), self.batch_size
        rng = np.random.default_rng([self.seed, epoch, count])  # the third number is no image's, which have their own
        order = rng.permutation(count)
        place = np.argsort(order)
        queues = [order[self._assigned[order] == number] for number in range(len(self.buckets))]
        batches: list[tuple[int, np.ndarray]] = []
        rests: list[tuple[int, np.ndarray]] = []
        for number, bucket in enumerate(self.buckets):
            queue = queues[number][np.argsort(place[queues[number]])]
            whole = len(queue) - len(queue) % size
            batches += [(number, queue[start : start + size]) for start in range(0, whole, size)]
            rest = queue[whole:]
            larger = (n for n in range(number + 1, len(self.buckets)) if _holds(self.buckets[n], bucket))
            target = next(larger, None)
            if target is not None:
                queues[target] = np.concatenate([queues[target], rest])
            elif len(rest):
                rests.append((number, rest))
        rests.sort(key=lambda rest: -len(rest[1]))
        for number, rest in rests[: self.steps_per_epoch - len(batches)]:
            fitting = order[(self._own[order] <= np.asarray(self.buckets[number])[None]).all(-1)]
            others = fitting[~np.isin(fitting, rest)]
            batches.append((number, np.resize(np.concatenate([rest, others]), size)))
        real = np.ones(size, bool)
        return [Batch(epoch, self.buckets[batches[i][0]], batches[i][1], real) for i in rng.permutation(len(batches))]


class EvalPlan:
    """Every image once, in its order within its bucket; the last batch of a bucket repeats its first image.

    Args:
        own: [N, 2] canvases.
        buckets: the smallest first.
        batch_size: of all processes together.
    """

    def __init__(self, own: Sizes, buckets: Sequence[Size], batch_size: int):
        self.buckets, self.batch_size = list(buckets), batch_size
        self._batches: list[Batch] = []
        assigned = assign(own, buckets)
        for number, bucket in enumerate(self.buckets):
            queue = np.flatnonzero(assigned == number)
            for start in range(0, len(queue), batch_size):
                some = queue[start : start + batch_size]
                real = np.arange(batch_size) < len(some)
                padded = np.full(batch_size, some[0])
                padded[: len(some)] = some
                self._batches.append(Batch(0, bucket, padded, real))
        self.steps_per_epoch = len(self._batches)

    def __getitem__(self, i: int) -> Batch:
        return self._batches[i]


def sort_buckets(buckets: Sequence[Size]) -> list[Size]:
    """Buckets, checked: the smallest first, each once.

    Raises:
        ValueError: unless each is two positive integers, and there is one.
    """
    result = []
    for bucket in buckets:
        sides = tuple(bucket)
        if len(sides) != 2 or not all(isinstance(side, (int, np.integer)) and side > 0 for side in sides):
            raise ValueError(f"a bucket should be (rows, columns), two positive integers, got {bucket!r}")
        result.append((int(sides[0]), int(sides[1])))
    if not result:
        raise ValueError("expected at least one bucket, got none")
    return sorted(set(result), key=_by_area)


def _by_area(bucket: Size) -> tuple[int, Size]:
    return bucket[0] * bucket[1], bucket


def _holds(bucket: Size, other: Size) -> bool:
    return bucket[0] >= other[0] and bucket[1] >= other[1]
