from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from flaxdet.convert import (
    CheckpointError,
    StateDictError,
    backbone_from_torchvision,
    from_torchvision,
    identify,
    read,
    rules,
    to_torchvision,
    write_pth,
    write_safetensors,
)
from flaxdet.convert.reference import torchvision
from flaxdet.convert.state_dict import abstract_variables
from flaxdet.models import FCOS, FasterRCNN, FastRCNNConvFCHead, RPNHead
from flaxdet.nn import BackboneWithFPN, FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7, ResNet


class Tiny:
    """Stands for a detector: some of its modules, with small shapes."""

    def __init__(self, *, frozen: bool = False, dtype=jnp.float32):
        self.frozen, self.dtype = frozen, dtype

    def init(self, key, batch):
        assert batch.pixels.ndim == 4
        kernels = {
            "backbone/body/conv1": (7, 7, 3, 4),
            "backbone/fpn/inner_blocks_0/conv": (1, 1, 4, 2),
            "rpn_head/conv_0": (3, 3, 2, 2),
            "box_head/fc6": (7 * 7 * 2, 3),
            "box_predictor/cls_score": (3, 5),
        }
        params, stats, sown = {}, {}, {}

        def put(collection, path, shape):
            *modules, leaf = path.split("/")
            for module in modules:
                collection = collection.setdefault(module, {})
            collection[leaf] = jax.random.normal(key, shape, self.dtype)

        for module, shape in kernels.items():
            put(params, f"{module}/kernel", shape)
            put(params, f"{module}/bias", shape[-1:])
        for leaf in ("scale", "bias", "mean", "var"):
            in_params = leaf in ("scale", "bias") and not self.frozen
            put(params if in_params else stats, f"backbone/body/bn1/{leaf}", (4,))
        put(sown, "backbone/c2", (1, 16, 16, 4))
        return {"params": params, "batch_stats": stats, "intermediates": sown}


def tiny_state(seed: int = 0, dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {row.key: row.shape for row in rules.rules(abstract_variables(Tiny()))}
    return {
        key: np.array(7, np.int64) if key.endswith("tracked") else rng.normal(size=shape).astype(dtype)
        for key, shape in shapes.items()
    }


def same(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


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


# --- the real models


@pytest.mark.parametrize(
    ("ours", "name", "count"),
    [(fcos, "fcos_resnet50_fpn", 372), (faster_rcnn_v2, "fasterrcnn_resnet50_fpn_v2", 404)],
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
    del classifier["layer1.0.conv1.weight"]
    classifier["layer9.0.conv1.weight"] = torch.zeros(1)
    with pytest.raises(StateDictError, match="does not fit the backbone of FCOS") as info:
        backbone_from_torchvision(model, before, classifier)
    assert info.value.faults == {
        "missing": ["layer1.0.conv1.weight"],
        "unexpected": ["layer9.0.conv1.weight"],
    }


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


def renamed(state, old, new):
    return {key.replace(old, new): array for key, array in state.items()}


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


# --- what is not


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


def test_the_result_is_a_copy():
    variables = from_torchvision(Tiny(), tiny_state())
    to_torchvision(Tiny(), variables)["rpn.head.conv.0.0.bias"][:] = 9
    assert not (variables["params"]["rpn_head"]["conv_0"]["bias"] == 9).any()


def test_abstract_variables_hold_no_values():
    abstract = abstract_variables(Tiny())
    assert abstract.keys() == {"params", "batch_stats"}
    assert all(type(leaf) is jax.ShapeDtypeStruct for leaf in jax.tree.leaves(abstract))


# --- identify


def shapes_of(name: str, group: str = "detection", **options) -> dict[str, np.ndarray]:
    torch = pytest.importorskip("torch")
    models = torchvision().models
    with torch.device("meta"):
        model = getattr(getattr(models, group) if group else models, name)(**options)
    return {key: np.broadcast_to(np.float32(0), tensor.shape) for key, tensor in model.state_dict().items()}


NOTHING = {"weights": None, "weights_backbone": None}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("classes", [2, 91])
@pytest.mark.parametrize("name", ["fcos_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2"])
def test_identify(name, classes, prefix):
    state = {prefix + key: array for key, array in shapes_of(name, **NOTHING, num_classes=classes).items()}
    assert identify(state) == (name, {"num_classes": classes, "frozen_bn": False})
    frozen = {key: array for key, array in state.items() if not key.endswith("tracked")}
    assert identify(frozen)[1]["frozen_bn"] == (name == "fcos_resnet50_fpn")
    old = renamed(renamed(state, "inner_blocks.0.0.", "inner_blocks.0."), "layer_blocks.2.0.", "layer_blocks.2.")
    assert identify(old) == identify(state)


@pytest.mark.parametrize(
    ("name", "group", "options", "expected"),
    [
        (
            "fasterrcnn_resnet50_fpn",
            "detection",
            NOTHING,
            "fasterrcnn_resnet50_fpn, torchvision's first version",
        ),
        ("fasterrcnn_mobilenet_v3_large_fpn", "detection", NOTHING, "a Faster R-CNN with other parts"),
        ("maskrcnn_resnet50_fpn", "detection", NOTHING, "a Mask R-CNN"),
        ("maskrcnn_resnet50_fpn_v2", "detection", NOTHING, "a Mask R-CNN"),
        ("keypointrcnn_resnet50_fpn", "detection", NOTHING, "a Keypoint R-CNN"),
        ("retinanet_resnet50_fpn", "detection", NOTHING, "a RetinaNet"),
        ("retinanet_resnet50_fpn_v2", "detection", NOTHING, "a RetinaNet"),
        ("ssd300_vgg16", "detection", NOTHING, "an SSD"),
        ("ssdlite320_mobilenet_v3_large", "detection", NOTHING, "an SSDlite"),
        ("fcn_resnet50", "segmentation", NOTHING, "a segmentation model"),
        ("deeplabv3_resnet50", "segmentation", NOTHING, "a segmentation model"),
        ("resnet50", "", {"weights": None}, "a ResNet classifier"),
        ("vgg11", "", {"weights": None}, "none of torchvision's detectors"),
    ],
)
def test_identify_names_what_it_cannot_take(name, group, options, expected):
    with pytest.raises(CheckpointError, match=rf"my file: holds {expected}.* expected .*fcos_resnet50_fpn or") as info:
        identify(shapes_of(name, group, **options), source="my file")
    assert "\n" not in str(info.value)


def test_identify_other_backbones():
    state = shapes_of("fcos_resnet50_fpn", **NOTHING)
    deeper = state | {"backbone.body.layer3.6.conv3.weight": np.zeros(1)}
    with pytest.raises(CheckpointError, match="an FCOS with another backbone"):
        identify(deeper)
    state["head.classification_head.cls_logits.weight"] = "text"
    with pytest.raises(CheckpointError):
        identify(state)


def test_the_converter_imports_no_torch():
    script = "import sys, flaxdet.convert; print(sorted({'torch', 'torchvision'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
