"""Strips against a torchvision that has seen an ordinary photo before: RoIAlign's scale is 1 / stride, always."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdet import registry
from flaxdet.convert.state_dict import abstract_variables
from flaxdet.models.roi_pool import MultiScaleRoIAlign
from flaxdet.nn import BackboneWithFPN
from flaxdet.structures import ImageBatch
from flaxdet.train import shard_batch
from flaxdet.train.step import batch_inputs
from tests.tiny import V2_NAME, tiny_model
from tests.tolerances import BOXES_F64, SCORES_F64

pytestmark = pytest.mark.xdist_group("strips")
# Rows of the resized image: a torchvision that sees 1 to 22, 33 to 45 or 65 to 67 rows first infers another scale.
# Each height compiles programs of its own, so these are one of each range, and not more.
HEIGHTS = (1, 33, 67)
COLUMNS = 320


def undeclared(backbone: BackboneWithFPN) -> BackboneWithFPN:
    """The same backbone, without the strides of its levels."""

    class Undeclared(BackboneWithFPN):
        level_strides = None

    return Undeclared(backbone.body, backbone.fpn, backbone.returned_stages)


# the longer side decides
OPTIONS: dict[str, Any] = {"size_divisible": 1, "rpn_post_nms_top_n_test": 60, "fixed_size": None}
OPTIONS |= {"min_size": 10_000, "max_size": COLUMNS, "box_score_thresh": 0.02}


@pytest.mark.ci
def test_detections_of_strips(x64):
    pytest.importorskip("torch")
    from flaxdet.convert import verify
    from tests.parity import sides

    model, variables, theirs = sides.both(sides.V2_NAME, dtype="float64", **OPTIONS)
    counts = []
    for rows in HEIGHTS:
        # as wide as its resized image, so that the resize leaves every row
        strip = np.asarray(sides.crop("china", rows, COLUMNS))
        found = verify.compare(model, variables, theirs, [strip])
        assert {stage.name: stage.shape for stage in found.stages}["pixels"] == (1, rows, COLUMNS, 3)
        (match,) = found.matches
        assert match.same, (rows, match)
        assert match.box_error <= BOXES_F64
        assert match.score_error <= SCORES_F64
        counts.append(match.count)
    assert sum(counts) > 15
    assert sum(count > 0 for count in counts) >= len(HEIGHTS) - 1


@pytest.mark.ci
@pytest.mark.parametrize("rows", HEIGHTS)
def test_strides_that_are_not_declared_make_the_same_program(rows):
    """The strides that the shapes of the maps tell are those that the backbone declares."""
    declared = registry.make_model(V2_NAME, num_classes=3, small=True, **OPTIONS)
    variables = abstract_variables(declared)
    size = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    batch = ImageBatch(jax.ShapeDtypeStruct((1, rows, COLUMNS, 3), jnp.float32), size, size, None)
    programs = [
        jax.jit(model.apply).lower(variables, batch).as_text()
        for model in (declared, declared.clone(backbone=undeclared(declared.backbone)))
    ]
    assert programs[0] == programs[1]


def test_a_torchvision_that_saw_a_strip_first_is_another(x64):
    """What the comparison guards against: the same model pools from elsewhere."""
    torch = pytest.importorskip("torch")
    from flaxdet.convert import reference

    pool = reference.torchvision().ops.MultiScaleRoIAlign(["0", "1"], 2, 2)
    maps = {"0": torch.arange(5.0 * 80).reshape(1, 1, 5, 80), "1": torch.arange(3.0 * 40).reshape(1, 1, 3, 40)}
    pool(maps, [torch.tensor([[0.0, 0.0, 9.0, 9.0]])], [(17, 320)])
    assert pool.scales == [0.25, 0.125]
    pool.scales = None
    pool({name: value[:, :, :1] for name, value in maps.items()}, [torch.tensor([[0.0, 0.0, 9.0, 9.0]])], [(1, 320)])
    assert pool.scales == [1.0, 1.0]


@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (64, 1), (6, 96), (40, 64)])
def test_scales_by_hand(rows, columns):
    """A map that holds its own column numbers: the pooled value tells where the box was looked for."""
    size = jnp.asarray([[rows, columns]], jnp.int32)
    batch = ImageBatch(jnp.zeros((1, rows, columns, 3)), size, size, None)
    height, width = -(-rows // 8), -(-columns // 8)
    across = jnp.broadcast_to(jnp.arange(width, dtype=jnp.float32)[None, None, :, None], (1, height, width, 1))
    box = jnp.asarray([[[16.0, 0.0, 48.0, 8.0]]]) if columns > 8 else jnp.zeros((1, 1, 4))
    pool = MultiScaleRoIAlign(("p",), 1, 1)
    for strides in ({"p": 8}, None):
        (value,) = pool({"p": across}, box, batch, strides=strides).ravel()
        # at a scale of 1/8 the box's centre, 32, lies at 4
        assert float(value) == (4.0 if columns > 8 else 0.0)


def test_batches_that_carry_the_old_number_are_taken():
    """flaxdet 0.1.0's field, by keyword and by place; no leaf comes of it."""
    size = jnp.asarray([[32, 64]], jnp.int32)
    pixels = jnp.zeros((1, 32, 64, 3))
    plain = ImageBatch(pixels, size, size, None)
    for batch in (
        ImageBatch(pixels, size, size, None, size[:, 0]),
        ImageBatch(pixels, size, size, canvas=None, roi_reference_height=size[:, 0]),
    ):
        assert jax.tree.structure(batch) == jax.tree.structure(plain)
        jax.tree.map(np.testing.assert_array_equal, batch, plain)
        assert batch.replace(canvas=size).canvas is size  # pyright: ignore[reportAttributeAccessIssue]
    boxes = {"boxes": jnp.zeros((1, 1, 4)), "labels": jnp.zeros((1, 1), jnp.int32), "valid": jnp.zeros((1, 1), bool)}
    arrays = {"pixels": pixels, "size": size, "original_size": size, "roi_reference_height": size[:, 0], **boxes}
    images, _ = batch_inputs(tiny_model(V2_NAME), arrays)
    assert jax.tree.structure(images) == jax.tree.structure(plain)
    assert "roi_reference_height" not in shard_batch(arrays, None)
