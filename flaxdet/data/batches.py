"""Which images share a batch: the plan of an epoch.

All of it is decided from sizes alone, before an image is read, and is the same in every process. Sizes, canvases and
buckets are (rows, columns) in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from flaxdet.images.buckets import Size, Sizes, assign, holds


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
            larger = (n for n in range(number + 1, len(self.buckets)) if holds(self.buckets[n], bucket))
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
