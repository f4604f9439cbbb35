"""Batches: equal to transform's, reproducible, resumable at the exact sample, split among processes, by any workers."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flaxdet.data import ImageError, eval_batches, read_coco, train_batches
from flaxdet.data import streams as streams_module
from flaxdet.structures import TransformConfig
from flaxdet.transform import transform, transform_targets
from tests.tiny import write_coco
from tests.tolerances import BOXES_MIRRORED, PIXELS_MIRRORED, PIXELS_NUMPY

needs_grain = pytest.mark.skipif(importlib.util.find_spec("grain") is None, reason="workers are grain's")

CONFIG = TransformConfig(min_size=64, max_size=96)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """16 images of four shapes."""
    folder = tmp_path_factory.mktemp("data")
    images, path = write_coco(folder, 16)
    content = json.loads(path.read_text())
    for i, entry in enumerate(content["images"]):
        columns, rows = [(80, 64), (64, 80), (70, 64), (80, 64)][i % 4]
        file = images / entry["file_name"]
        Image.open(file).resize((columns, rows)).save(file)
        entry.update(width=columns, height=rows)
    path.write_text(json.dumps(content))
    return read_coco(images, path)


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and np.array_equal(a[key], b[key], equal_nan=False) for key in a
    )


def check_same(a, b) -> None:
    a, b = list(a), list(b)
    assert len(a) == len(b)
    for i, (one, other) in enumerate(zip(a, b, strict=True)):
        assert same(one, other), f"batch {i}"


def index_of(dataset) -> dict[int, int]:
    return {dataset[i].image_id: i for i in range(len(dataset))}


# What is in a batch


def check_against_transform(dataset, config, batch) -> None:
    """The same images and boxes through ``transform`` and ``transform_targets``."""
    numbers = [index_of(dataset)[int(key)] for key in batch["image_id"]]
    bucket = batch["pixels"].shape[1:3]
    expected = transform([dataset.read_image(i) for i in numbers], config, bucket=bucket)
    truth = [{"boxes": dataset[i].boxes, "labels": dataset[i].labels} for i in numbers]
    targets = transform_targets(truth, expected, max_boxes=batch["boxes"].shape[1])
    np.testing.assert_allclose(batch["pixels"], expected.pixels, rtol=0, atol=PIXELS_NUMPY)
    for key in ("size", "original_size", "roi_reference_height"):
        np.testing.assert_array_equal(batch[key], getattr(expected, key))
        assert batch[key].dtype == np.int32
    canvas = expected.canvas if expected.canvas is not None else np.full((len(numbers), 2), bucket)
    np.testing.assert_array_equal(batch.get("canvas", np.full((len(numbers), 2), bucket)), canvas)
    for key in ("boxes", "labels", "valid"):
        np.testing.assert_array_equal(batch[key], getattr(targets, key))
        assert batch[key].dtype == getattr(targets, key).dtype
    assert batch["image_id"].dtype == np.int64
    assert batch["pixels"].dtype == np.float32


def test_batches_hold_what_transform_gives(data):
    loader = train_batches(data, CONFIG, batch_size=4, steps=8, flip=0)
    assert loader.masked
    assert loader.steps_per_epoch == 4
    assert len(loader) == 8
    for batch in loader:
        assert batch["pixels"].shape[1:3] in loader.buckets
        check_against_transform(data, CONFIG, batch)


def test_real_photos(shared):
    folder = shared / "data" / "bccd"
    dataset = read_coco(folder / "images", folder / "val.json")
    config = TransformConfig(min_size=160, max_size=224)
    loader = train_batches(dataset, config, batch_size=4, steps=22, flip=0)
    assert not loader.masked  # all photos are of one size: a single bucket, no masks
    assert loader.buckets == [(160, 224)]
    assert loader.max_boxes == 32  # at most 29
    seen = set()
    for batch in loader:
        assert "canvas" not in batch
        check_against_transform(dataset, config, batch)
        seen |= set(batch["image_id"].tolist())
    assert len(seen) == 87


def test_a_large_photo_shrinks_as_transform_does(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (400, 500, 3), dtype=np.uint8)
    images, path = write_coco(tmp_path, 1)
    Image.fromarray(pixels).save(images / "000.png")
    path.write_text(path.read_text().replace('"width": 80, "height": 64', '"width": 500, "height": 400'))
    dataset = read_coco(images, path)
    check_against_transform(dataset, CONFIG, next(train_batches(dataset, CONFIG, batch_size=1, steps=1, flip=0)))


def test_flip(data):
    def by_image(flip):
        loader = train_batches(data, CONFIG, batch_size=1, steps=16, flip=flip)
        return {int(batch["image_id"][0]): batch for batch in loader}

    plain, flipped = by_image(0), by_image(1)
    for key, batch in plain.items():
        rows, columns = batch["size"][0]
        other = flipped[key]["pixels"][0, :rows, :columns]
        np.testing.assert_allclose(other[:, ::-1], batch["pixels"][0, :rows, :columns], rtol=0, atol=PIXELS_MIRRORED)
        own = batch["boxes"][0][batch["valid"][0]]
        np.testing.assert_allclose(
            flipped[key]["boxes"][0][batch["valid"][0]][:, [2, 1, 0, 3]] * [-1, 1, -1, 1] + [columns, 0, columns, 0],
            own,
            atol=BOXES_MIRRORED,
        )
    some = list(train_batches(data, CONFIG, batch_size=1, steps=64, flip=0.5))
    share = np.mean([same(batch, plain[int(batch["image_id"][0])]) for batch in some])
    assert 0.25 < share < 0.75


def test_multi_scale(data):
    sizes = (32, 48, 64)
    loader = train_batches(data, CONFIG, batch_size=4, steps=40, flip=0, min_size=sizes)
    assert loader.masked
    found = []
    for batch in loader:
        for i in range(4):
            record = data[index_of(data)[int(batch["image_id"][i])]]
            one = {key: value[i : i + 1] for key, value in batch.items()}
            short = int(batch["size"][i].min())
            found.append(short)
            config = TransformConfig(min_size=short, max_size=96)
            assert record.size == tuple(batch["original_size"][i])
            check_against_transform(data, config, one)
    counts = [found.count(size) for size in sizes]
    assert sum(counts) == 160
    assert min(counts) > 25
    by_config = train_batches(data, TransformConfig(min_size=sizes, max_size=96), batch_size=4, steps=40, flip=0)
    check_same(train_batches(data, CONFIG, batch_size=4, steps=40, flip=0, min_size=sizes), by_config)


def test_large_scale_jitter(tmp_path):
    dataset = read_coco(*write_coco(tmp_path, 16))
    loader = train_batches(dataset, CONFIG, batch_size=4, steps=20, jitter=(0.1, 2.0), crop=64)
    assert loader.buckets == [(64, 64)]
    assert not loader.masked
    kept = checked = 0
    for batch in loader:
        assert (batch["size"] == 64).all()
        assert (batch["roi_reference_height"] == 64).all()
        assert not batch["boxes"][~batch["valid"]].any()
        boxes = batch["boxes"][batch["valid"]]
        kept += len(boxes)
        assert ((boxes >= 0) & (boxes <= 64)).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        for row, column in np.argwhere(batch["valid"]):  # in the middle of a box is the colour of its label
            x1, y1, x2, y2 = batch["boxes"][row, column]
            if min(x2 - x1, y2 - y1) > 4:
                colour = batch["pixels"][row, int((y1 + y2) / 2), int((x1 + x2) / 2)]
                assert colour.argmax() == batch["labels"][row, column] - 1
                assert colour.max() - np.median(colour) > 2
                checked += 1
    assert kept > 80
    assert checked > 60


def test_crop_of_any_shape(data):
    arguments = {"batch_size": 2, "steps": 2, "jitter": (0.5, 1.0)}
    assert next(train_batches(data, CONFIG, **arguments, crop=(96, 64)))["pixels"].shape == (2, 96, 64, 3)
    batch = next(train_batches(data, CONFIG, **arguments, crop=40))  # the canvas is what 32 divides
    assert batch["pixels"].shape == (2, 64, 64, 3)
    assert "canvas" not in batch
    assert (batch["size"] == 40).all()
    assert not batch["pixels"][:, 40:].any()
    assert not batch["pixels"][:, :, 40:].any()


def test_canvas_bucket_computes_no_masks(data):
    own = train_batches(data, CONFIG, batch_size=4, steps=4)
    whole = train_batches(data, CONFIG, batch_size=4, steps=4, canvas="bucket")
    assert own.masked
    assert not whole.masked
    for a, b in zip(own, whole, strict=True):
        assert "canvas" not in b
        np.testing.assert_array_equal(a["pixels"], b["pixels"])
        assert (b["roi_reference_height"] == b["pixels"].shape[1]).all()


def test_buckets_of_ones_own(data):
    loader = train_batches(data, CONFIG, batch_size=4, steps=8, buckets=[(128, 128)], max_boxes=5)
    assert loader.masked
    for batch in loader:
        assert batch["pixels"].shape == (4, 128, 128, 3)
        assert batch["boxes"].shape == (4, 5, 4)


# Which batches


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


# Evaluation


def test_evaluation(data):
    loader = eval_batches(data, CONFIG, batch_size=3)
    seen = []
    for batch in loader:
        real = batch["image_id"] >= 0
        assert batch["pixels"].shape[0] == 3
        assert real[0]
        for row in np.flatnonzero(~real):
            np.testing.assert_array_equal(batch["pixels"][row], batch["pixels"][0])
        check_against_transform(data, CONFIG, {key: value[real] for key, value in batch.items()})
        seen += batch["image_id"][real].tolist()
    assert sorted(seen) == [data[i].image_id for i in range(16)]
    assert len(list(eval_batches(data, CONFIG, batch_size=3))) == len(loader)


def test_evaluation_takes_the_last_size_and_all_processes(data):
    several = TransformConfig(min_size=(32, 64), max_size=96)
    check_same(eval_batches(data, several, batch_size=4), eval_batches(data, CONFIG, batch_size=4))
    parts = [eval_batches(data, CONFIG, batch_size=4, process_index=i, process_count=2) for i in range(2)]
    for batch, *own in zip(eval_batches(data, CONFIG, batch_size=4), *parts, strict=True):
        assert same({key: np.concatenate([part[key] for part in own]) for key in batch}, batch)


# Bad arguments, bad files


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "positive batch_size"),
        ({"process_count": 3}, "batch_size=4 should be a multiple of the 3 processes"),
        ({"process_index": 1}, "process_index < process_count"),
        ({"flip": 1.5}, "flip should be a probability, got 1.5"),
        ({"seed": -1}, "should not be negative"),
        ({"workers": -1}, "workers should not be negative"),
        ({"min_size": ()}, "min_size should be one or more positive"),
        ({"crop": 64}, "crop belongs to jitter"),
        ({"jitter": (0.5, 1), "min_size": (48,)}, "got both"),
        ({"jitter": (0, 1)}, "jitter should be"),
        ({"jitter": (1, 2), "crop": (1, 2, 3)}, "crop should be"),
        ({"canvas": "batch"}, 'canvas should be "image" or "bucket"'),
        ({"max_boxes": 2}, r"\d\d\d\.png: has 3 boxes, more than max_boxes=2: raise it"),
        ({"buckets": [(64, 96)]}, r"001\.png: its canvas of 96x64 .* fits none of the buckets 64x96 \(4 of 16"),
        ({"buckets": [(64, 96), (96, 64)], "min_size": (32, 96)}, "canvas of 96x96|canvas of 96x128"),
        ({"buckets": [(100, 100)]}, r'multiples of 32, got size_divisible=32 .*canvas="bucket"'),
    ],
)
def test_bad_arguments(arguments, message, data):
    with pytest.raises(ValueError, match=message):
        train_batches(data, CONFIG, **{"batch_size": 4, "steps": 5} | arguments)


def test_an_image_that_is_too_elongated_is_named(tmp_path):
    images, path = write_coco(tmp_path, 2)
    Image.new("RGB", (900, 3)).save(images / "001.png")
    content = json.loads(path.read_text())
    content["images"][1].update(width=900, height=3)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"001\.png of 3x900 .* too elongated"):
        eval_batches(read_coco(images, path), CONFIG, batch_size=1)


def broken(tmp_path):
    images, path = write_coco(tmp_path, 8)
    dataset = read_coco(images, path)
    (images / "003.png").write_bytes(b"rubbish")
    return dataset


def check_error_names_the_file(dataset, workers) -> None:
    """Where the batch of the broken file is due, and not before; and again at the next attempt."""
    with train_batches(dataset, CONFIG, batch_size=1, steps=16, workers=workers) as loader:
        order = train_batches(dataset, CONFIG, batch_size=1, steps=16)
        due = [order._source.plan[i].indices[0] for i in range(8)].index(3)
        for _ in range(due):
            next(loader)
        for _ in range(2):
            with pytest.raises(ImageError, match=r"003\.png: is no image in a format") as caught:
                next(loader)
            assert "\n" not in str(caught.value)
        assert loader.get_state()["batches"] == due


def test_a_broken_file_is_named(tmp_path):
    check_error_names_the_file(broken(tmp_path), 0)


def test_workers_without_grain(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ImportError, match=r"pip install 'flaxdet\[train\]'"):
        train_batches(data, CONFIG, batch_size=4, steps=5, workers=1)
    assert len(list(train_batches(data, CONFIG, batch_size=4, steps=5))) == 5


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


@needs_grain
def test_an_error_in_a_worker_and_no_shared_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(streams_module, "_fits_shared_memory", lambda *_: False)
    check_error_names_the_file(broken(tmp_path), 1)


SCRIPT = """
import os
import signal
import sys
from flaxdet.data import eval_batches, read_coco, train_batches
from flaxdet.structures import TransformConfig

def main():
    dataset = read_coco(*sys.argv[1:3])
    config = TransformConfig(min_size=64, max_size=96)
    left_alone = train_batches(dataset, config, batch_size=2, steps=1000, workers=1)
    next(left_alone)
    if "kill" in sys.argv:
        os.kill(os.getpid(), signal.SIGKILL)
    print(sum(len(batch["size"]) for batch in eval_batches(dataset, config, batch_size=2, workers=1)))

if __name__ == "__main__":
    main()
"""


def run_script(tmp_path, *arguments: str):
    """Returns when nobody writes to its output any more, neither the script nor a worker."""
    images, path = write_coco(tmp_path, 6)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = str(Path(__file__).resolve().parents[2])
    return subprocess.run(
        [sys.executable, "-W", "error", str(script), str(images), str(path), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": root},
    )


@needs_grain
def test_workers_from_a_plain_script(tmp_path):
    """No absl, and a loader that nobody closes: it ends by itself, in silence."""
    done = run_script(tmp_path)
    assert (done.stdout, done.stderr, done.returncode) == ("6\n", "", 0)


@needs_grain
def test_workers_die_with_the_process_that_reads(tmp_path):
    assert run_script(tmp_path, "kill").returncode == -signal.SIGKILL
