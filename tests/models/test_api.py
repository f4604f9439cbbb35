"""What users build on: any backbone, every public method, and the whole as a module of nnx."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flaxdet.models import FCOS, FasterRCNN
from flaxdet.models.detector import example_batch
from flaxdet.models.levels import feature_extents, level_shapes
from flaxdet.ops import AnchorGenerator
from flaxdet.structures import Detections, Proposals
from tests.models.small import (
    CLASSES,
    DETECTORS,
    FCOS_GROUP,
    RCNN_GROUP,
    WIDTH,
    Plain,
    WithBoth,
    batch_of,
    faster_rcnn,
    fcos,
    levels,
    part,
    run,
    variables_of,
)
from tests.tolerances import LAYERS_F32, NET_F32, NET_PROPOSALS_F32


class WithTrain(nn.Module):
    out_channels: int = WIDTH

    @nn.compact
    def __call__(self, x, *, train):
        return {name: -y if train else y for name, y in levels(self, x).items()}


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
    variables, padded = variables_of(model), batch_of(bucket=(128, 128))
    found = part(model, "features", variables, padded)
    for name, alone in part(model, "features", variables, batch_of()).items():
        cropped = found[name][:, : alone.shape[1], : alone.shape[2]]
        np.testing.assert_allclose(cropped, alone, rtol=0, atol=LAYERS_F32, err_msg=name)
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


@pytest.mark.ci  # FCOS is enough elsewhere
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


# nnx


@pytest.mark.release  # README wraps an FCOS in CI, tests/results/test_bridges.py a Faster R-CNN
@FCOS_GROUP
def test_nnx_users_can_wrap_it():
    model, batch = fcos(WithBoth()), batch_of(bucket=(128, 128))
    init = nnx.jit(lambda batch: nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)).lazy_init(batch))
    wrapped = init(batch)
    variables = variables_of(model)
    state = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
    held = {name: nnx.to_pure_dict(nnx.state(wrapped, kind)) for name, kind in state.items()}
    assert jax.tree.structure({name: held[name] for name in variables}) == jax.tree.structure(variables)
    detections = nnx.jit(lambda wrapped, batch: wrapped(batch))(wrapped, batch)
    same(detections, run(model, {name: held[name] for name in variables}, batch)[0], 1e-3)
