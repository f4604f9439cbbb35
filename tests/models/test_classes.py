"""New class layers on trained weights: what stays, what is new, what is carried over."""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import traverse_util

from flaxdet.convert import reference, to_torchvision
from flaxdet.convert.state_dict import abstract_variables
from flaxdet.models import FasterRCNN
from flaxdet.models.classes import match_classes, replace_classes
from flaxdet.models.faster_rcnn import FastRCNNPredictor
from flaxdet.registry import make_model
from tests.drawn import drawn
from tests.tiny import FCOS_NAME, V2_NAME, tiny_model
from tests.tolerances import HAND_F32, INIT_BOUND, INIT_MEAN, INIT_STD

LAYERS = {
    FCOS_NAME: {("head", "classification_head", "cls_logits"): 1},
    V2_NAME: {("box_predictor", "cls_score"): 1, ("box_predictor", "bbox_pred"): 4},
}
OPTIONS = {
    FCOS_NAME: {"score_thresh": 0.31, "min_size": (48, 64), "trainable_backbone_layers": 2},
    V2_NAME: {"box_nms_thresh": 0.31, "min_size": (48, 64), "trainable_backbone_layers": 2},
}
NAMES = pytest.mark.parametrize("name", [FCOS_NAME, V2_NAME])


@functools.cache
def trained(name, num_classes=4):
    model = tiny_model(name, num_classes, **OPTIONS[name])
    return model, drawn(abstract_variables(model))


def flat(variables):
    return traverse_util.flatten_dict(variables)


def rows(variables, name):
    """{layer/leaf: [..., classes, numbers a class]} of the class layers."""
    params = flat(variables["params"])
    return {
        "/".join((*path, leaf)): np.asarray(params[*path, leaf]).reshape(*params[*path, leaf].shape[:-1], -1, width)
        for path, width in LAYERS[name].items()
        for leaf in ("kernel", "bias")
    }


@functools.cache
def fresh_rows(name):
    """Fresh rows of nine classes, as many as other tests draw: the initialisation is compiled once."""
    return rows(replace_classes(*trained(name), 9)[1], name)


@NAMES
@pytest.mark.parametrize("num_classes", [pytest.param(2, marks=pytest.mark.ci), 4, 9])
def test_all_else_stays(name, num_classes):
    """The same arrays, not copies; the same model with another number of classes; the old variables untouched."""
    model, variables = trained(name)
    before = jax.tree.map(np.array, variables)
    found_model, found = replace_classes(model, variables, num_classes, copy={1: 2})
    assert found_model == tiny_model(name, num_classes, **OPTIONS[name])
    assert jax.tree.structure(found) == jax.tree.structure(variables)
    new = {("params", *path, leaf) for path in LAYERS[name] for leaf in ("kernel", "bias")}
    wanted = flat(abstract_variables(found_model))
    for path, leaf in flat(found).items():
        assert leaf.shape == wanted[path].shape
        assert leaf.dtype == wanted[path].dtype
        assert (leaf is flat(variables)[path]) == (path not in new)
    jax.tree.map(np.testing.assert_array_equal, variables, before)


@NAMES
def test_rows_that_are_carried_over(name):
    """And no others: what is not copied is what a call without `copy` draws."""
    model, variables = trained(name)
    copy = {0: 0, 5: 1, 2: np.int64(3)}
    _, found = replace_classes(model, variables, 9, copy=copy)
    old, fresh = rows(variables, name), fresh_rows(name)
    for layer, values in rows(found, name).items():
        for label in range(9):
            source, at = (old, copy[label]) if label in copy else (fresh, label)
            np.testing.assert_array_equal(values[..., label, :], source[layer][..., at, :])


@NAMES
def test_the_key_decides(name):
    model, variables = trained(name)
    draws = [fresh_rows(name)] + [
        rows(replace_classes(model, variables, 9, key=jax.random.key(seed))[1], name) for seed in (0, 1)
    ]
    for layer in draws[0]:
        np.testing.assert_array_equal(draws[0][layer], draws[1][layer])
    kernels = [layer for layer in draws[0] if layer.endswith("kernel")]
    assert all(np.all(draws[1][layer] != draws[2][layer]) for layer in kernels)


def test_initialisation_is_torchvisions():
    """FCOS: normal(.01) and the focal prior; the predictor: uniform up to 1 / sqrt(inputs), weight and bias."""
    _, found = replace_classes(*trained(FCOS_NAME), 400)
    layer = jax.tree.map(np.asarray, found["params"]["head"]["classification_head"]["cls_logits"])
    assert layer["kernel"].size > 100_000  # standard errors below .3%
    np.testing.assert_allclose(
        [layer["kernel"].std(), layer["kernel"].mean()], [0.01, 0], rtol=INIT_STD, atol=INIT_MEAN
    )
    np.testing.assert_allclose(layer["bias"], -math.log(99), rtol=HAND_F32)

    model = tiny_model(V2_NAME, None, box_predictor=FastRCNNPredictor(64, 4))
    _, found = replace_classes(model, drawn(abstract_variables(model)), 400)
    bound = 64**-0.5
    for layer in found["params"]["box_predictor"].values():
        for leaf in map(np.asarray, layer.values()):
            assert np.abs(leaf).max() <= bound
            np.testing.assert_allclose(
                [leaf.std(), leaf.max(), leaf.min()], [bound / 3**0.5, bound, -bound], rtol=INIT_BOUND
            )


@pytest.mark.ci  # whole ResNet-50s; the tests above have small ones
@pytest.mark.parametrize("name", [FCOS_NAME, V2_NAME])
def test_the_builders_models(name):
    """Full size, frozen or live: the model is the builder's for that many classes, and torchvision takes it."""
    options = {"frozen_bn": True} if name == FCOS_NAME else {"freeze_bn": True, "remat": True}
    model = make_model(name, num_classes=4, max_size=500, **options)
    variables = drawn(abstract_variables(model))
    found_model, found = replace_classes(model, variables, 3, copy={2: 1})
    assert found_model == make_model(name, num_classes=3, max_size=500, **options)
    old, new = to_torchvision(model, variables), to_torchvision(found_model, found)
    key = "head.classification_head.cls_logits" if name == FCOS_NAME else "roi_heads.box_predictor.bbox_pred"
    width = 1 if name == FCOS_NAME else 4
    for leaf in ("weight", "bias"):  # torch's rows are classes
        copied = new[f"{key}.{leaf}"][2 * width : 3 * width]
        np.testing.assert_array_equal(copied, old[f"{key}.{leaf}"][width : 2 * width])
    pytest.importorskip("torch")
    theirs = reference.build(name, num_classes=3, frozen=name == FCOS_NAME).state_dict()
    assert {key: value.shape for key, value in theirs.items()} == {key: value.shape for key, value in new.items()}


def test_a_predictor_given_by_hand():
    """torchvision's own kind, so it can be replaced; then num_classes stays None, as it was."""
    model = tiny_model(V2_NAME, None, box_predictor=FastRCNNPredictor(64, 5))
    found_model, found = replace_classes(model, drawn(abstract_variables(model)), 3)
    assert found_model.num_classes is None
    assert found_model == tiny_model(V2_NAME, None, box_predictor=FastRCNNPredictor(64, 3))
    assert found["params"]["box_predictor"]["bbox_pred"]["bias"].shape == (12,)


class OwnHead(nn.Module):
    num_classes: int = 4

    def __call__(self, features, extents=None):
        return {}


class OwnPredictor(OwnHead):
    pass


def test_parts_of_ones_own():
    model = tiny_model(FCOS_NAME, head=OwnHead())
    with pytest.raises(
        TypeError, match="knows the class layers of torchvision's parts, and the head of this FCOS is OwnHead"
    ):
        replace_classes(model, {}, 3)
    model = tiny_model(V2_NAME, None, box_predictor=OwnPredictor())
    assert isinstance(model, FasterRCNN)
    with pytest.raises(
        TypeError, match="of torchvision's parts, and the box_predictor of this FasterRCNN is OwnPredictor"
    ):
        replace_classes(model, {}, 3)
    with pytest.raises(TypeError, match="expected a detector, got Dense"):
        replace_classes(nn.Dense(3), {}, 3)  # pyright: ignore


@NAMES
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 1}, "num_classes counts the background, so it should be at least 2, got 1"),
        ({"copy": {6: 1}}, r"expected new labels from 0 to 5, got 6"),
        ({"copy": {-1: 1}}, r"expected new labels from 0 to 5, got -1"),
        ({"copy": {1: 4}}, r"expected old labels from 0 to 3, got 4"),
        ({"copy": {1: -1}}, r"expected old labels from 0 to 3, got -1"),
        ({"copy": {1: "red"}}, r"expected old labels from 0 to 3, got 'red'"),
        ({"copy": {True: 1}}, r"expected new labels from 0 to 5, got True"),
        (
            {"variables": {"params": {}}},
            r"do not fit the model: expected params/.*kernel of shape \[\.\.\., 4\], found nothing",
        ),
    ],
)
def test_bad_input(name, change, message):
    model, variables = trained(name)
    with pytest.raises(ValueError, match=message):
        replace_classes(**({"model": model, "variables": variables, "num_classes": 6} | change))


@NAMES
def test_variables_of_another_number_of_classes(name):
    model, _ = trained(name)
    _, others = trained(name, 5)
    with pytest.raises(ValueError, match=r"expected params/.*/kernel of shape \[\.\.\., 4\], found \[.*5\]"):
        replace_classes(model, others, 3)


OLD = ["__background__", "person", "N/A", "red cell", "N/A", "platelet"]
NEW = ["__background__", "platelet", "N/A", "white cell", "person", "Red cell"]


def test_names():
    assert match_classes(OLD, NEW) == {0: 0, 1: 5, 4: 1}
    assert match_classes(OLD, NEW, ["person", "platelet"]) == {4: 1, 1: 5}
    assert match_classes(OLD, NEW, ()) == {}
    assert match_classes([], NEW) == {}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["persn"], r"'persn' is none of the 6 new classes; did you mean 'person'\?"),
        (["red cell"], r"'red cell' is none of the 6 new classes; did you mean 'Red cell'\?"),
        (["white cell"], r"'white cell' is none of the 6 classes of the weights; did you mean 'red cell'\?"),
        (["zebra"], r"'zebra' is none of the 6 new classes$"),
        (["N/A"], r"'N/A' should name one of the classes of the weights, and names labels \[2, 4\]"),
    ],
)
def test_names_that_are_not_there(names, message):
    with pytest.raises(ValueError, match=message):
        match_classes(OLD, NEW, names)
