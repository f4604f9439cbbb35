"""Buckets, and the plan of an epoch: what every image can count on, for random data sets and batch sizes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from flaxdet.data import choose_buckets
from flaxdet.data.batches import EvalPlan, TrainPlan
from flaxdet.images.buckets import assign, canvases, sort_buckets
from flaxdet.images.transform import canvas_size, resized_size
from flaxdet.structures import TransformConfig

CONFIG = TransformConfig(min_size=64, max_size=128)
WASTE = {
    1: 2.3,
    2: 1.4,
    3: 1.3,
    5: 1.2,
}  # pixels computed for each one needed, random shapes: seen 2.24, 1.33, 1.28, 1.19


def photos(count: int, seed: int = 0) -> list[tuple[int, int]]:
    """Mostly landscape, some portrait, some square, a few panoramas."""
    rng = np.random.default_rng(seed)
    shapes = [(48, 64), (64, 48), (60, 60), (40, 64), (30, 90), (90, 31)]
    return [shapes[i] for i in rng.choice(len(shapes), count, p=[0.5, 0.2, 0.1, 0.1, 0.05, 0.05])]


def waste(own: np.ndarray, buckets) -> float:
    """Pixels computed for each one needed."""
    return float(np.prod(np.asarray(buckets)[assign(own, buckets)], axis=-1).sum() / own.prod(-1).sum())


def test_canvases_are_transforms():
    sizes = photos(20)
    for min_size in (None, 48):
        expected = [canvas_size(resized_size(size, CONFIG, min_size=min_size), CONFIG) for size in sizes]
        np.testing.assert_array_equal(canvases(sizes, CONFIG, min_size=min_size), expected)
    with pytest.raises(ValueError, match=r"b\.png of 1x500 .* too elongated"):
        canvases([(5, 5), (1, 500)], CONFIG, names=["a.png", "b.png"])


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_buckets_hold_every_image_and_waste_little(count):
    rng = np.random.default_rng(count)
    config = TransformConfig()
    sizes = rng.integers(200, 1000, (300, 2)).tolist()
    buckets = choose_buckets(sizes, config, count)
    own = canvases(sizes, config)
    assert len(buckets) <= count
    assert all(side % 32 == 0 for bucket in buckets for side in bucket)
    assert [rows * columns for rows, columns in buckets] == sorted(rows * columns for rows, columns in buckets)
    assert len(np.unique(assign(own, buckets))) == len(buckets)  # none is idle
    assert waste(own, buckets) < WASTE[count]


@pytest.mark.parametrize("seed", range(3))
def test_buckets_are_nearly_the_best(seed):
    """Against every choice of two shapes, for few enough canvases."""
    sizes = photos(60, seed)
    own = canvases(sizes, CONFIG)
    sides = [np.unique(own[:, axis]).tolist() for axis in (0, 1)]
    best = np.inf
    for pair in itertools.combinations(itertools.product(*sides), 2):
        if (own[:, None] <= np.array(pair)[None]).all(-1).any(-1).all():
            best = min(best, waste(own, sort_buckets(pair)))
    assert waste(own, choose_buckets(sizes, CONFIG, 2)) <= 1.1 * best


def test_one_size_is_one_bucket():
    assert choose_buckets([(48, 64)] * 5, CONFIG) == [(64, 96)]
    assert choose_buckets([(48, 64)] * 5, CONFIG, min_size=96) == [(96, 128)]
    assert choose_buckets([(48, 64), (90, 90)], TransformConfig(fixed_size=(100, 50))) == [(64, 128)]
    with pytest.raises(ValueError, match="at least one image and one bucket"):
        choose_buckets([], CONFIG)


def test_many_shapes_take_no_time():
    """Without size_divisible every size is a canvas of its own."""
    config = TransformConfig(size_divisible=1)
    sizes = np.random.default_rng(0).integers(200, 1000, (3000, 2)).tolist()
    assert waste(canvases(sizes, config), choose_buckets(sizes, config)) < 1.4


def test_the_smallest_bucket_is_taken():
    own = np.array([[32, 32], [64, 32], [32, 64], [64, 64]])
    buckets = [(32, 64), (64, 64)]
    assert assign(own, buckets).tolist() == [0, 1, 0, 1]
    with pytest.raises(
        ValueError, match=r"c\.png: its canvas of 96x32 .* fits none of the buckets 32x64, 64x64 \(1 of 2"
    ):
        assign(np.array([[32, 32], [96, 32]]), buckets, names=["a.png", "c.png"])


@pytest.mark.parametrize("bad", [[(1, 2, 3)], [(32, 0)], [(32.0, 32)], []])
def test_bad_buckets(bad):
    with pytest.raises(ValueError, match="bucket"):
        sort_buckets(bad)


# The plan


def plan_of(sizes, batch_size, seed=0, count=3) -> TrainPlan:
    return TrainPlan(canvases(sizes, CONFIG), choose_buckets(sizes, CONFIG, count), batch_size, seed)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("images", [1, 7, 50, 101])
def test_an_epoch(images, batch_size, count):
    sizes = photos(images, images)
    own = canvases(sizes, CONFIG)
    plan = plan_of(sizes, batch_size, count=count)
    assert plan.steps_per_epoch == -(-images // batch_size)
    for epoch in range(4):
        batches = plan.epoch(epoch)
        assert len(batches) == plan.steps_per_epoch
        for batch in batches:
            assert batch.indices.shape == (batch_size,)
            assert batch.real.all()
            assert (own[batch.indices] <= batch.bucket).all()
        seen = np.bincount(np.concatenate([batch.indices for batch in batches]), minlength=images)
        # incomparable rests may sit out, each less than a batch; all others occur
        assert (seen == 0).sum() < max(batch_size * (len(plan.buckets) - 1), 1)
        if images % batch_size == 0 and len(plan.buckets) == 1:
            assert (seen == 1).all()


def test_nothing_is_dropped_where_buckets_contain_each_other():
    sizes = photos(101)
    plan = TrainPlan(canvases(sizes, CONFIG), [(64, 128), (128, 128)], 8, 0)
    for epoch in range(20):
        seen = np.bincount(np.concatenate([batch.indices for batch in plan.epoch(epoch)]), minlength=101)
        assert (seen > 0).all()
        assert seen.sum() == 104
        assert (seen == 2).sum() == 3  # the last batch, filled up


def test_those_who_sit_out_are_others_each_time():
    sizes = [(48, 64)] * 10 + [(64, 48)] * 9  # landscape and portrait: neither bucket holds the other
    plan = plan_of(sizes, 8, count=2)
    assert plan.steps_per_epoch == 3
    out = np.zeros(19, int)
    for epoch in range(60):
        seen = np.bincount(np.concatenate([batch.indices for batch in plan.epoch(epoch)]), minlength=19)
        assert (seen == 0).sum() == 1  # of 2 and 1 left over, the 2 are filled up
        out += seen == 0
    assert not out[:10].any()
    assert (out[10:] > 0).all()


def test_a_plan_depends_on_seed_and_epoch_alone():
    sizes = photos(40)
    plan, again = plan_of(sizes, 4, seed=3), plan_of(sizes, 4, seed=3)
    backwards = [again[i] for i in reversed(range(50))][::-1]
    for i in range(50):
        np.testing.assert_array_equal(plan[i].indices, backwards[i].indices)
        assert plan[i].bucket == backwards[i].bucket
        assert plan[i].epoch == i // 10
    orders = [np.concatenate([batch.indices for batch in plan.epoch(epoch)]).tolist() for epoch in range(3)]
    orders.append(np.concatenate([batch.indices for batch in plan_of(sizes, 4, seed=4).epoch(0)]).tolist())
    assert len({tuple(order) for order in orders}) == 4


def test_buckets_come_in_no_fixed_order():
    """A run of large batches, then a run of small ones, would be a schedule of its own."""
    sizes = [(48, 64)] * 40 + [(64, 48)] * 40
    plan = plan_of(sizes, 4)
    first = [plan.epoch(epoch)[0].bucket for epoch in range(20)]
    assert 3 < first.count(first[0]) < 17


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_evaluation_sees_every_image_once_in_order(batch_size):
    sizes = photos(50)
    own = canvases(sizes, CONFIG)
    buckets = choose_buckets(sizes, CONFIG)
    plan = EvalPlan(own, buckets, batch_size)
    seen = {bucket: [] for bucket in buckets}
    for i in range(plan.steps_per_epoch):
        batch = plan[i]
        assert batch.indices.shape == batch.real.shape == (batch_size,)
        assert (own[batch.indices] <= batch.bucket).all()
        assert batch.real[0]
        seen[batch.bucket] += batch.indices[batch.real].tolist()
    assert sorted(itertools.chain(*seen.values())) == list(range(50))
    for number, bucket in enumerate(buckets):
        assert seen[bucket] == np.flatnonzero(assign(own, buckets) == number).tolist()
