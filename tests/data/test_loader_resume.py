"""Which batches: reproducible, resumable at the exact sample, split among processes, by any workers."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from flaxdet.data import train_batches
from tests.data.loaders import CONFIG, check_same, needs_grain, same


def test_the_same_arguments_give_the_same_batches(data):
    arguments = {"batch_size": 4, "steps": 9, "min_size": (48, 64)}
    check_same(train_batches(data, CONFIG, **arguments), train_batches(data, CONFIG, **arguments))
    first, other = (next(train_batches(data, CONFIG, **arguments, seed=seed)) for seed in (0, 1))
    assert not same(first, other)


def test_augmentation_depends_on_the_sample_alone(data):
    """Not on the batch that it lands in: other batch sizes give the same rows."""
    rows = [
        {
            (i * size // 16, int(batch["image_id"][n])): batch["boxes"][n]
            for i, batch in enumerate(train_batches(data, CONFIG, batch_size=size, steps=48 // size, min_size=(48, 64)))
            for n in range(size)
        }
        for size in (1, 2)
    ]
    common = rows[0].keys() & rows[1].keys()
    assert len(common) > 40
    for key in common:
        np.testing.assert_array_equal(rows[0][key], rows[1][key])


@pytest.mark.parametrize("count", [2, 4])
def test_processes_together_get_the_batches_of_one(count, data):
    arguments = {"batch_size": 4, "steps": 10, "jitter": (0.5, 1.5), "crop": 64}
    whole = train_batches(data, CONFIG, **arguments)
    parts = [train_batches(data, CONFIG, **arguments, process_index=i, process_count=count) for i in range(count)]
    for batch, *own in zip(whole, *parts, strict=True):
        assert all(len(part["size"]) == 4 // count for part in own)
        assert same({key: np.concatenate([part[key] for part in own]) for key in batch}, batch)


def test_state_resumes_at_the_exact_sample(data):
    arguments = {"batch_size": 4, "steps": 14, "min_size": (48, 64)}
    expected = list(train_batches(data, CONFIG, **arguments))
    first = train_batches(data, CONFIG, **arguments)
    for delivered in (0, 3, 7):  # 7 is in the middle of the second epoch
        while first.get_state()["batches"] < delivered:
            next(first)
        state = json.loads(json.dumps(first.get_state()))
        second = train_batches(data, CONFIG, **arguments)
        second.set_state(state)
        check_same(second, expected[delivered:])
    first.set_state(state)  # back, in the same iterator
    check_same(first, expected[7:])
    with pytest.raises(StopIteration):
        next(first)


def test_a_state_of_another_run_is_refused(data):
    state = train_batches(data, CONFIG, batch_size=4, steps=5).get_state()
    for changes, message in (
        ({"seed": 1}, "seed=0, this one has seed=1"),
        ({"batch_size": 2}, "batch_size=4, this one"),
    ):
        with pytest.raises(ValueError, match=message):
            train_batches(data, CONFIG, **{"batch_size": 4, "steps": 5} | changes).set_state(state)
    with pytest.raises(ValueError, match="images=None"):
        train_batches(data, CONFIG, batch_size=4, steps=5).set_state({"seed": 0, "batch_size": 4})
    longer = train_batches(data, CONFIG, batch_size=4, steps=9)  # a run may be made longer
    longer.set_state({**state, "batches": 5})
    assert len(list(longer)) == 4


# Workers


class Watched:
    """A data set that refuses to be read where a device has been started, or in the process of the test."""

    def __init__(self, dataset, process):
        self.dataset, self.process = dataset, process

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        return self.dataset[i]

    def read_image(self, i):
        from jax._src import xla_bridge

        assert os.getpid() != self.process
        assert not xla_bridge.backends_are_initialized()
        return self.dataset.read_image(i)


@needs_grain
def test_workers_give_the_same_batches_and_resume(data):
    arguments = {"batch_size": 4, "steps": 11, "min_size": (48, 64)}
    expected = list(train_batches(data, CONFIG, **arguments))
    with train_batches(Watched(data, os.getpid()), CONFIG, **arguments, workers=2) as loader:
        found = [next(loader) for _ in range(5)]
        assert all(type(value) is np.ndarray for value in found[0].values())
        check_same(found, expected[:5])
        state = loader.get_state()
    check_same(found, expected[:5])  # still there after the workers have gone
    with train_batches(data, CONFIG, **arguments, workers=1) as loader:  # another number, from the middle of an epoch
        loader.set_state(state)
        check_same(loader, expected[5:])
