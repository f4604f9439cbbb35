"""The whole inference function lowers for every platform: what a TPU or a GPU can't compile shows here, on a CPU."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import pytest

from flaxdet import registry
from flaxdet.convert.state_dict import abstract_variables
from flaxdet.images.resize import resize_image
from flaxdet.inference.detect import detect
from flaxdet.structures import ImageBatch

pytestmark = pytest.mark.xdist_group("export")
PLATFORMS = ("cpu", "cuda", "tpu")


def array(shape: tuple[int, ...], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def abstract_batch(count: int, bucket: tuple[int, int], canvas: bool) -> ImageBatch:
    pairs: Any = array((count, 2))
    pixels: Any = array((count, *bucket, 3), jnp.float32)
    return ImageBatch(pixels, pairs, pairs, pairs if canvas else None)


def lowered(function, *args) -> jax.export.Exported:
    exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(*args)
    assert exported.platforms == PLATFORMS
    return exported


@pytest.mark.parametrize(  # the form with canvases has more operations
    "canvas", [pytest.param(False, id="whole bucket", marks=pytest.mark.ci), pytest.param(True, id="canvas")]
)
@pytest.mark.parametrize("name", registry.names())
def test_detectors_lower(name, canvas):
    """At 800x1088, weights as arguments."""
    model = registry.make_model(name, num_classes=91, small=True)
    variables = abstract_variables(model)
    exported = lowered(functools.partial(detect, model), variables, abstract_batch(2, (800, 1088), canvas))
    shapes = {leaf.shape for leaf in exported.out_avals}
    assert shapes == {(2, 100, 4), (2, 100)}
    assert len(exported.in_avals) == len(jax.tree.leaves(variables)) + (4 if canvas else 3)
    assert len(exported.mlir_module_serialized) < 5e6  # no weights inside


@pytest.mark.ci  # the test above lowers whole models in float32
@pytest.mark.parametrize("name", registry.names())
def test_bfloat16_lowers(name):
    model = registry.make_model(name, num_classes=3, small=True, dtype=jnp.bfloat16)
    lowered(functools.partial(detect, model), abstract_variables(model), abstract_batch(1, (256, 256), canvas=True))


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.float32])
def test_transform_lowers(dtype):
    resize = functools.partial(
        resize_image, bucket=(800, 1088), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), dtype=jnp.float32
    )
    exported = lowered(resize, array((640, 896, 3), dtype), array((2,)), array((2,)))
    assert [leaf.shape for leaf in exported.out_avals] == [(800, 1088, 3)]
