"""The real detectors, abstractly: every stage by name, shapes and dtypes; and models as values."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxdet
from flaxdet import registry
from flaxdet.models.detector import example_batch
from flaxdet.structures import Detections
from tests.models.small import CLASSES, DETECTORS, Plain, WithBoth, batch_of, fcos, part, variables_of
from tests.parity.sides import FCOS_NAME, V2_NAME, flax_detector
from tests.tiny import small_model
from tests.tolerances import NET_F32

STAGES = {
    FCOS_NAME: {"p3", "p4", "p5", "p6", "p7", "cls_logits", "bbox_regression", "bbox_ctrness"},
    V2_NAME: {"p2", "p3", "p4", "p5", "pool", "objectness", "pred_bbox_deltas", "proposals", "roi_features"}
    | {"class_logits", "box_regression", "class_scores"},
}


@pytest.mark.parametrize("name", STAGES)
def test_stages_and_collections(name):
    model = flax_detector(name, CLASSES)
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


@pytest.mark.ci  # whole ResNet-50s; the small forms are below
@pytest.mark.parametrize("name", [FCOS_NAME, V2_NAME])
def test_builders_are_abstract_too(name):
    build = getattr(flaxdet, name)
    variables = jax.eval_shape(lambda: build(weights_backbone=None)[1])
    traced = jax.jit(lambda key: build(weights_backbone=None, key=key)[1]).trace(jax.random.key(1))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), variables) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), traced.out_info
    )
    traced.lower()
    model = registry.make_model(name, num_classes=91)
    detections = jax.eval_shape(model.apply, variables, batch_of((64, 64), bucket=(64, 96), count=3))
    assert detections.boxes.shape == (3, 100, 4)


# Dtypes


# (dtype, param_dtype, stored); the less usual mixtures run in CI alone
DTYPES = [
    ("float32", None, "float32"),
    pytest.param("float32", "bfloat16", "bfloat16", marks=pytest.mark.ci),
    pytest.param("float32", "float64", "float64", marks=pytest.mark.ci),
    ("bfloat16", None, "float32"),
    ("bfloat16", "bfloat16", "bfloat16"),
    pytest.param("float16", "float32", "float32", marks=pytest.mark.ci),
    ("float64", None, "float64"),
    pytest.param("float64", "float32", "float32", marks=pytest.mark.ci),
]


@pytest.mark.parametrize(("dtype", "param_dtype", "stored"), DTYPES)
@pytest.mark.parametrize("name", STAGES)
def test_dtypes(name, dtype, param_dtype, stored):
    """Maps are computed in dtype, leaves stored in param_dtype, boxes and scores never below float32."""
    with jax.enable_x64(True) if "float64" in (dtype, param_dtype) else contextlib.nullcontext():
        model = small_model(name, num_classes=CLASSES, dtype=dtype, param_dtype=param_dtype)
        variables = jax.eval_shape(model.init, jax.random.key(0), example_batch())
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(stored)}
        found, state = jax.eval_shape(
            lambda v, b: model.apply(v, b, train=True, mutable=["intermediates", "batch_stats"]),
            variables,
            batch_of((64, 64), bucket=(96, 96)),
        )
    assert {leaf.dtype for leaf in jax.tree.leaves(state["batch_stats"])} == {jnp.dtype(stored)}
    stages = state["intermediates"]
    assert {stages[stage][0].dtype for stage in ("c2", "c5", "p3", "p4")} == {jnp.dtype(dtype)}
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
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), variables)
    outputs, expected = part(model, "head", variables, features), part(fcos(WithBoth()), "head", wide, features)
    for name, value in outputs.items():
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, expected[name], atol=NET_F32)


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
    by_hand = flax_detector(name, 91, small=False, dtype=jnp.float32)
    built = registry.make_model(name, num_classes=91, precision=jax.lax.Precision.HIGHEST)
    assert by_hand == built
