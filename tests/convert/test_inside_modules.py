"""Detectors that are parts of other modules: found by their names under any prefix, and what is beside them is told."""

from __future__ import annotations

import numpy as np
import pytest

from flaxdet import registry
from flaxdet.cli.options import load_model
from flaxdet.convert import CheckpointError, StateDictError, from_torchvision, identify, write_pth
from flaxdet.files.models import read_model
from tests.convert.states import Tiny, renamed, tiny_state
from tests.convert.test_state_dict import same

PREFIXES = ["model.", "teacher.detector.", "faster_rcnn.", "model._orig_mod.net.module.", "a.b.c."]
BESIDE = {
    "val_map.total": np.ones(3, np.float32),
    "criterion.weight": np.ones((2, 2), np.float32),
    "n_averaged": np.array(1),
}


def under(state, prefix):
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("beside", [{}, BESIDE])
def test_conversion(prefix, beside):
    state = tiny_state()
    expected = from_torchvision(Tiny(), state)
    assert same(from_torchvision(Tiny(), beside | under(state, prefix)), expected)
    old = renamed(renamed(state, "inner_blocks.0.0.", "inner_blocks.0."), "rpn.head.conv.0.0.", "rpn.head.conv.")
    assert same(from_torchvision(Tiny(), {"state_dict": under(old, prefix) | beside}), expected)


def test_faults_are_those_of_the_detector():
    state = tiny_state()
    del state["backbone.body.bn1.weight"]
    with pytest.raises(StateDictError) as info:
        from_torchvision(Tiny(), BESIDE | under(state, "model.") | {"model.extra": np.ones(1)})
    assert info.value.faults == {"missing": ["backbone.body.bn1.weight"], "unexpected": ["model.extra"]}
    with pytest.raises(StateDictError) as info:  # too little in common for a prefix
        from_torchvision(Tiny(), {"a.backbone.body.bn1.weight": np.ones(4), "b": np.ones(1)})
    assert "a.backbone.body.bn1.weight" in info.value.faults["unexpected"]


def test_two_models_in_one():
    state = tiny_state()
    with pytest.raises(CheckpointError, match='the model several times, under "student", "teacher"'):
        from_torchvision(Tiny(), under(state, "student.") | under(state, "teacher."))


def of_keys(name: str) -> dict[str, np.ndarray]:
    """Tensors of one element a class, by the names that tell the architecture."""
    keys = registry.get(name).keys
    assert keys is not None
    return {key: np.zeros(4, np.float32) for key in keys.present}


@pytest.mark.parametrize("name", registry.names())
@pytest.mark.parametrize("prefix", ["", *PREFIXES])
def test_recognised(name, prefix):
    state = under(of_keys(name), prefix) | BESIDE
    assert identify(state)[0] == name
    assert identify(state)[1]["num_classes"] == 4


def test_files(tmp_path):
    path = tmp_path / "last.ckpt"
    state = of_keys("fcos_resnet50_fpn")
    write_pth(path, BESIDE | under(state, "model."))
    file = read_model(path)
    assert file.state_dict.keys() == state.keys()
    assert (file.prefix, file.left_out) == ("model.", tuple(BESIDE))
    write_pth(path, under(state, "model."))
    assert read_model(path).left_out == ()

    write_pth(path, under(state, "student.") | under(of_keys("fasterrcnn_resnet50_fpn"), "teacher."))
    with pytest.raises(CheckpointError, match=rf"{path}: holds 2 detectors, student and teacher: choose one by key="):
        read_model(path)
    assert read_model(path, key="teacher").builder == "fasterrcnn_resnet50_fpn"
    assert read_model(path, key="student").builder == "fcos_resnet50_fpn"


def test_the_command_line_tells_what_is_left_out(tmp_path, capsys):
    path = tmp_path / "last.ckpt"
    more = {f"metric.{i}": np.ones(1, np.float32) for i in range(9)}
    write_pth(path, more | under(of_keys("fcos_resnet50_fpn"), "model."))
    with pytest.raises(StateDictError, match="does not fit FCOS"):
        load_model(None, str(path))
    beside = ", ".join(list(more)[:5])
    told = f"{path}: reads the tensors under model., leaves out {beside} and 4 more\n"
    assert capsys.readouterr().err == told
    with pytest.raises(
        ValueError, match="--key x: chooses a state_dict of a file, and COCO_V1 names published weights"
    ):
        load_model(None, "COCO_V1", key="x")


def test_the_shared_case(shared):
    path = shared / "cases" / "lightning-prefix" / "small.ckpt"
    if not path.exists():
        pytest.skip("needs cases/lightning-prefix")
    assert read_model(path).builder == "fcos_resnet50_fpn"
