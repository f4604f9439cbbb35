"""State_dicts and variables that do not fit: every fault is named, all in one report."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from flaxdet.convert import CheckpointError, StateDictError, from_torchvision, to_torchvision
from tests.convert.states import Tiny, tiny_state


def test_all_faults_in_one_report():
    state = tiny_state()
    del state["box_predictor.cls_score.bias".replace("box", "roi_heads.box")]
    state["extra.weight"] = np.zeros(1, np.float32)
    state["backbone.fpn.inner_blocks.0.weight"] = state["backbone.fpn.inner_blocks.0.0.weight"]
    state["backbone.body.conv1.weight"] = np.zeros((4, 3, 3, 3), np.float32)
    state["backbone.body.bn1.running_var"] = np.array([1, np.nan, np.inf, 2], np.float32)
    state["rpn.head.conv.0.0.bias"] = np.zeros(2, np.int64)
    with pytest.raises(StateDictError) as info:
        from_torchvision(Tiny(), state)
    assert info.value.faults == {
        "missing": ["roi_heads.box_predictor.cls_score.bias"],
        "unexpected": ["extra.weight"],
        "doubled": ["backbone.fpn.inner_blocks.0.0.weight and backbone.fpn.inner_blocks.0.weight"],
        "wrong shape": ["backbone.body.conv1.weight: expected [4, 3, 7, 7], found [4, 3, 3, 3]"],
        "not finite": ["backbone.body.bn1.running_var: 2 of 4 values, as float32"],
        "wrong type": ["rpn.head.conv.0.0.bias: expected a floating point tensor, found int64"],
    }
    lines = str(info.value).splitlines()
    assert lines[0].startswith(
        "state_dict does not fit Tiny: 1 missing, 1 unexpected, 1 doubled, 1 wrong shape, 1 not finite, 1 wrong type"
    )
    assert len(lines) == 7


def test_a_long_report_is_cut_and_complete_in_the_error():
    state = {"a": np.zeros(1)} | {f"x{i}": np.zeros(1) for i in range(100)}
    with pytest.raises(StateDictError, match="unexpected: and 93 more") as info:
        from_torchvision(Tiny(), state)
    assert len(info.value.faults["unexpected"]) == 101
    with pytest.raises(StateDictError, match=r"^my file does not fit Tiny: "):
        from_torchvision(Tiny(), state, source="my file")
    assert len(str(info.value).splitlines()) < 25


def test_doubled_by_a_prefix():
    state = tiny_state()
    state["module.rpn.head.conv.0.0.bias"] = state["rpn.head.conv.0.0.bias"]
    with pytest.raises(StateDictError) as info:
        from_torchvision(Tiny(), state)
    assert info.value.faults == {"doubled": ["rpn.head.conv.0.0.bias and module.rpn.head.conv.0.0.bias"]}


@pytest.mark.parametrize("value", [3.0, "text", None, [1.0], np.array(["a", "b"]), np.array([True, False])])
def test_wrong_types(value):
    with pytest.raises(StateDictError) as info:
        from_torchvision(Tiny(), tiny_state() | {"rpn.head.conv.0.0.bias": value})
    (line,) = info.value.faults["wrong type"]
    assert line.startswith("rpn.head.conv.0.0.bias: expected a floating point tensor, found ")
    assert info.value.faults.keys() == {"wrong type"}


def test_code_in_a_file_is_a_wrong_type(tmp_path):
    torch = pytest.importorskip("torch")

    class Evil:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'witness')!r}, 'w')",)

    state = {key: torch.from_numpy(array) for key, array in tiny_state().items()}
    for key in ("backbone.body.bn1.weight", "backbone.body.bn1.num_batches_tracked"):
        torch.save({"model": state | {key: Evil()}, "args": Evil()}, tmp_path / "a.pth")
        with pytest.raises(StateDictError, match=r"a\.pth does not fit Tiny: 1 wrong type") as info:
            from_torchvision(Tiny(), tmp_path / "a.pth")
        (line,) = info.value.faults["wrong type"]
        assert line.startswith(f"{key}: expected a ")
        assert line.endswith("builtin__.exec")  # protocol 2 uses Python 2's names
    assert not (tmp_path / "witness").exists()


def test_tensors_without_values():
    torch = pytest.importorskip("torch")
    for tensor in (torch.zeros(2, device="meta"), torch.zeros(2).to_sparse()):
        with pytest.raises(StateDictError, match="found Tensor"):
            from_torchvision(Tiny(), tiny_state() | {"rpn.head.conv.0.0.bias": tensor})


def test_nonfinite_values_can_be_allowed():
    state = tiny_state(dtype=np.float64)
    state["rpn.head.conv.0.0.bias"] = np.array([np.nan, 1e300])
    with pytest.raises(StateDictError, match="2 of 2 values, as float32"):  # one of them by the cast
        from_torchvision(Tiny(), state)
    variables = from_torchvision(Tiny(), state, allow_nonfinite=True)
    np.testing.assert_array_equal(variables["params"]["rpn_head"]["conv_0"]["bias"], [np.nan, np.inf])


def test_not_a_state_dict():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"pass model\.state_dict\(\)"):
        from_torchvision(Tiny(), torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="got int"):
        from_torchvision(Tiny(), 3)
    for state in ({}, {"a": 1}, {3: np.zeros(1)}):
        with pytest.raises(CheckpointError, match="not a state_dict"):
            from_torchvision(Tiny(), state)
    with pytest.raises(CheckpointError, match="cannot be read"):
        from_torchvision(Tiny(), "/nowhere/at/all.pth")


def test_variables_of_another_model():
    variables = from_torchvision(Tiny(), tiny_state())
    variables["params"]["rpn_head"]["conv_0"]["bias"] = jnp.zeros(3)
    variables["params"]["rpn_head"]["extra"] = jnp.zeros(3)
    del variables["batch_stats"]["backbone"]["body"]["bn1"]["mean"]
    with pytest.raises(StateDictError) as info:
        to_torchvision(Tiny(), variables)
    assert info.value.faults == {
        "missing": ["batch_stats/backbone/body/bn1/mean"],
        "unexpected": ["params/rpn_head/extra"],
        "wrong shape": ["params/rpn_head/conv_0/bias: expected [2], found [3]"],
    }
