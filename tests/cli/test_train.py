"""``flaxdet train`` from beginning to end on a few small images, and everything that can be wrong with its input."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import flaxdet
from flaxdet import registry
from flaxdet.cli.main import main
from flaxdet.cli.train import Train
from tests.tiny import NAMES, build_small_models, write_coco
from tests.tolerances import HAND_F32

for package in ("pycocotools", "orbax", "matplotlib", "tensorboardX"):
    pytest.importorskip(package, reason="an extra: flaxdet[train]")

pytestmark = [pytest.mark.xdist_group("train"), pytest.mark.usefixtures("small_builders")]
SIZE = ("--min-size", "64", "--max-size", "96", "--no-progress")
STEPS = 3  # of 5 images in batches of 2


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[Path, Path]:
    """Five images of 64x80 pixels, and their annotations."""
    return write_coco(tmp_path_factory.mktemp("coco"), count=5)


class Run:
    def __init__(self, out: Path, options: list[str]):
        self.out, self.options = out, options

    def __call__(self, *more: str) -> int:
        with jax.numpy_dtype_promotion("standard"):
            return main(["train", *self.options, *more])


@pytest.fixture(scope="module")
def trained(data, weights, tmp_path_factory) -> Run:
    """A finished run of two epochs."""
    out = tmp_path_factory.mktemp("train") / "run"
    pair = [str(path) for path in data]
    options = ["--train", *pair, "--val", *pair, "--out", str(out), "--weights", str(weights), *SIZE]
    run = Run(out, [*options, "--batch-size", "2", "--epochs", "2", "--eval-every", "1", "--log-every", "1"])
    with pytest.MonkeyPatch.context() as monkeypatch:
        build_small_models(monkeypatch)
        assert run() == 0
    return run


def test_a_run_leaves_everything(trained):
    out = trained.out
    model, variables = flaxdet.load(out / "model.safetensors")
    assert model.num_classes == 4
    assert model.transform.min_size == (64,)
    assert flaxdet.load_categories(out / "model.safetensors") == NAMES  # so that detect shows them
    _, again = flaxdet.load(out / "model.pth")
    for a, b in zip(jax.tree.leaves(variables), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    for name in ("curves.png", "predictions.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 300
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["step"] == 2 * STEPS
    assert 0 <= metrics["ap50"] <= 1
    assert [row["name"] for row in metrics["per_class"]] == NAMES[1:]
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log if "loss" in row] == list(range(1, 2 * STEPS + 1))
    assert [row["step"] for row in log if "AP" in row] == [STEPS, 2 * STEPS]
    assert list((out / "tensorboard").iterdir())
    config = json.loads((out / "checkpoints" / "config.json").read_text())
    assert (config["epochs"], config["batch_size"]) == (2, 2)


def test_the_body_comes_from_the_weights_and_trains_from_layer_2_on(trained, weights):
    _, before = flaxdet.load(weights)
    _, after = flaxdet.load(trained.out / "model.safetensors")
    body, other = (v["params"]["backbone"]["body"] for v in (before, after))
    blocks = [name for name in body if name.startswith("layer")]
    same = {name: np.array_equal(*(b[name]["conv1"]["kernel"] for b in (body, other))) for name in blocks}
    assert {name for name, equal in same.items() if equal} == {"layer1_0"}
    statistics, others = (v["batch_stats"]["backbone"]["body"]["bn1"] for v in (before, after))
    np.testing.assert_array_equal(statistics["mean"], others["mean"])  # freeze_bn, by default


def test_the_trained_model_detects_with_its_names(trained, data, run, tmp_path):
    model = trained.out / "model.safetensors"
    result = run(
        "detect", data[0] / "000.png", "--weights", model, "--out", tmp_path, "--threshold", 0, "--no-progress"
    )
    assert result.status == 0
    assert "red" in (tmp_path / "detections.json").read_text()


def test_resume(trained, run, capfd):
    result = run("train", *trained.options)
    assert (result.status, "holds a run already; expected --resume" in result.error) == (2, True)
    result = run("train", *trained.options, "--resume", "--epochs", "5", "--seed", "1")
    assert result.status == 2
    for part in ("other options", "epochs", "2", "5", "seed"):
        assert part in result.err.splitlines()[-1]
    before = (trained.out / "log.jsonl").read_bytes()
    capfd.readouterr()
    assert trained("--resume") == 0  # is at its end: nothing changes
    assert f"continuing after step {2 * STEPS}" in capfd.readouterr().err
    assert (trained.out / "log.jsonl").read_bytes() == before


def with_annotations(data: tuple[Path, Path], folder: Path, change: Any) -> tuple[Path, Path]:
    content = json.loads(data[1].read_text())
    content = change(content) or content
    path = folder / "changed.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return data[0], path


def broken(content: dict[str, Any], **annotation: Any) -> None:
    content["annotations"][0] |= annotation


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda _: "{]", ("changed.json", "JSON")),
        (lambda _: "[1, 2]", ("changed.json", "COCO")),
        (lambda content: broken(content, category_id=77), ("changed.json", "77")),
        (lambda content: broken(content, bbox=[1, 2, 3]), ("changed.json", "bbox")),
        (lambda content: broken(content, image_id=4711), ("changed.json", "4711")),
        (lambda content: content["annotations"].append(content["annotations"][0]), ("changed.json", "annotation", "1")),
        (lambda content: content["images"][0].update(file_name="gone.png"), ("gone.png",)),
        (lambda content: content.update(annotations=[]), ("changed.json", "nothing to train on")),
    ],
)
def test_bad_annotations(run, data, weights, tmp_path, change, parts):
    pair = with_annotations(data, tmp_path, change)
    result = run("train", "--train", *pair, "--out", tmp_path / "run", "--weights", weights, *SIZE)
    assert result.status == 2
    for part in parts:
        assert part in result.error
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--epochs", "0"), ("--epochs", "at least 1", "0")),
        (("--learning-rate", "-1"), ("--learning-rate", "above 0")),
        (("--flip", "1.5"), ("--flip", "from 0 to 1")),
        (("--trainable-layers", "6"), ("--trainable-layers", "0 to 5")),
        (("--crop", "64", "--multi-scale", "32", "64"), ("--crop", "--multi-scale")),
        (("--keep-classes", "--copy-classes", "red"), ("--keep-classes", "--copy-classes")),
        (("--weights", "none", "--keep-classes"), ("--keep-classes", "trained")),
        (("--copy-classes", "rde"), ("rde",)),
        (("--keep-classes",), ("red",)),  # the weights know cells
        (("--model", "fasterrcnn_resnet50_fpn_v2"), ("fasterrcnn_resnet50_fpn_v2", "fcos_resnet50_fpn")),
        (("--resume",), ("expected checkpoints to resume from",)),
        (("--max-boxes", "1"), ("max_boxes",)),
        (("--coordinator", "localhost:1"), ("--process-count",)),
    ],
)
def test_bad_options(run, data, weights, tmp_path, options, parts):
    weights = [] if "--weights" in options else ["--weights", weights]
    result = run("train", "--train", *data, "--out", tmp_path / "run", *weights, *SIZE, *options)
    assert result.status == 2
    for part in parts:
        assert part in result.err.splitlines()[-1]


def test_a_broken_image_is_named(run, data, weights, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for path in data[0].iterdir():
        (images / path.name).write_bytes(path.read_bytes()[: 200 if path.name == "002.png" else None])
    result = run(
        "train", "--train", images, data[1], "--out", tmp_path / "run", "--weights", weights, *SIZE, "--batch-size", 5
    )
    assert result.status == 2
    assert "002.png" in result.err.splitlines()[-1]


def test_a_loss_that_becomes_nan_stops(trained, run, tmp_path):
    options = [*trained.options, "--learning-rate", "1e30", "--warmup-steps", "0"]
    options[options.index("--out") + 1] = str(tmp_path / "run")
    with jax.numpy_dtype_promotion("standard"):
        result = run("train", *options)
    assert result.status == 2
    message = result.err.splitlines()[-1]
    for part in ("step ", "loss", "in the batch of images ["):
        assert part in message
    assert not (tmp_path / "run" / "model.safetensors").exists()


def rates(schedule: str, accumulate: int, updates: int, steps_per_epoch: int = 7, epochs: int = 12) -> list[float]:
    """Of each update, by the optimiser that the command makes."""
    options = Train(
        train=(Path("images"), Path("train.json")),
        out=Path("run"),
        schedule=schedule,
        accumulate=accumulate,
        epochs=epochs,
    )
    _, of_updates = options.optimiser(registry.get("fcos_resnet50_fpn").training, steps_per_epoch)
    peak = 0.01 / 16 * options.batch_size * accumulate  # torchvision's references, by the linear rule
    return [float(of_updates(i)) / peak for i in range(updates)]


def test_accumulated_updates_follow_the_schedule_to_the_end():
    """12 epochs of 7 steps are 21 updates of 4 steps: 84 steps. An update may take steps of two epochs."""
    found = rates("step", 4, 21)
    # the warm-up takes the 6 steps of the first epoch: of update 0 it is the factor 1/1000, of update 1 (step 4) 4/6 on
    assert found[0] == pytest.approx(1 / 1000)
    assert found[1] == pytest.approx(0.001 + 0.999 * 4 / 6)
    # decays before epochs 8 (step 56, update 14) and 11 (step 77, first seen by update 20, of step 80)
    assert found[2:14] == pytest.approx([1.0] * 12)
    assert found[14:20] == pytest.approx([0.1] * 6)
    assert found[20] == pytest.approx(0.01)
    cosine = rates("cosine", 4, 21)
    expected = [(1 + math.cos(math.pi * 4 * i / 84)) / 2 for i in range(2, 21)]
    assert cosine[2:] == pytest.approx(expected, abs=HAND_F32)
    assert min(cosine) > 0  # each update moves something


def test_without_accumulation_an_update_is_a_step():
    found = rates("step", 1, 84)
    assert found[6:56] == pytest.approx([1.0] * 50)
    assert found[56:77] == pytest.approx([0.1] * 21)
