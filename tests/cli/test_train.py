"""``flaxdet train`` from beginning to end on a few small images, and everything that can be wrong with its input."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import flaxdet
from flaxdet import registry
from flaxdet.cli.data_options import DataOptions
from flaxdet.cli.main import main
from flaxdet.cli.train import Train
from flaxdet.cli.train_resume import check_options, say_more_epochs
from flaxdet.evaluation import evaluate as module
from flaxdet.train._lock import FolderLock
from flaxdet.train.logs import read_log
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


def test_a_run_leaves_everything(trained, weights):
    out = trained.out
    model, variables = flaxdet.load(out / "model.safetensors")
    bodies = [either["params"]["backbone"]["body"] for either in (flaxdet.load(weights)[1], variables)]
    blocks = ("layer1_0", "layer2_0", "layer3_0")
    moved = [not np.array_equal(*(body[block]["conv1"]["kernel"] for body in bodies)) for block in blocks]
    assert moved == [False, True, True]  # by default three of the ResNet's stages train
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
    assert metrics["losses"]["loss"] > 0
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log if "loss" in row] == list(range(1, 2 * STEPS + 1))
    evaluations = [row for row in log if "AP" in row]
    assert [row["step"] for row in evaluations] == [STEPS, 2 * STEPS]
    classes = {f"AP/{row['name']}": row["ap"] for row in metrics["per_class"]}
    losses = {f"val/{name}": value for name, value in metrics["losses"].items()}
    assert (classes | losses).items() <= evaluations[-1].items()
    assert {"val/loss", "val/classification", "val/bbox_regression"} <= set(losses)
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


def test_commands_take_the_folder(trained, data, run, tmp_path):
    result = run("convert", trained.out, tmp_path / "model.pth")
    assert result.status == 0
    assert (tmp_path / "model.pth").read_bytes() == (trained.out / "model.pth").read_bytes()


def test_resume(trained, run, capfd):
    result = run("train", *trained.options)
    assert (result.status, "holds a run already; expected --resume" in result.error) == (2, True)
    before = {path: path.read_bytes() for path in trained.out.rglob("*") if path.is_file() and path.suffix != ".png"}
    result = run("train", *trained.options, "--resume", "--epochs", "1", "--seed", "1", "--clip", "3")
    assert result.status == 2
    assert "other options: --clip was not given, is 3.0; --epochs was 2, is 1; --seed was 0, is 1. " in result.error
    assert f"For a new run that begins with its model: --weights {trained.out} --out ANOTHER" in result.error
    capfd.readouterr()
    assert trained("--resume") == 0  # is at its end: nothing changes
    assert f"continuing after step {2 * STEPS}" in capfd.readouterr().err
    for path, content in before.items():
        assert path.read_bytes() == content or "tfevents" in path.name, path


def test_a_run_of_an_older_flaxdet_goes_on(trained, tmp_path, capfd):
    """Without checksums of images, and without the options that are new since."""
    for name in ("config.json", "images.json"):
        shutil.copy(trained.out / "checkpoints" / name, tmp_path)
    config = trained.out / "checkpoints" / "config.json"
    try:
        config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "remat"}))
        (config.parent / "images.json").unlink()
        capfd.readouterr()
        assert trained("--resume") == 0
        assert "images.json: is missing (an older flaxdet wrote none), so changes" in capfd.readouterr().err
        assert json.loads(config.read_text())["remat"] is False
    finally:
        shutil.copytree(tmp_path, trained.out / "checkpoints", dirs_exist_ok=True)


def test_images_that_changed(trained, data, run, capfd):
    path = data[0] / "001.png"
    whole, status = path.read_bytes(), path.stat()
    try:
        path.write_bytes(whole[:-1] + b"x")
        result = run("train", *trained.options, "--resume")
        assert result.status == 2
        last = result.err.splitlines()[-1]
        changed = "the images have changed since the run began: the content of 001.png (train), 001.png (val) changed"
        assert changed in last
        path.write_bytes(whole)
        os.utime(path, ns=(1, 1))
        capfd.readouterr()
        assert trained("--resume") == 0
        assert (
            "warning: the date of 001.png (train), 001.png (val) changed, the content did not" in capfd.readouterr().err
        )
    finally:
        path.write_bytes(whole)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_second_run_in_the_folder_is_refused_at_once(trained, run):
    lock = FolderLock(trained.out / "checkpoints")
    result = run("train", *trained.options, "--resume")
    assert (result.status, "is writing to it; wait for its end" in result.error) == (2, True)
    lock.release()


def options_for(trained: Run, **changed: Path) -> list[str]:
    options = [*trained.options]
    for name, value in changed.items():
        options[options.index(f"--{name}") + 1] = str(value)
    return options


def assert_ended_alike(out: Path, other: Path) -> None:
    for name in ("model.safetensors", "model.pth", "last.safetensors", "metrics.json"):
        assert (out / name).read_bytes() == (other / name).read_bytes(), name
    logs = [
        [{k: v for k, v in row.items() if k != "images_per_second"} for row in read_log(folder / "log.jsonl")]
        for folder in (out, other)
    ]
    assert logs[0] == logs[1]


@pytest.mark.ci  # train/test_loop.py goes on after a failing evaluation in every run
def test_a_run_with_a_broken_photo_ends_like_another(trained, data, run, tmp_path):
    """The first evaluation fails; mended and resumed, the run ends in the same bits."""
    val, out = tmp_path / "val", tmp_path / "run"
    shutil.copytree(data[0], val)
    whole = (val / "002.png").read_bytes()
    middle = len(whole) // 2  # damage that neither the header nor the length tells
    (val / "002.png").write_bytes(whole[:middle] + bytes(40) + whole[middle + 40 :])
    options = options_for(trained, val=val, out=out)
    with jax.numpy_dtype_promotion("standard"):
        result = run("train", *options)
        assert result.status == 2
        *_, saved, error = result.err.splitlines()
        assert saved.startswith(f"step {STEPS} is saved. To continue: flaxdet train ")
        assert saved.endswith("--resume")
        assert f"{val / '002.png'}: is a broken image" in error
        assert json.loads((out / "metrics.json").read_text()) == {"step": STEPS}  # of the model beside it
        assert flaxdet.load(out / "model.safetensors")[0].num_classes == 4

        (val / "002.png").write_bytes(whole)
        assert run("train", *options, "--resume").status == 0
        assert_ended_alike(out, trained.out)


@pytest.mark.release  # tests/train/test_loop.py and the tests above hold each part of it
def test_ctrl_c_in_an_evaluation_and_more_epochs(trained, run, tmp_path, monkeypatch):
    out = tmp_path / "run"
    options = options_for(trained, out=out)
    evaluate = module.evaluate

    def interrupted(*arguments, **more):
        os.kill(os.getpid(), signal.SIGINT)
        return evaluate(*arguments, **more)

    with jax.numpy_dtype_promotion("standard"):
        with monkeypatch.context() as patch:
            patch.setattr(module, "evaluate", interrupted)
            result = run("train", *options)
        assert result.status == 130
        assert f"Ctrl-C: waiting for the evaluation of step {STEPS}, which is saved; another" in result.err
        assert f"interrupted after step {STEPS}, which was saved. To continue: " in result.err.splitlines()[-1]
        assert (out / "last.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
        assert run("train", *options, "--resume").status == 0
        assert_ended_alike(out, trained.out)

        result = run("train", *options, "--resume", "--epochs", "3")
        assert result.status == 0
        assert "2 epochs become 3: the schedule 'step' is stretched over all of them" in result.err
        assert read_log(out / "log.jsonl")[-1]["step"] == 3 * STEPS
        assert json.loads((out / "checkpoints" / "config.json").read_text())["epochs"] == 3
        result = run("train", *options, "--resume")
        assert (result.status, "--epochs was 3, is 2" in result.error) == (2, True)


def test_more_epochs_may_follow(tmp_path, capfd):
    (tmp_path / "train.json").write_text("{}")
    options = Train(train=(tmp_path, tmp_path / "train.json"), out=tmp_path, epochs=6)
    for stored, allowed in ((4, 4), (6, None), (8, ValueError)):
        checkpoints: Any = SimpleNamespace(
            folder=tmp_path, config=options.config(), stored_config=options.config() | {"epochs": stored}
        )
        if allowed is ValueError:
            with pytest.raises(ValueError, match=r"--epochs was 8, is 6\. To continue"):
                check_options(options, checkpoints)
        else:
            assert check_options(options, checkpoints) == allowed
    say_more_epochs(options, 4, 28, (0.00025, 0.0025))
    assert capfd.readouterr().err == (
        "4 epochs become 6: the schedule 'step' is stretched over all of them, and the learning rate after step 28 is "
        "0.0025, with 4 epochs it was 0.00025\n"
    )
    say_more_epochs(dataclasses.replace(options, schedule="constant"), 4, 28, (0.0025, 0.0025))
    assert capfd.readouterr().err == "4 epochs become 6\n"


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
        (lambda content: content["images"].append(content["images"][0]), ("changed.json", "image id 10", "twice")),
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
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != ".lock"]


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
        (("--as-stored", "--upright"), ("--as-stored", "--upright", "both")),
        (("--keep-classes", "--drop-unused"), ("--keep-classes", "--drop-unused")),
        (("--max-pixels", "9"), ("5120 pixels", "at most 9", "--max-pixels")),
        (("--font", "none.ttf"), ("none.ttf", "font file")),
    ],
)
def test_bad_options(run, data, weights, tmp_path, options, parts):
    weights = [] if "--weights" in options else ["--weights", weights]
    result = run("train", "--train", *data, "--out", tmp_path / "run", *weights, *SIZE, *options)
    assert result.status == 2
    for part in parts:
        assert part in result.err.splitlines()[-1]


@pytest.mark.parametrize("package", ["pycocotools.cocoeval", "matplotlib"])
def test_what_an_evaluation_needs_is_looked_for_before_the_first_step(
    run, data, weights, tmp_path, monkeypatch, package
):
    if package == "matplotlib":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    else:
        monkeypatch.setitem(sys.modules, package, None)
    result = run("train", "--train", *data, "--val", *data, "--out", tmp_path / "run", "--weights", weights, *SIZE)
    assert result.status == 2
    last = result.err.splitlines()[-1]
    assert f"need{'s' if 'coco' in package else ''} {package.partition('.')[0]}" in last
    assert "pip install 'flaxdet[train]'" in last
    assert "steps of" not in result.err


def test_a_broken_image_is_named(run, data, weights, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for path in data[0].iterdir():
        (images / path.name).write_bytes(path.read_bytes()[: 200 if path.name == "002.png" else None])
    options = ["--out", tmp_path / "run", "--weights", weights, *SIZE, "--batch-size", 5]
    for pairs in (["--train", images, data[1]], ["--train", *data, "--val", images, data[1]]):
        result = run("train", *pairs, *options)
        assert result.status == 2
        assert "1 of its 5 images can't be used" in result.err.splitlines()[-1]
        assert "002.png" in result.err.splitlines()[-1]
        assert "--skip-broken" in result.err.splitlines()[-1]
        assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} <= {".lock"}  # before the run
    known = DataOptions(skip_broken=True).read("train", images, data[1])
    assert len(known) == 4


def test_how_data_is_read_is_part_of_the_run(data):
    """Resuming with other data is refused; a limit on pixels and a font change nothing."""
    pair = {"train": data, "out": Path("run")}
    config = Train(**pair).config()
    assert config == Train(**pair, data=DataOptions(max_pixels=10**9), font=Path("a.ttf")).config()
    for change in ({"as_stored": True}, {"upright": True}, {"skip_broken": True}, {"pixel_range": (0.0, 9.0)}):
        assert config != Train(**pair, data=DataOptions(**change)).config()
    assert config != Train(**pair, drop_unused=True).config()


@pytest.mark.ci  # train/test_loop.py stops at a NaN in every run
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
