"""``flaxdet verify``: it reports, draws, and its exit status is a verdict that can be "different"."""

from __future__ import annotations

import importlib.util
import sys
from functools import partial

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

import flaxdet

if importlib.util.find_spec("torch") is None or importlib.util.find_spec("torchvision") is None:
    pytest.skip("verify needs torchvision", allow_module_level=True)

import torch

from flaxdet.convert import reference, verify
from flaxdet.convert.verify import Comparison, Match, Stage, match_detections
from tests.tolerances import BOXES_F32, BOXES_F64, CANVAS_STAGE_F64, SCORES_F32, STAGE_F32

torch.set_num_threads(1)  # as XLA in conftest.py: one thread a worker

FCOS, V2 = "fcos_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2"
SMALL = ("--min-size", "96", "--max-size", "160", "--no-progress")
MAPS = ["pixels", "c2", "c3", "c4", "c5"]
OF_ROIS = ["roi_features", "class_logits", "box_regression", "class_scores"]
STAGES = {
    FCOS: [*MAPS, *(f"p{i}" for i in range(3, 8)), "cls_logits", "bbox_regression", "bbox_ctrness"],
    V2: [*MAPS, "p2", "p3", "p4", "p5", "pool", "objectness", "pred_bbox_deltas", "proposals", *OF_ROIS],
}


@pytest.fixture(scope="session")
def weights(real_weights):
    return real_weights


@pytest.fixture
def photo(tmp_path):
    """A real photo, 150x128."""
    from matplotlib import cbook

    path = tmp_path / "hopper.png"
    with Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as image:
        image.resize((128, 150)).save(path)
    return path


def section(out: str, title: str) -> list[str]:
    """The lines of a report that begins with a title."""
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(title))
    rest = lines[start + 1 :]
    end = next((i for i, line in enumerate(rest) if line and not line.startswith(" ")), len(rest))
    return rest[:end]


# Whole ResNet-50s. In CI, the notebook on conversion compares FCOS by stages in float32 and float64, a test below a
# file of weights in float64. parity/test_models.py has v2's stages, test_evaluate_checkpoints.py its detections.
@pytest.mark.release
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(FCOS, marks=pytest.mark.xdist_group("verify_fcos")),
        pytest.param(V2, marks=pytest.mark.xdist_group("verify_v2")),
    ],
)
def test_random_weights(run, photo, tmp_path, name):
    out = tmp_path / "pictures"
    found = run("verify", name, "--image", photo, "--out", out, *SMALL)
    assert (found.status, found.err) == (0, "")
    assert "torchvision 0.28.0; torchvision runs with " + reference.ops_kind() in found.out.splitlines()[0].replace(
        "+cpu", ""
    )
    assert f"{name} on hopper.png (150x128)" in found.out
    report = section(found.out, f"{name} on hopper.png")
    rows = [line.split() for line in report[1 : 1 + len(STAGES[name])]]
    assert [row[0] for row in rows] == STAGES[name]
    assert rows[0][1] == "1x128x96x3"
    for row in rows[: rows.index(next((r for r in rows if r[0] == "proposals"), rows[-1]))]:
        assert 0 < float(row[3]) < STAGE_F32, row  # relative error: float32, and no comparison with itself
    count = int(report[1 + len(rows)].split()[1])
    assert count > 5
    assert f"  detections: {count} of torchvision, {count} of flaxdet, {count} matched (100%)" in report
    assert any(line.startswith("  largest difference: boxes ") for line in report)
    assert any(line.startswith("  time: torchvision ") for line in report)
    assert "  verdict: the same" in report
    assert not any("first stage that differs" in line for line in report)
    picture = out / f"verify_{name}.png"
    assert f"  picture: {picture}" in report
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert image.width > 2 * 128
        assert 150 < image.height < 200
    assert [path.name for path in out.iterdir()] == [picture.name]


def swapped(variables):
    """Two tensors of one shape exchanged, as a converter's mistake would."""
    norm = variables["params"]["head"]["regression_head"]["norm_0"]
    norm["scale"], norm["bias"] = norm["bias"], norm["scale"]


def moved(variables):
    """One mean of one BatchNorm is off."""
    statistics = variables["batch_stats"]["backbone"]["body"]["layer3_0"]["bn2"]
    statistics["mean"] = statistics["mean"].at[7].add(0.5)


@pytest.mark.parametrize(("fault", "stage"), [(swapped, "bbox_regression"), (moved, "c4")])
def test_a_wrong_weight_gives_another_verdict(run, photo, tmp_path, monkeypatch, fault, stage):
    """In the small form of the detector, whose random scores are low: without a threshold."""
    real, both_sides = verify.from_torchvision, verify.both_sides

    def faulty(*arguments, **options):
        variables = real(*arguments, **options)
        fault(variables)
        return variables

    monkeypatch.setattr(verify, "both_sides", partial(both_sides, small=True, score_thresh=0.0))
    monkeypatch.setattr(verify, "from_torchvision", faulty)
    found = run("verify", FCOS, "--image", photo, "--out", tmp_path / "out", *SMALL)
    assert (found.status, found.err) == (1, "")
    assert "  verdict: DIFFERENT" in found.out
    assert f"  first stage that differs: {stage}" in found.out
    if fault is swapped:  # one mean moves random boxes by hundredths of a pixel: there the stages alone tell
        assert "(100%)" not in found.out
    assert (tmp_path / "out" / f"verify_{FCOS}.png").exists()  # to see what is wrong


@pytest.mark.ci  # whole ResNet-50s
@pytest.mark.xdist_group("verify_file")
def test_a_file_of_weights_in_float64(run, shared, reads, tmp_path):
    """A trained checkpoint on photos of its own kind; with both models asked for, the file says which it is."""
    import jax

    photos = sorted((shared / "data" / "bccd" / "images").glob("*"))[:2]
    weights = shared / "checkpoints" / f"{FCOS}_bccd.pth"
    found = run("verify", "--weights", weights, "--float64", "--image", *photos, "--out", tmp_path, *SMALL)
    assert (found.status, found.err) == (0, "")
    assert reads == [str(weights)]
    reports = [line for line in found.out.splitlines() if " on " in line and not line.startswith(" ")]
    assert reports == [f"{FCOS} on {path.name} (480x640)" for path in photos]
    for path in photos:
        report = section(found.out, f"{FCOS} on {path.name}")
        for row in (line.split() for line in report[1 : 1 + len(STAGES[FCOS])]):
            assert float(row[3]) < CANVAS_STAGE_F64, row
        (line,) = (line for line in report if line.startswith("  largest difference: boxes "))
        assert float(line.split()[3]) < BOXES_F64
    assert found.out.count("matched (100%)") == found.out.count("verdict: the same") == 2
    assert " 0 of torchvision" not in found.out
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"verify_{FCOS}_{path.stem}.png" for path in photos]
    assert not jax.config.jax_enable_x64  # nothing stays switched


# What stops it, before anything is computed


def test_file_of_another_architecture(run, photo, tmp_path, weights):
    found = run("verify", V2, "--weights", weights, "--image", photo, "--out", tmp_path / "out", *SMALL)
    assert found.status == 2
    assert f"{weights}: expected weights of {V2}, found {FCOS}" in found.error
    retina = tmp_path / "retina.safetensors"
    safetensors.numpy.save_file({"head.regression_head.bbox_reg.weight": np.zeros(1, np.float32)}, retina)
    found = run("verify", "--weights", retina, "--image", photo, "--out", tmp_path / "out", *SMALL)
    assert found.status == 2
    assert f"{retina}: holds a RetinaNet; expected torchvision's {FCOS} or " in found.error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--weights", "none.pth"), "none.pth: cannot be read: No such file or directory"),
        (("--weights", "COCO_V7"), "'COCO_V7': neither a file nor published weights of fcos_resnet50_fpn"),
        ((V2, "--weights", "FCOS_ResNet50_FPN_Weights.COCO_V1"), f"expected weights of {V2}, found {FCOS}"),
        (("--min-size", "0"), "--min-size should be at least 1 pixel, got 0"),
        (("--image", "none.jpg"), "none.jpg: cannot be read (No such file or directory), expected an image file"),
        (("--image", __file__), "is no image in a format that Pillow can read"),
    ],
)
def test_bad_arguments(run, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    found = run("verify", *options, "--out", tmp_path / "out")
    assert (found.status, found.out) == (2, "")
    assert message in found.error
    assert not (tmp_path / "out").exists()


def test_unwritable_output(run, photo, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    found = run("verify", "--image", photo, "--out", file, *SMALL)
    assert (found.status, found.out) == (2, "")
    assert f"{file}: can't be written to (File exists)" in found.error
    assert file.read_text() == "mine"


@pytest.mark.parametrize("package", ["torch", "torchvision"])
def test_without_torch(run, photo, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)  # importing it now raises ImportError
    found = run("verify", "--image", photo, "--out", tmp_path / "out")
    assert found.status == 2
    assert found.error.startswith("flaxdet verify: error: comparing with torchvision needs ")
    assert "pip install 'flaxdet[torch]'" in found.error


def test_without_the_default_photo(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = run("verify", "--out", tmp_path / "out")
    assert found.status == 2
    assert "pip install matplotlib, or give one by --image" in found.error


# The comparison itself


def detection(boxes, scores, labels) -> dict[str, np.ndarray]:
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    return {"boxes": boxes, "scores": np.array(scores, np.float32), "labels": np.array(labels, np.int32)}


ONE = detection([[0, 0, 9, 9], [5, 5, 20, 30]], [0.9, 0.5], [1, 2])


@pytest.mark.parametrize(
    ("ours", "matched"),
    [
        (ONE, 2),
        (detection([[5, 5, 20, 30], [0, 0, 9, 9]], [0.5, 0.9], [2, 1]), 2),  # in any order
        (detection([[0, 0, 9, 9.04], [5, 5, 20, 30]], [0.9004, 0.5], [1, 2]), 2),
        (detection([[0, 0, 9, 9.06], [5, 5, 20, 30]], [0.9, 0.5], [1, 2]), 1),
        (detection([[0, 0, 9, 9], [5, 5, 20, 30]], [0.9006, 0.5], [1, 2]), 1),
        (detection([[0, 0, 9, 9], [5, 5, 20, 30]], [0.9, 0.5], [1, 1]), 1),
        (detection([[0, 0, 9, 9], [0, 0, 9, 9]], [0.9, 0.9], [1, 1]), 1),  # no detection serves twice
        (detection([[0, 0, 9, 9]], [0.9], [1]), 1),
        (detection([[0, 0, 9, 9], [5, 5, 20, 30], [7, 7, 8, 8]], [0.9, 0.5, 0.3], [1, 2, 2]), 2),
        (detection([[np.nan] * 4, [5, 5, 20, 30]], [0.9, 0.5], [1, 2]), 1),
        (detection([], [], []), 0),
    ],
)
def test_matching(ours, matched):
    match = match_detections(ours, ONE, *verify.TOLERANCES["float32"])
    assert (match.count, match.ours, match.matched) == (2, len(ours["scores"]), matched)
    assert match.same == (matched == 2 == len(ours["scores"]))
    assert match.box_error <= BOXES_F32
    assert match.score_error <= SCORES_F32


def test_matching_tells_equal_boxes_apart_by_their_scores():
    """Boxes without area don't suppress each other, so two may lie at one place."""
    theirs = detection([[3, 3, 3, 9]] * 2, [0.9, 0.4], [1, 1])
    ours = detection([[3, 3, 3, 9]] * 2, [0.4, 0.9], [1, 1])
    assert match_detections(ours, theirs, 0.05, 5e-4).same
    assert match_detections(detection([], [], []), detection([], [], []), 0.05, 5e-4).same


def test_the_verdict_needs_the_stages_too():
    """Where nothing is detected, equal detections prove nothing."""
    nothing = [Match(0, 0, 0, 0.0, 0.0)]

    def compared(*errors):
        stages = [
            Stage(name, (1,), error, 10.0)
            for name, error in zip(("c2", "proposals", "class_scores"), errors, strict=True)
        ]
        return Comparison(stages, nothing, [], [])

    assert compared(1e-5, 1e-5, 1e-5).same
    assert not compared(0.1, 0, 0).same
    assert compared(0.1, 0, 0).first_difference == "c2"
    assert not compared(float("nan"), 0, 0).same
    assert not compared(float("inf"), 0, 0).same
    # from the first selection on, near ties may come in another order: the detections decide
    assert compared(0, float("inf"), 1).same
    assert not Comparison([], [Match(1, 1, 0, 0.0, 0.0)], [], []).same


def test_shapes_are_compared():
    (stage,) = verify.compare_stages({"c2": np.zeros((1, 2, 2, 3))}, {"c2": np.zeros((1, 2, 3, 3)), "c3": np.zeros(1)})
    assert (stage.name, stage.shape, stage.error) == ("c2", (1, 2, 3, 3), float("inf"))


def test_names_are_known_to_both(weights):
    model, _ = flaxdet.load(weights)
    ours, variables, theirs, categories = verify.both_sides(FCOS, str(weights), min_size=96, max_size=160)
    assert ours.num_classes == model.num_classes == 4
    assert theirs.transform.min_size == (96,)
    assert categories == flaxdet.load_categories(weights)
    np.testing.assert_array_equal(
        variables["params"]["backbone"]["body"]["conv1"]["kernel"],
        theirs.backbone.body.conv1.weight.detach().numpy().transpose(2, 3, 1, 0),
    )
