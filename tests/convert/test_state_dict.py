"""State_dicts into variables and back: the real models, and every form in which users have them."""

from __future__ import annotations

import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from flaxdet.convert import (
    StateDictError,
    backbone_from_torchvision,
    from_torchvision,
    identify,
    read,
    to_torchvision,
    write_pth,
    write_safetensors,
)
from flaxdet.convert.reference import torchvision
from flaxdet.convert.state_dict import abstract_variables, tensors_of
from flaxdet.models import FCOS, FasterRCNN, FastRCNNConvFCHead, RPNHead
from flaxdet.nn import BackboneWithFPN, FeaturePyramidNetwork, FrozenBatchNorm, LastLevelMaxPool, LastLevelP6P7, ResNet
from flaxdet.registry import describe, make_model
from tests.convert.states import Tiny, renamed, tiny_state
from tests.drawn import drawn
from tests.tolerances import OP_F32


def same(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# --- the real models


def fcos(**body) -> FCOS:
    fpn = FeaturePyramidNetwork(256, LastLevelP6P7())
    return FCOS(BackboneWithFPN(ResNet(50, **body), fpn, ("c3", "c4", "c5")), 5)


def faster_rcnn_v2() -> FasterRCNN:
    fpn = FeaturePyramidNetwork(256, LastLevelMaxPool(), use_norm=True)
    return FasterRCNN(
        BackboneWithFPN(ResNet(50), fpn),
        5,
        rpn_head=RPNHead(256, 3, conv_depth=2),
        box_head=FastRCNNConvFCHead((256, 7, 7), (256,) * 4, (1024,), use_norm=True),
    )


def reference(name: str, **options):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = getattr(torchvision().models.detection, name)(weights=None, weights_backbone=None, **options)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.rand_like(tensor))  # no two alike, zeros and ones included
    return model


# whole ResNet-50s; parity/test_round_trip.py has small forms
@pytest.mark.parametrize(
    ("ours", "name", "count"),
    [
        pytest.param(fcos, "fcos_resnet50_fpn", 372, marks=pytest.mark.ci),
        pytest.param(faster_rcnn_v2, "fasterrcnn_resnet50_fpn_v2", 404, marks=pytest.mark.ci),
    ],
)
def test_round_trip_of_every_tensor(tmp_path, ours, name, count):
    torch = pytest.importorskip("torch")
    theirs, model = reference(name, num_classes=5), ours()
    expected = theirs.state_dict()
    found = to_torchvision(model, from_torchvision(model, expected))
    assert list(found) == list(expected)
    assert len(found) == count
    for key, tensor in expected.items():
        array = found[key]
        assert array.flags.c_contiguous
        assert array.shape == tuple(tensor.shape), key
        if key.endswith("num_batches_tracked"):
            assert array == 0
            assert array.dtype == np.int64
        else:
            assert array.tobytes() == tensor.numpy().tobytes(), key
    assert identify(expected) == (name, {"num_classes": 5, "frozen_bn": False})

    write_pth(tmp_path / "a.pth", found)
    twin = getattr(torchvision().models.detection, name)(weights=None, weights_backbone=None, num_classes=5)
    twin.load_state_dict(torch.load(tmp_path / "a.pth", weights_only=True), strict=True)
    write_safetensors(tmp_path / "a.safetensors", found)
    again = from_torchvision(model, tmp_path / "a.safetensors")
    assert same(again, from_torchvision(model, twin.state_dict()))


def test_live_and_frozen_take_each_others_files():
    torch = pytest.importorskip("torch")
    live = reference("fcos_resnet50_fpn", num_classes=5).state_dict()
    variables = from_torchvision(fcos(frozen_bn=True), live)
    frozen = to_torchvision(fcos(frozen_bn=True), variables)
    assert len(frozen) == 319
    assert identify(frozen) == ("fcos_resnet50_fpn", {"num_classes": 5, "frozen_bn": True})
    assert same(from_torchvision(fcos(), frozen), from_torchvision(fcos(), live))
    body = torchvision().ops.misc.FrozenBatchNorm2d
    with torch.device("meta"):
        backbone = torchvision().models.resnet50(norm_layer=body)
    keys = [f"backbone.body.{key}" for key in backbone.state_dict() if not key.startswith("fc.")]
    assert keys == [key for key in frozen if key.startswith("backbone.body.")]


def test_imagenet_weights_go_into_the_backbone():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    classifier = torchvision().models.resnet50(weights=None).state_dict()
    for model in (fcos(), fcos(frozen_bn=True)):
        before = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, leaf.dtype), abstract_variables(model))
        after = backbone_from_torchvision(model, before, classifier)
        found = to_torchvision(model, after)
        for key, array in found.items():
            if key.startswith("backbone.body.") and not key.endswith("tracked"):
                assert array.tobytes() == classifier[key.removeprefix("backbone.body.")].numpy().tobytes(), key
            elif not key.endswith("tracked"):
                assert (array == 0.5).all(), key
        assert jax.tree.leaves(before)[0].flat[0] == 0.5
    # trained by Lightning, beside the tensors of a metric; and as the body of a detector
    inside = {f"model.{key}": value for key, value in classifier.items()} | {"acc.total": torch.ones(1)}
    assert same(backbone_from_torchvision(model, before, inside), after)
    assert same(backbone_from_torchvision(model, before, found), after)
    del classifier["layer1.0.conv1.weight"]
    classifier["layer9.0.conv1.weight"] = torch.zeros(1)
    with pytest.raises(StateDictError, match="does not fit the backbone of FCOS") as info:
        backbone_from_torchvision(model, before, classifier)
    assert info.value.faults == {
        "missing": ["layer1.0.conv1.weight"],
        "unexpected": ["layer9.0.conv1.weight"],
    }


@pytest.mark.ci  # whole ResNet-50s
def test_shared_checkpoints(shared):
    for name, model in (("fcos_resnet50_fpn", fcos()), ("fasterrcnn_resnet50_fpn_v2", faster_rcnn_v2())):
        path = shared / "checkpoints" / f"{name}_bccd.pth"
        assert identify(read(path)) == (name, {"num_classes": 4, "frozen_bn": False})
        with pytest.raises(StateDictError, match=f"holds {name} with 4 classes") as info:
            from_torchvision(model, path)  # which has 5
        assert info.value.faults.keys() == {"wrong shape"}
        variables = from_torchvision(
            model.clone(num_classes=4, box_predictor=None)
            if "faster" in name
            else model.clone(num_classes=4, head=None),
            path,
        )
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


# --- what is accepted


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", ["numpy", "jax", "torch", "pth", "safetensors"])
def test_sources(tmp_path, kind, frozen):
    state = tiny_state()
    model = Tiny(frozen=frozen)
    expected = from_torchvision(model, state)
    assert expected.keys() == {"params", "batch_stats"}
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(expected))
    source = state
    if kind == "jax":
        source = {key: jnp.asarray(array, jnp.int32 if array.ndim == 0 else None) for key, array in state.items()}
    elif kind == "torch":
        torch = pytest.importorskip("torch")
        source = {key: torch.nn.Parameter(torch.from_numpy(a), a.ndim > 0) for key, a in state.items()}
    elif kind in ("pth", "safetensors"):
        source = str(tmp_path / "a")
        (write_pth if kind == "pth" else write_safetensors)(source, state)
    assert same(from_torchvision(model, source), expected)
    found = to_torchvision(model, expected)
    kept = [key for key in state if not (frozen and key.endswith("tracked"))]
    assert list(found) == kept
    assert all(found[key].tobytes() == state[key].tobytes() for key in kept if state[key].ndim)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_dtypes_are_cast(dtype):
    state = tiny_state(dtype=dtype)
    variables = from_torchvision(Tiny(), state)
    for key, array in to_torchvision(Tiny(), variables).items():
        if array.ndim:
            assert array.dtype == np.float32
            np.testing.assert_array_equal(array, state[key].astype(np.float32))
    if dtype != np.float64:
        torch = pytest.importorskip("torch")
        name = {np.float16: torch.float16, ml_dtypes.bfloat16: torch.bfloat16}[dtype]
        tensors = {k: torch.from_numpy(a.astype(np.float32)).to(name) if a.ndim else a for k, a in state.items()}
        assert same(from_torchvision(Tiny(), tensors), variables)


def test_the_model_decides_the_dtype(x64):
    state = tiny_state(dtype=np.float64)
    variables = from_torchvision(Tiny(dtype=jnp.float64), state)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float64)}
    found = to_torchvision(Tiny(dtype=jnp.float64), variables)
    assert all(found[key].tobytes() == state[key].tobytes() for key in state if state[key].ndim)
    half = from_torchvision(Tiny(dtype=jnp.bfloat16), state)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    "change",
    [
        lambda state: renamed(state, "inner_blocks.0.0.", "inner_blocks.0."),
        lambda state: renamed(state, "rpn.head.conv.0.0.", "rpn.head.conv."),
        lambda state: {f"module.{key}": array for key, array in state.items()},
        lambda state: {key: array for key, array in state.items() if not key.endswith("num_batches_tracked")},
        lambda state: {"model": state, "optimizer": {}, "epoch": 3},
        lambda state: {key: array[..., ::-1][..., ::-1] if array.ndim else array for key, array in state.items()},
    ],
    ids=["old FPN", "old RPN", "DataParallel", "no counters", "training reference", "views"],
)
def test_what_users_really_have(change):
    state = tiny_state()
    assert same(from_torchvision(Tiny(), change(state)), from_torchvision(Tiny(), state))


# --- what comes out


def test_the_result_is_a_copy():
    state = tiny_state()
    variables = from_torchvision(Tiny(), state)
    for array in state.values():
        array[...] = 9
    assert same(variables, from_torchvision(Tiny(), tiny_state()))
    to_torchvision(Tiny(), variables)["rpn.head.conv.0.0.bias"][:] = 9
    assert not (variables["params"]["rpn_head"]["conv_0"]["bias"] == 9).any()


def test_nothing_is_compiled(compiled):
    from_torchvision(Tiny(), tiny_state())
    assert compiled == []
    jax.jit(lambda: 0)()
    assert len(compiled) == 1


def test_abstract_variables_hold_no_values():
    abstract = abstract_variables(Tiny())
    assert abstract.keys() == {"params", "batch_stats"}
    assert all(type(leaf) is jax.ShapeDtypeStruct for leaf in jax.tree.leaves(abstract))


def test_the_converter_imports_no_torch():
    script = "import sys, flaxdet.convert; print(sorted({'torch', 'torchvision'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_another_eps_is_said_when_tensors_cannot_say_it():
    """torchvision's overwrite_eps: an option at loading, in our own metadata, and a warning on the way back."""
    model = make_model("fcos_resnet50_fpn", num_classes=2, frozen_bn=True, small=True, norm_eps=0.0)
    assert model.backbone.body.norm_eps == 0
    variables = drawn(abstract_variables(model))
    with pytest.warns(UserWarning, match=r"BatchNorm adds 0\.0 .*overwrite_eps\(model, 0\.0\) after load_state_dict"):
        to_torchvision(model, variables)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        usual = make_model("fcos_resnet50_fpn", num_classes=2, frozen_bn=True, small=True)
        to_torchvision(usual, variables)
        tensors_of(model, variables)  # for our own files, whose metadata has the option
    whole = make_model("fcos_resnet50_fpn", num_classes=2, frozen_bn=True, norm_eps=0.0)
    assert describe(whole)[1]["norm_eps"] == 0


def test_eps_decides_what_frozen_batch_norm_computes():
    """y = (x - mean) * scale / sqrt(var + eps) + bias, by hand."""
    vectors = {"scale": 2.0, "bias": 1.0, "mean": 3.0, "var": 4.0}
    variables = {"batch_stats": {name: jnp.full((1,), value) for name, value in vectors.items()}}
    for eps, expected in ((0.0, 1 + 2 * 2 / 2), (5.0, 1 + 2 * 2 / 3)):
        found = FrozenBatchNorm(eps=eps).apply(variables, jnp.full((1, 1, 1, 1), 5.0))
        np.testing.assert_allclose(found, expected, rtol=OP_F32)
