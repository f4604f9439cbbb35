"""Extents and anchors of the pyramid's levels, where a canvas may be smaller than the bucket."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from flaxdet.nn.canvas import level_extent
from flaxdet.nn.fpn import Features
from flaxdet.nn.layers import Array, Dtype
from flaxdet.ops import AnchorGenerator
from flaxdet.structures import ImageBatch
from flaxdet.xla.mesh import per_image

Extents = dict[str, Int[Array, "B 2"]] | None
Shapes = tuple[tuple[int, int], ...]


def level_shapes(features: Features) -> Shapes:
    """(h, w) of every map."""
    return tuple((x.shape[1], x.shape[2]) for x in features.values())


def feature_extents(features: Features, batch: ImageBatch) -> Extents:
    """(rows, columns) of each map inside each canvas, {name: [B, 2] int32}; ``None`` for the whole maps."""
    canvas = batch.canvas
    if canvas is None:
        return None
    bucket = batch.pixels.shape[1:3]
    return {name: level_extent(canvas, bucket, x.shape[1:3]) for name, x in features.items()}


def filled_extents(
    generator: AnchorGenerator, batch: ImageBatch, shapes: Shapes
) -> tuple[Int[Array, "B 2"], Int[Array, "B L 2"]]:
    """Sizes of each canvas and of the canvas's part of each feature map. Unlike ``feature_extents``, never None.

    Args:
        generator: generator of the anchors.
        batch: the images, whose canvases are read.
        shapes: (h, w) of each level's map.

    Returns:
        [B, 2] (rows, columns) of each canvas in pixels, and [B, L, 2] (rows, columns) of the canvas on each of the L
        maps in cells; int32.

    Raises:
        ValueError: if the generator has another number of levels.
    """
    generator.check_levels(shapes, shapes)
    count, bucket, canvas = batch.pixels.shape[0], batch.pixels.shape[1:3], batch.canvas
    if canvas is None:
        canvas = jnp.broadcast_to(jnp.asarray(bucket, jnp.int32)[None], (count, 2))
        return canvas, jnp.broadcast_to(jnp.asarray(shapes, jnp.int32)[None], (count, len(shapes), 2))
    return canvas, jnp.stack([level_extent(canvas, bucket, shape) for shape in shapes], axis=1)


def batch_anchors(
    generator: AnchorGenerator, batch: ImageBatch, shapes: Shapes, dtype: Dtype
) -> tuple[tuple[Float[Array, "B n 4"], ...], tuple[Bool[Array, "B n"], ...]]:
    """The anchors of each level, for each image.

    Args:
        generator: generator of the anchors.
        batch: the images, whose canvases are read.
        shapes: (h, w) of each level's map.
        dtype: dtype of the anchors.

    Returns:
        For each level the anchors, xyxy in pixels of each canvas, and a mask, True for the anchors inside the canvas.
    """

    def image(canvas: Array, extents: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        return generator(canvas, extents, shapes, dtype), generator.valid(extents, shapes)

    return per_image(image)(*filled_extents(generator, batch, shapes))
