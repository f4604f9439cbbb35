"""What users build on: any backbone, replaceable parts, every stage by name, dtypes, abstract evaluation."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flaxdet import builders
from flaxdet.models import (
    FCOS,
    FasterRCNN,
    FastRCNNConvFCHead,
    FastRCNNPredictor,
    FCOSHead,
    MultiScaleRoIAlign,
    RPNHead,
    TwoMLPHead,
)
from flaxdet.models.detector import example_batch, feature_extents, level_shapes
from flaxdet.nn.layers import level_extent, mask_beyond
from flaxdet.ops import AnchorGenerator
from flaxdet.structures import Detections, ImageBatch, Proposals
from tests.drawn import drawn
from tests.parity.sides import FCOS_NAME, V2_NAME, flax_detector
from tests.tolerances import LAYERS_F32, NET_F32, NET_PROPOSALS_F32

WIDTH = 32
CLASSES = 5
# Three levels; every score passes, so that there is something to compare.
FCOS_OPTIONS: dict[str, Any] = {
    "anchor_generator": AnchorGenerator((8, 16, 32), (1.0,)),
    "score_thresh": 0.0,
    "detections_per_img": 20,
}
RCNN_OPTIONS: dict[str, Any] = {
    "rpn_anchor_generator": AnchorGenerator((16, 32, 64), (0.5, 1.0, 2.0)),
    "rpn_post_nms_top_n_test": 12,
    "box_head": FastRCNNConvFCHead((WIDTH, 7, 7), (8,), (16,), use_norm=True),
    "box_predictor": FastRCNNPredictor(16, CLASSES),
    "box_score_thresh": 0.0,
    "box_detections_per_img": 20,
}


def levels(module: nn.Module, x, canvas=None):
    """Three maps at strides 8, 16 and 32, each a convolution of the one before."""
    bucket = x.shape[1:3]
    x = nn.Conv(WIDTH, (8, 8), strides=8, padding=0, name="stem")(x)
    maps = {"0": x}
    for i in (1, 2):
        x = mask_beyond(nn.relu(x), level_extent(canvas, bucket, x.shape[1:3]))
        x = nn.Conv(WIDTH, (3, 3), strides=2, padding=1, name=f"conv{i}")(x)
        maps[str(i)] = x
    return maps


class Plain(nn.Module):
    out_channels: int = WIDTH

    @nn.compact
    def __call__(self, x):
        return levels(self, x)


class WithTrain(nn.Module):
    out_channels: int = WIDTH

    @nn.compact
    def __call__(self, x, *, train):
        return {name: -y if train else y for name, y in levels(self, x).items()}


class WithBoth(nn.Module):
    out_channels: int = WIDTH

    @nn.compact
    def __call__(self, x, *, canvas=None, train=False):
        return {name: -y if train else y for name, y in levels(self, x, canvas).items()}


class WithAnything(nn.Module):
    out_channels: int = WIDTH

    @nn.compact
    def __call__(self, x, **options):
        assert set(options) == {"canvas", "train"}
        return levels(self, x, options["canvas"])


class OneMap(nn.Module):
    out_channels: int = WIDTH

    @nn.compact
    def __call__(self, x):
        return levels(self, x)["1"]


def fcos(backbone, **options):
    return FCOS(backbone, CLASSES, **{**FCOS_OPTIONS, **options})


def faster_rcnn(backbone, **options):
    return FasterRCNN(backbone, **{**RCNN_OPTIONS, **options})


# Tests of one group run in one worker and share what `run` has compiled.
FCOS_GROUP, RCNN_GROUP = pytest.mark.xdist_group("api_fcos"), pytest.mark.xdist_group("api_rcnn")
DETECTORS = pytest.mark.parametrize(
    "detector", [pytest.param(fcos, marks=FCOS_GROUP), pytest.param(faster_rcnn, marks=RCNN_GROUP)]
)


def batch_of(size=(64, 96), bucket=None, count: int = 2) -> ImageBatch:
    """Noise of one size; in a bucket, everything beyond the image's own canvas is rubbish that must not be seen."""
    pixels = np.random.default_rng(0).normal(size=(count, *size, 3)).astype(np.float32)
    sizes = jnp.broadcast_to(jnp.asarray(size, jnp.int32)[None], (count, 2))
    if bucket is None:
        return ImageBatch(jnp.asarray(pixels), sizes, sizes, None, sizes[:, 0])
    wide = np.zeros((count, *bucket, 3), np.float32)
    wide[:, : size[0], : size[1]] = pixels
    return ImageBatch(jnp.asarray(wide), sizes, sizes, sizes, sizes[:, 0])


def variables_of(model, seed: int = 0):
    return drawn(jax.eval_shape(model.init, jax.random.key(0), example_batch()), seed)


@functools.partial(jax.jit, static_argnums=0)  # equal models of different tests share one compile
def run(model, variables, batch):
    """Detections, and every stage by name."""
    detections, state = model.apply(variables, batch, mutable=["intermediates"])
    return detections, {name: value for name, (value,) in state["intermediates"].items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def part(model, method, variables, *args):
    return model.apply(variables, *args, method=method)


def same(found: Detections, expected: Detections, tolerance: float = 0.0) -> None:
    assert expected.valid.any()
    for name in ("valid", "labels"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    for name in ("boxes", "scores"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=0, atol=tolerance)


# Backbones


@DETECTORS
@pytest.mark.parametrize("backbone", [Plain(), WithTrain(), WithBoth(), WithAnything()])
def test_any_backbone(detector, backbone):
    """The same maps and the same variables, whatever options the backbone's signature takes."""
    reference = detector(WithBoth())
    model, batch = detector(backbone), batch_of()
    abstract = jax.eval_shape(model.init, jax.random.key(0), batch)
    assert jax.tree.structure(abstract) == jax.tree.structure(variables_of(reference))
    detections = jax.eval_shape(model.apply, abstract, batch)
    assert detections.boxes.shape == (2, 20, 4)

    variables = variables_of(model)
    expected = part(reference, "features", variables, batch)
    for train in (False, True):
        found = model.apply(variables, batch, train=train, method="features")
        negated = train and isinstance(backbone, (WithTrain, WithBoth))
        for name in ("0", "1", "2"):
            np.testing.assert_allclose(found[name], -expected[name] if negated else expected[name], atol=LAYERS_F32)


@DETECTORS
def test_canvas_of_a_backbone(detector):
    """One that takes the canvas gives each image its own answer; one that doesn't is refused, not wrong."""
    model = detector(WithBoth())
    variables, alone, padded = variables_of(model), batch_of(), batch_of(bucket=(128, 128))
    same(run(model, variables, padded)[0], run(model, variables, alone)[0], 1e-3)
    for backbone in (Plain(), WithTrain()):
        with pytest.raises(
            ValueError, match=f"backbone {type(backbone).__name__} takes no `canvas` argument.*canvas=None"
        ):
            jax.eval_shape(detector(backbone).apply, variables, padded)


def test_single_map():
    """An array instead of a dict is the map "0", as in torchvision."""
    anchors = AnchorGenerator((32,), (1.0,))
    for model in (
        fcos(OneMap(), anchor_generator=anchors),
        faster_rcnn(OneMap(), rpn_anchor_generator=anchors),
    ):
        _, stages = jax.eval_shape(functools.partial(run, model), variables_of(model), batch_of())
        assert stages["0"].shape == (2, 4, 6, WIDTH)


@pytest.mark.parametrize("kind", [FCOS, FasterRCNN])
def test_backbone_without_out_channels(kind):
    with pytest.raises(ValueError, match="backbone should contain an attribute out_channels"):
        kind(nn.Conv(8, (3, 3)), 3)


@DETECTORS
def test_levels_and_anchors_must_agree(detector):
    name = "anchor_generator" if detector is fcos else "rpn_anchor_generator"
    model = detector(Plain(), **{name: AnchorGenerator((8, 16), (1.0,))})
    with pytest.raises(ValueError, match="sizes for 2 levels, found 3"):
        jax.eval_shape(model.init, jax.random.key(0), example_batch())


# Parts


class TwoConvHead(nn.Module):
    """An FCOS head of one's own, which neither normalises nor knows of canvases."""

    @nn.compact
    def __call__(self, features):
        outputs = {"cls_logits": CLASSES, "bbox_regression": 4, "bbox_ctrness": 1}
        layers = {name: nn.Conv(width, (1, 1), name=name) for name, width in outputs.items()}
        return {
            name: jnp.concatenate(
                [nn.relu(layer(x)).reshape(len(x), -1, outputs[name]) for x in features.values()], axis=1
            )
            for name, layer in layers.items()
        }


def test_fcos_with_a_head_of_ones_own():
    model = fcos(WithBoth(), head=TwoConvHead())
    variables = variables_of(model)
    assert set(variables["params"]["head"]) == {"cls_logits", "bbox_regression", "bbox_ctrness"}
    assert run(model, variables, batch_of())[0].valid.any()
    with pytest.raises(ValueError, match="head TwoConvHead takes no `extents` argument"):
        jax.eval_shape(model.apply, variables, batch_of(bucket=(128, 128)))
    deeper = fcos(WithBoth(), head=FCOSHead(WIDTH, 1, CLASSES, num_convs=2))
    assert "conv_2" not in variables_of(deeper)["params"]["head"]["regression_head"]


class OwnRPNHead(nn.Module):
    @nn.compact
    def __call__(self, features):
        logits, deltas = nn.Conv(3, (1, 1), name="logits"), nn.Conv(12, (1, 1), name="deltas")
        maps = features.values()
        return [logits(x).reshape(len(x), -1) for x in maps], [deltas(x).reshape(len(x), -1, 4) for x in maps]


class OwnBoxHead(nn.Module):
    """Averages the pooled map; like TwoMLPHead it needs to know neither the mode nor the valid slots."""

    @nn.compact
    def __call__(self, x):
        return jnp.mean(x, (1, 2))


class OwnPredictor(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(CLASSES, name="logits")(x), nn.Dense(CLASSES * 4, name="deltas")(x)


@pytest.mark.parametrize(
    "parts",
    [
        {"rpn_head": OwnRPNHead()},
        {
            "box_roi_pool": MultiScaleRoIAlign(("0", "2"), (3, 5), 1),
            "box_head": OwnBoxHead(),
            "box_predictor": FastRCNNPredictor(WIDTH, CLASSES),
        },
        {"box_head": OwnBoxHead(), "box_predictor": OwnPredictor()},
        {"box_roi_pool": MultiScaleRoIAlign(["1"], 3), "box_head": None, "box_predictor": FastRCNNPredictor(1024, 5)},
    ],
    ids=["rpn_head", "pool and head", "head and predictor", "default box_head of another pool"],
)
def test_faster_rcnn_with_parts_of_ones_own(parts):
    model = faster_rcnn(WithBoth(), **parts)
    variables = jax.eval_shape(model.init, jax.random.key(0), example_batch())
    detections, stages = jax.eval_shape(functools.partial(run, model), variables, batch_of())
    assert detections.boxes.shape == (2, 20, 4)
    pool = parts.get("box_roi_pool", MultiScaleRoIAlign())
    assert stages["roi_features"].shape == (2, 12, *pool.output_size, WIDTH)
    assert stages["class_logits"].shape == (2, 12, CLASSES)
    if "rpn_head" in parts:
        assert set(variables["params"]["rpn_head"]) == {"logits", "deltas"}
        with pytest.raises(ValueError, match="rpn_head OwnRPNHead takes no `extents` argument"):
            jax.eval_shape(model.apply, variables, batch_of(bucket=(128, 128)))


def test_defaults_are_torchvisions_parts():
    model = FasterRCNN(Plain(), CLASSES)
    assert model.rpn_head == RPNHead(WIDTH, 3)
    assert model.box_head == TwoMLPHead(WIDTH * 49, 1024)
    assert model.box_predictor == FastRCNNPredictor(1024, CLASSES)
    assert model.box_roi_pool == MultiScaleRoIAlign(output_size=7, sampling_ratio=2)
    assert model.rpn_anchor_generator == AnchorGenerator((32, 64, 128, 256, 512), (0.5, 1.0, 2.0))
    detector = FCOS(Plain(), CLASSES)
    assert detector.head == FCOSHead(WIDTH, 1, CLASSES)
    assert detector.anchor_generator == AnchorGenerator((8, 16, 32, 64, 128), (1.0,))


def test_num_classes_and_box_predictor():
    with pytest.raises(ValueError, match="num_classes should not be None when box_predictor is not specified"):
        FasterRCNN(Plain())
    with pytest.raises(ValueError, match="num_classes should be None when box_predictor is specified"):
        FasterRCNN(Plain(), 3, box_predictor=FastRCNNPredictor(1024, CLASSES))
    with pytest.raises(ValueError, match="num_classes should be None when box_predictor is specified"):
        FasterRCNN(Plain(), 3, box_predictor=OwnPredictor())


def test_parts_of_the_wrong_kind():
    with pytest.raises(TypeError, match="rpn_anchor_generator should be of type AnchorGenerator or None"):
        FasterRCNN(Plain(), 3, rpn_anchor_generator=((32,),))
    with pytest.raises(TypeError, match="box_roi_pool should be of type MultiScaleRoIAlign or None"):
        FasterRCNN(Plain(), 3, box_roi_pool=lambda *_: None)
    with pytest.raises(TypeError, match="anchor_generator should be of type AnchorGenerator or None"):
        FCOS(Plain(), 3, anchor_generator="anchors")
    with pytest.raises(ValueError, match=r"num_anchors_per_location\(\)\[0\] should be 1 instead of 3"):
        FCOS(Plain(), 3, anchor_generator=AnchorGenerator((8, 16, 32), (0.5, 1.0, 2.0)))


def test_featmap_names_that_match_nothing():
    model = faster_rcnn(Plain(), box_roi_pool=MultiScaleRoIAlign(("p2", "p3")))
    with pytest.raises(ValueError, match=r"none of featmap_names \['p2', 'p3'\] is among .*\['0', '1', '2'\]"):
        jax.eval_shape(model.init, jax.random.key(0), example_batch())


# Public methods


@FCOS_GROUP
def test_fcos_is_composed_of_its_methods():
    """Each method gives what ``__call__`` sows or returns, with a canvas smaller than the bucket."""
    model = fcos(WithBoth())
    variables, batch = variables_of(model), batch_of(bucket=(128, 128))
    detections, stages = run(model, variables, batch)
    features = part(model, "features", variables, batch)
    outputs = part(model, "head", variables, features, feature_extents(features, batch))
    for name, value in {**features, **outputs}.items():
        np.testing.assert_allclose(value, stages[name], atol=NET_F32, err_msg=name)
    shapes = level_shapes(features)
    found = jax.jit(lambda v, o, b: model.apply(v, o, b, shapes, method="postprocess"))(variables, outputs, batch)
    same(found, detections, 1e-3)


@RCNN_GROUP
def test_faster_rcnn_is_composed_of_its_methods():
    model = faster_rcnn(WithBoth())
    variables, batch = variables_of(model), batch_of(bucket=(128, 128))
    detections, stages = run(model, variables, batch)
    features = part(model, "features", variables, batch)
    proposals = part(model, "propose", variables, features, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=NET_PROPOSALS_F32), proposals, stages["proposals"])
    logits, offsets = part(model, "box", variables, features, proposals, batch)
    np.testing.assert_allclose(logits, stages["class_logits"], atol=NET_F32)
    np.testing.assert_allclose(offsets, stages["box_regression"], atol=NET_F32)
    same(part(model, "postprocess", variables, logits, offsets, proposals, batch), detections, 1e-3)


@RCNN_GROUP
def test_box_takes_proposals_of_ones_own():
    """Each box is classified by itself: its neighbours and the padding make no difference."""
    model = faster_rcnn(WithBoth())
    variables, batch = variables_of(model), batch_of(bucket=(128, 128))
    features = part(model, "features", variables, batch)
    boxes = jnp.asarray([[[3.0, 4.0, 40.0, 50.0], [0, 0, 96, 64], [0, 0, 0, 0]]] * 2)
    valid = jnp.asarray([[True, True, False]] * 2)
    own = Proposals(boxes, jnp.ones((2, 3)), valid)
    outputs = part(model, "box", variables, features, own, batch)
    assert [x.shape for x in outputs] == [(2, 3, CLASSES), (2, 3, CLASSES * 4)]
    turned = jax.tree.map(lambda x: x[:, ::-1], own)
    for x, y in zip(outputs, part(model, "box", variables, features, turned, batch), strict=True):
        np.testing.assert_allclose(x, y[:, ::-1], atol=LAYERS_F32)
    found = jax.eval_shape(lambda v: model.apply(v, *outputs, own, batch, method="postprocess"), variables)
    assert found.boxes.shape == (2, 20, 4)


# The real detectors, abstractly


STAGES = {
    FCOS_NAME: {"p3", "p4", "p5", "p6", "p7", "cls_logits", "bbox_regression", "bbox_ctrness"},
    V2_NAME: {"p2", "p3", "p4", "p5", "pool", "objectness", "pred_bbox_deltas", "proposals", "roi_features"}
    | {"class_logits", "box_regression", "class_scores"},
}


@pytest.mark.parametrize("name", STAGES)
def test_stages_and_collections(name):
    model = flax_detector(name, 18, CLASSES)
    variables = jax.eval_shape(model.init, jax.random.key(0), example_batch())
    assert set(variables) == {"params", "batch_stats"}
    detections, state = jax.eval_shape(
        lambda v, b: model.apply(v, b, mutable=["intermediates"]), variables, batch_of((64, 96))
    )
    assert set(state) == {"intermediates"}
    stages = state["intermediates"]
    assert set(stages) == {"c2", "c3", "c4", "c5"} | STAGES[name]
    assert all(len(values) == 1 for values in stages.values()), "each is sown once"
    assert stages["c5"][0].shape == (2, 2, 3, 512)
    assert stages["p3"][0].shape == (2, 8, 12, 256)
    assert {leaf.shape[:2] for leaf in (detections.boxes, detections.scores, detections.labels)} == {(2, 100)}
    plain = jax.eval_shape(model.apply, variables, batch_of((64, 96)))
    assert isinstance(plain, Detections)


# (dtype, param_dtype, stored)
DTYPES = [
    ("float32", None, "float32"),
    ("float32", "bfloat16", "bfloat16"),
    ("float32", "float64", "float64"),
    ("bfloat16", None, "float32"),
    ("bfloat16", "bfloat16", "bfloat16"),
    ("float16", "float32", "float32"),
    ("float64", None, "float64"),
    ("float64", "float32", "float32"),
]


@pytest.mark.parametrize(("dtype", "param_dtype", "stored"), DTYPES)
@pytest.mark.parametrize("name", STAGES)
def test_dtypes(name, dtype, param_dtype, stored):
    """Maps are computed in dtype, leaves stored in param_dtype, boxes and scores never below float32."""
    with jax.enable_x64(True) if "float64" in (dtype, param_dtype) else contextlib.nullcontext():
        model = builders.make_model(name, num_classes=CLASSES, dtype=dtype, param_dtype=param_dtype)
        variables = jax.eval_shape(model.init, jax.random.key(0), example_batch())
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(stored)}
        found, state = jax.eval_shape(
            lambda v, b: model.apply(v, b, train=True, mutable=["intermediates", "batch_stats"]),
            variables,
            batch_of((64, 64), bucket=(96, 96)),
        )
    assert {leaf.dtype for leaf in jax.tree.leaves(state["batch_stats"])} == {jnp.dtype(stored)}
    stages = state["intermediates"]
    assert {stages[stage][0].dtype for stage in ("c2", "c5", "p3", "p5")} == {jnp.dtype(dtype)}
    box_dtype = jnp.dtype("float64" if dtype == "float64" else "float32")
    assert found.boxes.dtype == found.scores.dtype == box_dtype
    if name == V2_NAME:
        assert stages["proposals"][0].boxes.dtype == stages["class_scores"][0].dtype == box_dtype
        assert stages["roi_features"][0].dtype == jnp.dtype(dtype)


@DETECTORS
def test_float64_needs_x64(detector):
    for option in ("dtype", "param_dtype"):
        with pytest.raises(ValueError, match=f"{option}=float64 needs jax's 64-bit mode"):
            detector(Plain(), **{option: jnp.float64})
    with pytest.raises(ValueError, match="dtype should be a floating point dtype, got int8"):
        detector(Plain(), dtype=jnp.int8)


def test_bfloat16_storage_is_rounded_weights():
    """The head computes in float32 from what bfloat16 holds."""
    model = fcos(WithBoth(), param_dtype=jnp.bfloat16)
    variables, batch = variables_of(model), batch_of()
    assert variables["params"]["head"]["regression_head"]["conv_0"]["kernel"].dtype == jnp.bfloat16
    features = part(model, "features", variables, batch)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), variables)
    outputs, expected = part(model, "head", variables, features), part(fcos(WithBoth()), "head", wide, features)
    for name, value in outputs.items():
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, expected[name], atol=NET_F32)


@pytest.mark.parametrize("name", STAGES)
def test_builders_are_abstract_too(name):
    build = getattr(builders, name)
    variables = jax.eval_shape(lambda: build(weights_backbone=None)[1])
    keyed = jax.eval_shape(lambda key: build(weights_backbone=None, key=key)[1], jax.random.key(1))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), variables) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), keyed
    )
    jax.jit(lambda key: build(weights_backbone=None, key=key)[1]).lower(jax.random.key(0))
    model = builders.make_model(name, num_classes=91)
    detections = jax.eval_shape(model.apply, variables, batch_of((64, 64), bucket=(64, 96), count=3))
    assert detections.boxes.shape == (3, 100, 4)


# Models as values


@DETECTORS
def test_models_are_values(detector):
    model = detector(Plain(), min_size=[96, 128], image_mean=[0.5, 0.5, 0.5])
    again = detector(Plain(), min_size=(96, 128), image_mean=(0.5, 0.5, 0.5), dtype="float32", param_dtype=np.float32)
    assert model == again
    assert hash(model) == hash(again)
    threshold = "score_thresh" if detector is fcos else "box_score_thresh"
    other = model.clone(**{threshold: 0.3})
    assert other != model
    assert other.clone(**{threshold: getattr(model, threshold)}) == model
    assert len({model, again, other, detector(WithBoth())}) == 3


@pytest.mark.parametrize("name", STAGES)
def test_a_model_composed_by_hand_is_the_builders(name):
    by_hand = flax_detector(name, 50, 91, dtype=jnp.float32)
    built = builders.make_model(name, num_classes=91, precision=jax.lax.Precision.HIGHEST)
    assert by_hand == built


@DETECTORS
def test_nnx_users_can_wrap_it(detector):
    model, batch = detector(WithBoth()), batch_of()
    init = nnx.jit(lambda batch: nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)).lazy_init(batch))
    wrapped = init(batch)
    variables = variables_of(model)
    state = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
    held = {name: nnx.to_pure_dict(nnx.state(wrapped, kind)) for name, kind in state.items()}
    assert jax.tree.structure({name: held[name] for name in variables}) == jax.tree.structure(variables)
    detections = nnx.jit(lambda wrapped, batch: wrapped(batch))(wrapped, batch)
    same(detections, run(model, {name: held[name] for name in variables}, batch)[0], 1e-3)
