"""Other libraries' forms of what flaxdet makes: supervision's detections, NNX's modules."""

from __future__ import annotations

import sys

import jax
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

import flaxdet
from flaxdet.convert.state_dict import abstract_variables
from flaxdet.images.transform import transform, transform_targets
from tests.drawn import drawn
from tests.tiny import NAMES, V2_NAME, tiny_model

# What supervision says where OpenCV is missing, which flaxdet doesn't need.
SUPERVISION = pytest.mark.filterwarnings("ignore:OpenCV .* is not installed:UserWarning")
FOUND = {
    "boxes": np.array([[1, 2, 30, 40], [5.5, 6, 7, 8]], np.float32),
    "scores": np.array([0.75, 0.5], np.float32),
    "labels": np.array([3, 1], np.int32),
}


@SUPERVISION
def test_supervision():
    supervision = pytest.importorskip("supervision")
    found = flaxdet.to_supervision(FOUND, NAMES)
    assert isinstance(found, supervision.Detections)
    np.testing.assert_array_equal(found.xyxy, FOUND["boxes"])
    np.testing.assert_array_equal(found.confidence, FOUND["scores"])
    assert found.class_id.tolist() == [3, 1]
    assert found.data["class_name"].tolist() == ["blue", "red"]
    assert flaxdet.to_supervision(FOUND).data == {}

    # its own operations take it
    best = found[found.confidence > 0.6]
    assert best.data["class_name"].tolist() == ["blue"]
    assert supervision.Detections.merge([found, best]).class_id.tolist() == [3, 1, 3]
    annotated = supervision.BoxAnnotator().annotate(np.zeros((50, 50, 3), np.uint8), found)
    assert annotated.any()
    best.xyxy += 1  # a copy: what predict gave stays
    found.xyxy += 1
    assert FOUND["boxes"][0, 0] == 1


@SUPERVISION
def test_supervision_of_an_image_without_detections():
    pytest.importorskip("supervision")
    empty = {"boxes": np.zeros((0, 4)), "scores": np.zeros(0), "labels": np.zeros(0, np.int32)}
    found = flaxdet.to_supervision(empty, NAMES)
    assert len(found) == 0
    assert found.data["class_name"].shape == (0,)


@SUPERVISION
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.array([4, -1])}, r"categories should name every label, got 4 names and labels \[-1, 4\]"),
        ({"scores": np.zeros(3)}, r"boxes \[N, 4\], scores \[N\] and labels \[N\], got \[2, 4\], \[3\] and \[2\]"),
        ({"boxes": np.zeros((2, 5))}, r"got \[2, 5\], \[2\] and \[2\]"),
    ],
)
def test_supervision_of_bad_input(change, message):
    pytest.importorskip("supervision")
    with pytest.raises(ValueError, match=message):
        flaxdet.to_supervision({**FOUND, **change}, NAMES)
    with pytest.raises(ValueError, match="as predict gives them, it lacks scores, labels"):
        flaxdet.to_supervision({"boxes": FOUND["boxes"]})


def test_supervision_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)  # importing it now raises ImportError
    with pytest.raises(ImportError, match=r"pip install 'flaxdet\[bridges\]'"):
        flaxdet.to_supervision(FOUND)


@pytest.mark.ci  # two programs of a whole detector
def test_nnx():
    """Loaded into flax.nnx.bridge.ToNNX as the README does (with an FCOS), a model detects, trains and goes back."""
    model = tiny_model(V2_NAME, box_score_thresh=0.0)
    variables = jax.tree.map(jax.numpy.asarray, drawn(abstract_variables(model)))
    image = np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8)
    batch = transform([image], model.transform)

    wrapped = nnx.eval_shape(lambda: nnx.bridge.ToNNX(model).lazy_init(batch, rngs=nnx.Rngs(0)))
    for tree in variables.values():
        nnx.update(wrapped, tree)
    found = nnx.jit(lambda wrapped, batch: wrapped(batch))(wrapped, batch)
    expected = jax.jit(model.apply)(variables, batch)
    assert expected.valid.sum() > 10
    jax.tree.map(np.testing.assert_array_equal, found, expected)

    kinds = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
    back = {name: nnx.to_pure_dict(nnx.state(wrapped, kind)) for name, kind in kinds.items()}
    jax.tree.map(np.testing.assert_array_equal, back, variables)

    truth = {"boxes": np.array([[4.0, 4, 40, 40]]), "labels": np.array([1])}
    targets = transform_targets([truth], batch, model=model)

    def train(wrapped, rngs):
        return wrapped(batch, targets, train=True, rngs=rngs, mutable=["batch_stats"])

    losses = nnx.jit(train)(wrapped, nnx.Rngs(sampling=0))
    assert all(np.isfinite(loss) for loss in losses.values())
    moved = {"/".join(path): leaf for path, leaf in nnx.to_flat_state(nnx.state(wrapped, nnx.BatchStat))}
    before = {"/".join(path): leaf for path, leaf in flatten_dict(back["batch_stats"]).items()}
    assert all((moved[path][...] != before[path]).any() for path in before if path.endswith("mean"))
