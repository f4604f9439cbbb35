"""Folded BatchNorm: the same answers, on whole and on smaller canvases, and nothing lost on the way."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import flaxdet
from flaxdet.convert import verify
from flaxdet.convert.state_dict import abstract_variables
from flaxdet.nn import ResNet
from flaxdet.predict import jitted_detect, unpad
from flaxdet.transform import transform
from tests.parity import sides
from tests.tiny import FCOS_NAME, tiny_model, tiny_variables
from tests.tolerances import INVARIANCE_F64

CASES = [
    pytest.param(sides.FCOS_NAME, {}, marks=pytest.mark.xdist_group("fcos")),
    pytest.param(sides.V2_NAME, {"rpn_post_nms_top_n_test": 60}, marks=pytest.mark.xdist_group("v2")),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_same_detections(name, options, x64):
    model, variables, _ = sides.both(name, 18, dtype="float64", min_size=96, max_size=160, **options)
    before = jax.tree.map(lambda leaf: leaf, variables)
    folded, fewer = flaxdet.fold_batch_norm(model, variables)
    assert set(fewer) == {"params"}
    assert jax.tree.structure(variables) == jax.tree.structure(before)
    image = sides.crop("china", 100, 150)
    for bucket in (None, (192, 224)):
        batch = transform([image], model.transform, bucket=bucket, dtype=np.float64)
        (expected,) = unpad(jitted_detect(model, variables, batch))
        (found,) = unpad(jitted_detect(folded, fewer, batch))
        assert len(expected["scores"]) > 10
        assert verify.match_detections(found, expected, INVARIANCE_F64, INVARIANCE_F64).same


@pytest.mark.parametrize(
    ("name", "frozen"), [(sides.FCOS_NAME, False), (sides.FCOS_NAME, True), (sides.V2_NAME, False)]
)
def test_every_batch_norm_of_the_builders_goes(name, frozen):
    """By names and shapes, so that none of the ResNet-50 is computed."""
    from flaxdet.builders import make_model
    from flaxdet.models.detector import example_batch

    model = make_model(name, num_classes=3, frozen_bn=frozen)
    variables = jax.eval_shape(model.init, jax.random.key(0), example_batch())
    variables = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), variables)
    folded, fewer = flaxdet.fold_batch_norm(model, variables)
    expected = jax.eval_shape(folded.init, jax.random.key(0), example_batch())
    assert jax.tree.map(np.shape, fewer) == jax.tree.map(np.shape, dict(expected))
    assert jax.tree.map(lambda leaf: leaf.dtype, fewer) == jax.tree.map(lambda leaf: leaf.dtype, dict(expected))


def test_nothing_is_compiled(compiled):
    model = tiny_model(FCOS_NAME)
    variables = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), abstract_variables(model))
    flaxdet.fold_batch_norm(model, variables)
    assert compiled == []


def test_parts_of_another_kind_keep_theirs():
    model = tiny_model(FCOS_NAME)
    variables = tiny_variables(model)
    folded, same = flaxdet.fold_batch_norm(model, variables)
    assert folded == model
    jax.tree.map(np.testing.assert_array_equal, same, variables)


def test_what_cannot_be_folded_is_told():
    model, variables, _ = sides.both(sides.FCOS_NAME, 18, min_size=96, max_size=160)
    folded, fewer = flaxdet.fold_batch_norm(model, variables)
    with pytest.raises(ValueError, match="folded already"):
        flaxdet.fold_batch_norm(folded, fewer)
    with pytest.raises(ValueError, match="don't fit the model"):
        flaxdet.fold_batch_norm(model, {"params": variables["params"], "batch_stats": {}})
    with pytest.raises(TypeError, match="expected an FCOS or a FasterRCNN, got ResNet"):
        flaxdet.fold_batch_norm(ResNet(18), variables)
    with pytest.raises(ValueError, match="folded"):
        flaxdet.convert.to_torchvision(folded, fewer)
