"""Which images share a batch: the plan of an epoch.

A plan depends on the images' sizes alone, is made before an image is read, and is the same in every process. Sizes,
canvases and buckets are (rows, columns) in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from flaxdet.images.buckets import Size, Sizes, assign, holds


class BatchPlan(NamedTuple):
    """The plan of one batch, with the rows of all processes.

    Attributes:
        epoch: number of the epoch, from 0.
        bucket: (rows, columns) of the batch's array.
        indices: [B] index of each image in the data set.
        real: [B] bool, False where an image only fills up the last batch of an evaluation.
    """

    epoch: int
    bucket: Size
    indices: Int[np.ndarray, " B"]
    real: np.ndarray


class TrainPlan:
    """The batches of a training run; each is a pure function of its number.

    An epoch has ceil(images / batch_size) batches, and the plan of an epoch depends on (seed, epoch) alone. The plan
    shuffles the images and groups them by bucket. Images that don't fill a batch of their bucket move to the next
    larger bucket that contains the bucket. In a bucket that no other bucket contains, an incomplete batch is filled up
    with other images of the epoch, in shuffled order. Where buckets do not contain each other (portrait and landscape),
    there may be more incomplete batches than the epoch has left. The smallest incomplete batches are then dropped for
    this epoch, with other images each time.

    Args:
        image_canvases: [N, 2] canvas of each image.
        buckets: the smallest first, each holding some canvas.
        batch_size: rows of a batch, of all processes together.
        seed: seed of the shuffle.
    """

    def __init__(self, image_canvases: Sizes, buckets: Sequence[Size], batch_size: int, seed: int):
        self.buckets, self.batch_size, self.seed = list(buckets), batch_size, seed
        self.steps_per_epoch = -(-len(image_canvases) // batch_size)
        self._canvases, self._assigned = image_canvases, assign(image_canvases, buckets)
        self._epoch: tuple[int, list[BatchPlan]] = (-1, [])  # the epoch planned last, and its batches

    def __getitem__(self, i: int) -> BatchPlan:
        epoch, place = divmod(i, self.steps_per_epoch)
        planned, plan = self._epoch  # number and batches are read and written together, which makes it thread-safe
        if planned != epoch:
            plan = self.epoch(epoch)
            self._epoch = epoch, plan
        return plan[place]

    def epoch(self, epoch: int) -> list[BatchPlan]:
        """The batches of one epoch, in order."""
        count, size = len(self._canvases), self.batch_size
        # The third number is no image's index, with which make_sample seeds the augmentation of an image.
        rng = np.random.default_rng([self.seed, epoch, count])
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
            fitting = order[(self._canvases[order] <= np.asarray(self.buckets[number])[None]).all(-1)]
            others = fitting[~np.isin(fitting, rest)]
            batches.append((number, np.resize(np.concatenate([rest, others]), size)))
        real = np.ones(size, bool)
        planned = [BatchPlan(epoch, self.buckets[number], indices, real) for number, indices in batches]
        return [planned[i] for i in rng.permutation(len(planned))]


class EvalPlan:
    """The batches of an evaluation: every image once, bucket by bucket, in the order of the data set.

    The last batch of a bucket is filled up by repeating the batch's first image.

    Args:
        image_canvases: [N, 2] canvas of each image.
        buckets: the smallest first.
        batch_size: rows of a batch, of all processes together.
    """

    def __init__(self, image_canvases: Sizes, buckets: Sequence[Size], batch_size: int):
        self.buckets, self.batch_size = list(buckets), batch_size
        self._batches: list[BatchPlan] = []
        assigned = assign(image_canvases, buckets)
        for number, bucket in enumerate(self.buckets):
            queue = np.flatnonzero(assigned == number)
            for start in range(0, len(queue), batch_size):
                images = queue[start : start + batch_size]
                real = np.arange(batch_size) < len(images)
                padded = np.full(batch_size, images[0])
                padded[: len(images)] = images
                self._batches.append(BatchPlan(0, bucket, padded, real))
        self.steps_per_epoch = len(self._batches)

    def __getitem__(self, i: int) -> BatchPlan:
        return self._batches[i]
