"""Folded BatchNorm: the same answers, on whole and on smaller canvases, and nothing lost on the way."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import flaxdet
from flaxdet.convert.state_dict import abstract_variables
from flaxdet.images.transform import transform
from flaxdet.inference.detect import jitted_detect, unpad
from flaxdet.nn import ResNet
from tests.drawn import drawn
from tests.tiny import FCOS_NAME, V2_NAME, small_model, tiny_model, tiny_variables
from tests.tolerances import INVARIANCE_F64

CASES = [  # inference/test_folded.py compares a folded detector in every run
    pytest.param("tiny_fcos", {"score_thresh": 0.1}, marks=[pytest.mark.xdist_group("folding_tiny"), pytest.mark.ci]),
    pytest.param(FCOS_NAME, {}, marks=[pytest.mark.xdist_group("folding_fcos"), pytest.mark.release]),
    pytest.param(
        V2_NAME, {"rpn_post_nms_top_n_test": 40}, marks=[pytest.mark.xdist_group("folding_v2"), pytest.mark.ci]
    ),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_same_detections(name, options, x64):
    """Two photos, each on its own canvas, and in one batch of a ``Predictor``, which folds, in a larger bucket."""
    pytest.importorskip("torch")
    from flaxdet.convert import verify
    from tests.parity import sides

    model, variables, _ = sides.both(name, dtype="float64", min_size=96, max_size=160, **options)
    before = jax.tree.map(lambda leaf: leaf, variables)
    folded, fewer = flaxdet.fold_batch_norm(model, variables)
    assert set(fewer) == {"params"}
    assert jax.tree.structure(variables) == jax.tree.structure(before)
    images = [sides.crop(photo, 100, 150) for photo in ("china", "flower")]
    alone = [transform([image], model.transform, dtype=np.float64) for image in images]
    expected = [unpad(jitted_detect(model, variables, batch))[0] for batch in alone]  # not folded
    assert all(len(own["scores"]) > 10 for own in expected)
    predictor = flaxdet.Predictor(model, variables, buckets=[(160, 192)], batch_size=2)
    for found in (flaxdet.predict(folded, fewer, images), predictor(images)):
        for own, other in zip(found, expected, strict=True):
            assert verify.match_detections(own, other, INVARIANCE_F64, INVARIANCE_F64).same


@pytest.mark.parametrize(
    ("name", "frozen"),
    [
        pytest.param(FCOS_NAME, False, marks=pytest.mark.ci),
        (FCOS_NAME, True),
        pytest.param(V2_NAME, False, marks=pytest.mark.ci),
    ],
)
def test_every_batch_norm_of_the_builders_goes(name, frozen):
    """By names and shapes, so that none of the ResNet-50 is computed."""
    from flaxdet.models.detector import example_batch
    from flaxdet.registry import make_model

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
    model = small_model(FCOS_NAME, num_classes=3)
    variables = drawn(abstract_variables(model))
    folded, fewer = flaxdet.fold_batch_norm(model, variables)
    with pytest.raises(ValueError, match="folded already"):
        flaxdet.fold_batch_norm(folded, fewer)
    with pytest.raises(ValueError, match="don't fit the model"):
        flaxdet.fold_batch_norm(model, {"params": variables["params"], "batch_stats": {}})
    with pytest.raises(TypeError, match="expected a detector, got ResNet"):
        flaxdet.fold_batch_norm(ResNet(18), variables)
    with pytest.raises(ValueError, match="folded"):
        flaxdet.convert.to_torchvision(folded, fewer)
