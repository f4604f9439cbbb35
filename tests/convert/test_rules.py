from __future__ import annotations

import collections

import jax
import numpy as np
import pytest

from flaxdet.convert import layouts
from flaxdet.convert.reference import torchvision
from flaxdet.convert.rules import COUNTER, canonical_keys, rules
from flaxdet.convert.state_dict import abstract_variables
from flaxdet.models import FCOS, FasterRCNN, FastRCNNConvFCHead, MultiScaleRoIAlign, RPNHead
from flaxdet.nn import BackboneWithFPN, FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7, ResNet
from tests.tolerances import OP_F64


def fcos(depth: int = 50, num_classes: int = 91, **body) -> FCOS:
    fpn = FeaturePyramidNetwork(256, LastLevelP6P7())
    return FCOS(BackboneWithFPN(ResNet(depth, **body), fpn, ("c3", "c4", "c5")), num_classes)


def faster_rcnn(depth: int = 50, num_classes: int = 91) -> FasterRCNN:
    """Version 1: no norm in the FPN, one convolution in the RPN, TwoMLPHead."""
    fpn = FeaturePyramidNetwork(256, LastLevelMaxPool())
    return FasterRCNN(BackboneWithFPN(ResNet(depth, frozen_bn=True), fpn), num_classes)


def faster_rcnn_v2(num_classes: int = 91) -> FasterRCNN:
    fpn = FeaturePyramidNetwork(256, LastLevelMaxPool(), use_norm=True)
    return FasterRCNN(
        BackboneWithFPN(ResNet(50), fpn),
        num_classes,
        rpn_head=RPNHead(256, 3, conv_depth=2),
        box_head=FastRCNNConvFCHead((256, 7, 7), (256,) * 4, (1024,), use_norm=True),
    )


def reference(name: str, **options):
    """torchvision's model without memory for its weights."""
    torch = pytest.importorskip("torch")
    with torch.device("meta"):
        return getattr(torchvision().models.detection, name)(weights=None, weights_backbone=None, **options)


@pytest.mark.parametrize(
    ("model", "name", "count", "parameters"),
    [
        (fcos(), "fcos_resnet50_fpn", 372, 32_322_720),
        (faster_rcnn_v2(), "fasterrcnn_resnet50_fpn_v2", 404, 43_712_278),
        (faster_rcnn(), "fasterrcnn_resnet50_fpn", None, None),
    ],
    ids=["fcos", "v2", "v1"],
)
def test_every_tensor_of_torchvision_in_its_order(model, name, count, parameters):
    expected = reference(name).state_dict()
    if name == "fasterrcnn_resnet50_fpn":  # ours is frozen
        expected = {key: tensor for key, tensor in expected.items() if not key.endswith(COUNTER)}
    abstract = abstract_variables(model)
    rows = rules(model, abstract)
    assert [(row.key, row.shape) for row in rows] == [(k, tuple(t.shape)) for k, t in expected.items()]
    assert count is None or len(rows) == count
    sizes = sum(leaf.size for leaf in jax.tree.leaves(abstract["params"]))
    assert parameters is None or sizes == parameters
    # Invertible: every leaf has its own row.
    targets = [(row.collection, row.path) for row in rows if row.collection]
    assert len(set(targets)) == len(targets) == len(jax.tree.leaves(abstract))


def test_frozen_batch_norm_has_no_counters():
    live, frozen = (rules(model, abstract_variables(model)) for model in (fcos(), fcos(frozen_bn=True)))
    assert len(frozen) == 319
    assert [row.key for row in frozen] == [row.key for row in live if row.collection is not None]
    moved = [row for row in frozen if row.key.startswith("backbone.body.bn1")]
    assert {row.collection for row in moved} == {"batch_stats"}
    assert len(moved) == 4


@pytest.mark.parametrize("depth", [18, 34, 101])
def test_other_depths(depth):
    torch = pytest.importorskip("torch")
    with torch.device("meta"):
        expected = getattr(torchvision().models, f"resnet{depth}")(weights=None).state_dict()
    model = fcos(depth)
    rows = [row for row in rules(model, abstract_variables(model)) if row.key.startswith("backbone.body.")]
    assert [(row.key.removeprefix("backbone.body."), row.shape) for row in rows] == [
        (key, tuple(tensor.shape)) for key, tensor in expected.items() if not key.startswith("fc.")
    ]


def tree(**leaves: tuple[int, ...]) -> dict:
    """Variables of the given shapes; "a__b" is the leaf a/b of params."""
    params: dict = {}
    for name, shape in leaves.items():
        *modules, leaf = name.split("__")
        at = params
        for module in modules:
            at = at.setdefault(module, {})
        at[leaf] = np.zeros(shape, np.float32)
    return {"params": params, "batch_stats": {}}


@pytest.mark.parametrize(
    ("leaves", "expected"),
    [
        (
            {"backbone__body__conv1__kernel": (7, 7, 3, 64), "mystery__kernel": (2, 2)},
            "no name for mystery/kernel",
        ),
        ({"backbone__body__conv1__gain": (1,)}, "no name for backbone/body/conv1/gain"),
        ({"backbone__body__layer1_9__conv1__kernel": (1, 1, 64, 64)}, "no name for backbone/body/layer1_9"),
        ({"box_head__fc6__kernel": (50, 3)}, "50 rows, expected a multiple of 7x7"),
    ],
)
def test_other_architectures_are_named(leaves, expected):
    with pytest.raises(ValueError, match=expected):
        rules(faster_rcnn(), tree(**leaves))


def test_the_first_linear_layer_takes_the_pooled_size():
    model = faster_rcnn_v2().clone(
        box_roi_pool=MultiScaleRoIAlign(output_size=(3, 5)), box_head=FastRCNNConvFCHead((2, 3, 5), (), (4,))
    )
    (row,) = rules(model, tree(box_head__fc_0__kernel=(3 * 5 * 2, 4)))
    assert row.key == "roi_heads.box_head.1.weight"
    assert "3x5" in row.layout.name


def test_present_names():
    keys = [
        "module.a.weight",
        "a.weight",
        "backbone.fpn.inner_blocks.1.bias",
        "rpn.head.conv.weight",
        "rpn.head.conv",
    ]
    assert canonical_keys(dict.fromkeys(keys)) == {
        "a.weight": ["module.a.weight", "a.weight"],
        "backbone.fpn.inner_blocks.1.0.bias": ["backbone.fpn.inner_blocks.1.bias"],
        "rpn.head.conv.0.0.weight": ["rpn.head.conv.weight"],
        "rpn.head.conv": ["rpn.head.conv"],
    }


# --- layouts

SHAPES = [
    (layouts.IDENTITY, (5,)),
    (layouts.CONV, (3, 2, 4, 5)),
    (layouts.DENSE, (4, 5)),
    (layouts.flattened(2, 3), (2 * 3 * 4, 5)),
]


@pytest.mark.parametrize(("layout", "shape"), SHAPES, ids=[layout.name for layout, _ in SHAPES])
def test_layouts_invert(layout, shape):
    flax = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    torch = layout.to_torch(flax)
    assert torch.shape == layout.torch_shape(shape)
    assert layout.to_flax(torch).tobytes() == flax.tobytes()
    assert collections.Counter(torch.ravel().tolist()) == collections.Counter(flax.ravel().tolist())


def test_layouts_compute_what_torch_computes():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 6, 7, 3))  # NHWC
    kernel = rng.normal(size=(3, 5, 3, 4))
    conv = torch.nn.functional.conv2d(
        torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(layouts.CONV.to_torch(kernel).copy())
    )
    with jax.enable_x64(True):
        ours = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        np.testing.assert_allclose(ours, conv.permute(0, 2, 3, 1), rtol=OP_F64, atol=OP_F64)

    kernel = rng.normal(size=(6 * 7 * 3, 4))
    weight = layouts.flattened(6, 7).to_torch(kernel)
    linear = torch.nn.functional.linear(
        torch.from_numpy(x).permute(0, 3, 1, 2).flatten(1), torch.from_numpy(weight.copy())
    )
    np.testing.assert_allclose(x.reshape(2, -1) @ kernel, linear, rtol=OP_F64, atol=OP_F64)
