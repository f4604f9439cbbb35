"""A model on a data set: every image as it is alone, in few programs, read ahead but not far."""

from __future__ import annotations

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import flaxdet
from flaxdet.data import ImageError
from flaxdet.data.coco import read_coco
from flaxdet.evaluation import evaluate as module
from flaxdet.evaluation.evaluate import detect_dataset, evaluate, evaluate_results
from flaxdet.inference.detect import detect_program
from tests.tiny import CATEGORIES, FCOS_NAME, tiny_model, tiny_variables
from tests.tolerances import INVARIANCE_F64

pytest.importorskip("pycocotools")

pytestmark = pytest.mark.xdist_group("evaluate")

# (rows, columns): canvases of 64x96, 96x64 and 64x64 in a model of 64 to 96 pixels
SIZES = [(64, 80), (80, 64), (64, 80), (70, 70), (60, 80)]


def write_set(folder, sizes=SIZES, categories=CATEGORIES):
    """Noise of several sizes with a box each, and ids with gaps."""
    rng = np.random.default_rng(0)
    images = folder / "images"
    images.mkdir()
    content = {"images": [], "annotations": [], "categories": [{"id": k, "name": v} for k, v in categories.items()]}
    for i, (rows, columns) in enumerate(sizes):
        Image.fromarray(rng.integers(0, 256, (rows, columns, 3), np.uint8)).save(images / f"{i}.png")
        content["images"].append({"id": 5 * i + 3, "file_name": f"{i}.png", "height": rows, "width": columns})
        annotation = {"id": i, "image_id": 5 * i + 3, "category_id": list(categories)[i % len(categories)]}
        content["annotations"].append({**annotation, "bbox": [5, 3, 10 + i, 12]})
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    return images, path


@pytest.fixture
def dataset(tmp_path):
    return read_coco(*write_set(tmp_path))


@pytest.fixture
def uniform(tmp_path):
    """One canvas: one program to compile."""
    return read_coco(*write_set(tmp_path, SIZES[:1] * 5))


@pytest.fixture(scope="module")
def fcos():
    """Untrained, and with a threshold that lets some of what it says pass."""
    model = tiny_model(FCOS_NAME, score_thresh=0.05, detections_per_img=20)
    return model, tiny_variables(model)


def assert_same(found, expected):
    for own, other in zip(found, expected, strict=True):
        assert own["boxes"].dtype == np.float64
        np.testing.assert_array_equal(own["labels"], other["labels"])
        np.testing.assert_allclose(own["boxes"], other["boxes"], rtol=0, atol=INVARIANCE_F64)
        np.testing.assert_allclose(own["scores"], other["scores"], rtol=0, atol=INVARIANCE_F64)


@pytest.mark.ci  # inference/test_predict has the same of a list of images
def test_every_image_as_it_is_alone(dataset, x64, monkeypatch):
    monkeypatch.setattr(module, "_BUCKETS", 2)
    model = tiny_model(FCOS_NAME, dtype=np.float64, score_thresh=0.05, detections_per_img=20)
    variables = tiny_variables(model)
    expected = flaxdet.predict(model, variables, [dataset.read_image(i) for i in range(len(dataset))])
    assert sum(len(own["scores"]) for own in expected) > 3 * len(dataset)
    for batch_size in (1, 3):
        before = detect_program(model.box_dtype)._cache_size()
        found = detect_dataset(model, variables, dataset, batch_size=batch_size)
        # a program a bucket, with and without images that fill it; predict has compiled the one that they all fill
        assert detect_program(model.box_dtype)._cache_size() - before == (1 if batch_size == 1 else 2)
        assert_same(found, expected)


def test_evaluate(uniform, fcos, capfd):
    found = detect_dataset(*fcos, uniform)
    rows = flaxdet.coco_results(found, [3, 8, 13, 18, 23], {1: 2, 2: 5, 3: 9})
    expected = evaluate_results(rows, uniform.annotations)
    assert expected.detections > len(uniform)
    capfd.readouterr()
    result = evaluate(*fcos, uniform)
    assert capfd.readouterr() == ("", "")
    assert (result.images, result.boxes, result.detections) == (5, 5, len(rows))
    assert result == expected
    assert [row.name for row in result.per_class] == list(CATEGORIES.values())


def test_perfect_detections(dataset, fcos, monkeypatch):
    """From the reader's boxes and labels back to the file's own."""

    def known(model, variables, dataset, **_):
        records = (dataset[i] for i in range(len(dataset)))
        return [{"boxes": r.boxes, "labels": r.labels, "scores": np.ones(len(r.boxes))} for r in records]

    monkeypatch.setattr(module, "detect_dataset", known)
    result = evaluate(*fcos, dataset)
    assert result.ap == result.ap50 == result.ar1 == pytest.approx(1)
    assert [row.ap for row in result.per_class] == [pytest.approx(1)] * 3


def test_variables_on_the_host(uniform, fcos):
    model, variables = fcos
    expected = detect_dataset(model, variables, uniform)
    found = detect_dataset(model, jax.device_get(variables), uniform)
    for own, other in zip(found, expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, own, other)


@pytest.mark.ci  # a process that compiles its own
def test_variables_on_several_devices(tmp_path):
    """As after data-parallel training: computed once, on one of them."""
    images, annotations = write_set(tmp_path, SIZES[:1])
    code = f"""
import jax, numpy as np
from flaxdet.data.coco import read_coco
from flaxdet.evaluation import evaluate as module
from flaxdet.evaluation.evaluate import detect_dataset
from flaxdet.train import make_mesh, replicate
from tests.tiny import tiny_model, tiny_variables
model = tiny_model("{FCOS_NAME}", score_thresh=0.05)
variables, dataset = tiny_variables(model), read_coco({str(images)!r}, {str(annotations)!r})
(expected,) = detect_dataset(model, variables, dataset)
(found,) = detect_dataset(model, replicate(variables, make_mesh()), dataset)
assert len(jax.devices()) == 2 and len(found["scores"]) > 3
jax.tree.map(np.testing.assert_array_equal, found, expected)
"""
    flags = "--xla_force_host_platform_device_count=2"
    environment = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": "."}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_progress(uniform, fcos, capfd):
    capfd.readouterr()
    detect_dataset(*fcos, uniform, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "5/5" in err
    assert "image/s" in err


# Rows


def test_coco_results():
    found = [
        {
            "boxes": np.array([[1, 2, 4, 8.5]], np.float32),
            "scores": np.array([0.5], np.float32),
            "labels": np.array([3]),
        },
        {"boxes": np.zeros((0, 4)), "scores": np.zeros(0), "labels": np.zeros(0, np.int32)},
        {"boxes": np.array([[0, 0, 1, 1], [0, 0, 2, 2]]), "scores": np.array([0.75, 0.25]), "labels": np.array([1, 2])},
    ]
    rows = flaxdet.coco_results(found, [7, 8, 9])
    assert rows == [
        {"image_id": 7, "category_id": 3, "bbox": [1, 2, 3, 6.5], "score": 0.5},
        {"image_id": 9, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.75},
        {"image_id": 9, "category_id": 2, "bbox": [0, 0, 2, 2], "score": 0.25},
    ]
    assert json.loads(json.dumps(rows)) == rows
    # labels that are no category of the data set are left out
    assert [row["category_id"] for row in flaxdet.coco_results(found, [7, 8, 9], {0: 1, 2: 90, 3: 0})] == [0, 90]
    assert flaxdet.coco_results([], []) == []
    with pytest.raises(ValueError, match="an id for each image, got 2 ids for 3 images"):
        flaxdet.coco_results(found, [7, 8])


# Bad input


def test_a_broken_image(uniform, fcos):
    path = uniform[2].path
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ImageError, match=rf"{path}: is a broken image"):
        evaluate(*fcos, uniform)


def test_an_elongated_image(tmp_path, fcos):
    dataset = read_coco(*write_set(tmp_path, [(64, 80), (1, 300)]))
    with pytest.raises(ValueError, match=rf"{dataset[1].path} of 1x300 .* would be resized to 0x96"):
        evaluate(*fcos, dataset)


@pytest.mark.parametrize("option", ["batch_size", "workers"])
def test_bad_options(dataset, fcos, option):
    with pytest.raises(ValueError, match=f"{option} should be at least 1, got 0"):
        evaluate(*fcos, dataset, **{option: 0})


def test_an_empty_data_set(fcos):
    with pytest.raises(ValueError, match="at least one image, got an empty one"):
        detect_dataset(*fcos, [])


def test_without_pycocotools(dataset, fcos, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.cocoeval", None)
    monkeypatch.setattr(module, "detect_dataset", None)  # nothing is computed before it shows
    with pytest.raises(ImportError, match="needs pycocotools"):
        evaluate(*fcos, dataset)
