"""What is in a batch: what transform gives, flipped, scaled and cropped; and batches of an evaluation."""

from __future__ import annotations

import numpy as np
from PIL import Image

from flaxdet.data import eval_batches, read_coco, train_batches
from flaxdet.images.transform import transform, transform_targets
from flaxdet.structures import TransformConfig
from tests.data.loaders import CONFIG, check_same, same
from tests.tiny import write_coco
from tests.tolerances import BOXES_MIRRORED, PIXELS_MIRRORED, PIXELS_NUMPY


def index_of(dataset) -> dict[int, int]:
    return {dataset[i].image_id: i for i in range(len(dataset))}


def check_against_transform(dataset, config, batch) -> None:
    """The same images and boxes through ``transform`` and ``transform_targets``."""
    numbers = [index_of(dataset)[int(key)] for key in batch["image_id"]]
    bucket = batch["pixels"].shape[1:3]
    expected = transform([dataset.read_image(i) for i in numbers], config, bucket=bucket)
    truth = [{"boxes": dataset[i].boxes, "labels": dataset[i].labels} for i in numbers]
    slots = batch["boxes"].shape[1]
    targets = transform_targets(truth, expected, num_classes=len(dataset.categories), max_boxes=slots)
    np.testing.assert_allclose(batch["pixels"], expected.pixels, rtol=0, atol=PIXELS_NUMPY)
    for key in ("size", "original_size"):
        np.testing.assert_array_equal(batch[key], getattr(expected, key))
        assert batch[key].dtype == np.int32
    canvas = expected.canvas if expected.canvas is not None else np.full((len(numbers), 2), bucket)
    np.testing.assert_array_equal(batch.get("canvas", np.full((len(numbers), 2), bucket)), canvas)
    for key in ("boxes", "labels", "valid"):
        np.testing.assert_array_equal(batch[key], getattr(targets, key))
        assert batch[key].dtype == getattr(targets, key).dtype
    assert batch["image_id"].dtype == np.int64
    assert batch["pixels"].dtype == np.float32


# Training


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
    one = TransformConfig(min_size=32, max_size=96)
    by_config = train_batches(data, one, batch_size=4, steps=2)
    check_same(train_batches(data, CONFIG, batch_size=4, steps=2, min_size=32), by_config)


def test_large_scale_jitter(tmp_path):
    dataset = read_coco(*write_coco(tmp_path, 16))
    loader = train_batches(dataset, CONFIG, batch_size=4, steps=20, jitter=(0.1, 2.0), crop=64)
    assert loader.buckets == [(64, 64)]
    assert not loader.masked
    kept = checked = 0
    for batch in loader:
        assert (batch["size"] == 64).all()
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


def test_buckets_of_ones_own(data):
    loader = train_batches(data, CONFIG, batch_size=4, steps=8, buckets=[(128, 128)], max_boxes=5)
    assert loader.masked
    for batch in loader:
        assert batch["pixels"].shape == (4, 128, 128, 3)
        assert batch["boxes"].shape == (4, 5, 4)


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
