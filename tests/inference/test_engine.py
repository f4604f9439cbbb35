"""The loop of inference on programs that compute nothing: order, full and rare batches, errors, memory."""

from __future__ import annotations

import itertools
import threading

import jax
import numpy as np
import pytest

from flaxdet.inference.engine import Failed, run, split_batch, stream
from flaxdet.inference.samples import Sample
from flaxdet.structures import Detections
from flaxdet.xla.routes import routes_for

WIDE, TALL, SQUARE = (64, 96), (96, 64), (96, 96)


class Told:
    """Programs that give each image one box whose score is its only pixel, and note what they are called with."""

    def __init__(self, *sizes: int, unmasked=()):
        self.sizes, self.unmasked, self.calls = sizes, unmasked, []

    def batch_sizes(self, bucket):
        return self.sizes

    def masked(self, bucket):
        return bucket not in self.unmasked

    def start(self, bucket, rows):
        assert len(rows) in self.sizes
        self.calls.append((bucket, [row.number for row in rows]))
        count = len(rows)
        scores = np.array([row.image.item() for row in rows], np.float32)[:, None]
        ones = np.ones((count, 1))
        return Detections(np.ones((count, 1, 4)), scores, ones.astype(np.int32), ones.astype(bool))


def sample(number: int, bucket) -> Sample:
    return Sample(number, np.full((1, 1, 1), number), (1, 1), bucket, bucket, bucket)


def samples(*buckets):
    return [sample(i, bucket) for i, bucket in enumerate(buckets)]


def numbers(found) -> list[int]:
    return [int(own["scores"].item()) for own in found]


def test_full_batches_first_and_results_in_order():
    programs = Told(2)
    found = run(samples(WIDE, TALL, WIDE, TALL, TALL, WIDE), programs)
    assert numbers(found) == list(range(6))
    assert programs.calls[:2] == [(WIDE, [0, 2]), (TALL, [1, 3])]
    assert sorted(programs.calls[2:]) == [(WIDE, [5, 5]), (TALL, [4, 4])]  # filled up with copies


def test_empty_places_go_to_images_of_smaller_buckets():
    programs = Told(4)
    assert numbers(run(samples(WIDE, SQUARE, TALL), programs)) == [0, 1, 2]
    assert programs.calls == [(SQUARE, [1, 0, 2, 1])]
    programs = Told(4, unmasked=[SQUARE])  # a program without masks computes what lies beyond a smaller canvas
    assert numbers(run(samples(WIDE, SQUARE, TALL), programs)) == [0, 1, 2]
    assert [call[0] for call in programs.calls] == [SQUARE, WIDE, TALL]


def test_several_batch_sizes():
    programs = Told(1, 4)
    assert numbers(run(samples(*[WIDE] * 6), programs)) == list(range(6))
    assert [len(rows) for _, rows in programs.calls] == [4, 1, 1]
    programs = Told(1, 4)
    with routes_for("gpu"):
        assert numbers(run(samples(*[WIDE] * 6), programs)) == list(range(6))
    assert [rows for _, rows in programs.calls] == [[0, 1, 2, 3], [4, 5, 4, 4]]


@pytest.mark.parametrize(
    ("count", "sizes", "on_cpu", "elsewhere"),
    [
        (8, (8, 1), [8], [8]),
        (1, (8, 1), [1], [1]),
        (3, (8, 1), [1, 1, 1], [8]),
        (11, (1, 8), [8, 1, 1, 1], [8, 8]),
        (5, (8, 4), [4, 4], [8]),
        (3, (1,), [1, 1, 1], [1, 1, 1]),
        (7, (2,), [2, 2, 2, 2], [2, 2, 2, 2]),
    ],
)
def test_the_batches_of_several_images(count, sizes, on_cpu, elsewhere):
    assert split_batch(count, sizes, fill=False) == on_cpu
    assert split_batch(count, sizes, fill=True) == elsewhere


def test_errors_in_their_place():
    broken = ValueError("broken")
    given = [sample(0, WIDE), Failed(1, broken), sample(2, TALL), Failed(3, broken)]
    found = list(run(given, Told(2)))
    assert [found[1], found[3]] == [broken, broken]
    assert numbers([found[0], found[2]]) == [0, 2]


def test_an_endless_stream_reads_few_and_gives_a_rare_shape_its_turn():
    taken = itertools.count()
    results = stream(
        lambda i: sample(i, TALL if i == 1 else WIDE), taken, Told(2), ahead=4, workers=2, patience=16
    )  # image 1 is alone in its bucket
    assert numbers(itertools.islice(results, 5)) == list(range(5))
    assert next(taken) < 40
    results.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("flaxdet-read")]


@pytest.mark.parametrize("size", [1, 2])
def test_one_image_before_many_errors(size):
    """The image and the errors come while more are read, although no batch ever fills."""
    error, taken = ValueError("broken"), itertools.count()
    results = stream(
        lambda i: Failed(i, error) if i else sample(0, WIDE), taken, Told(size), ahead=4, workers=2, patience=8 * size
    )
    image, *errors = itertools.islice(results, 10)
    results.close()
    assert numbers([image]) == [0]
    assert errors == [error] * 9
    assert next(taken) < 40


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (
            1,
            r"^out of memory in bucket 64x96 \(rows x columns\) in batches of 1: make the model's min_size",
        ),
        (4, r"in batches of 4: make the batch, or the model's min_size and max_size, smaller"),
    ],
)
def test_out_of_memory_says_where(size, message):
    class Exhausted(Told):
        said = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12 bytes."

        def start(self, bucket, rows):
            raise jax.errors.JaxRuntimeError(self.said)

    with pytest.raises(MemoryError, match=message):
        list(run(samples(WIDE), Exhausted(size)))
    Exhausted.said = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        list(run(samples(WIDE), Exhausted(size)))
