from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdet.ops import AnchorGenerator
from tests.ops.cases import DTYPES, torchvision

FCOS = (((8,), (16,), (32,), (64,), (128,)), ((1.0,),) * 5)
RPN = (tuple((size,) for size in (32, 64, 128, 256, 512)), ((0.5, 1.0, 2.0),) * 5)
MANY = (((30.5, 41), (64,)), ((0.3, 1.0, 3.0), (1.7,)))
# half-pixel corners of both parities: rounding goes to the even one
HALVES = (((1, 3, 5, 7, 9, 11),), ((1.0, 0.25, 4.0),))


def torchvision_anchors(config, canvas, shapes, dtype):
    torchvision()
    import torch
    from torchvision.models.detection.anchor_utils import AnchorGenerator as Reference
    from torchvision.models.detection.image_list import ImageList

    maps = [torch.zeros(1, 1, *shape, dtype=getattr(torch, np.dtype(dtype).name)) for shape in shapes]
    image = ImageList(torch.zeros(1, 3, *canvas), [canvas])
    return Reference(*config)(image, maps)[0].numpy()


def fcos_shapes(rows, columns):
    """Grids of strides 8 to 128, each half the one before, rounded up."""
    shapes = [(rows // 8, columns // 8)]
    while len(shapes) < 5:
        shapes.append(tuple(-(-n // 2) for n in shapes[-1]))
    return shapes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("config", "canvas", "shapes"),
    [
        (FCOS, (800, 1088), fcos_shapes(800, 1088)),  # strides 61 x 64 on P6, 114 x 120 on P7
        (RPN, (96, 1344), fcos_shapes(96, 1344)),
        (RPN, (32, 32), fcos_shapes(32, 32)),
        (MANY, (64, 96), [(8, 12), (4, 6)]),
        (HALVES, (32, 32), [(2, 3)]),
    ],
)
def test_matches_torchvision_bit_for_bit(config, canvas, shapes, dtype):
    expected = torchvision_anchors(config, canvas, shapes, dtype)
    with jax.enable_x64(dtype is np.float64):
        generator = AnchorGenerator(*config)
        run = jax.jit(lambda canvas, extents: generator(canvas, extents, shapes, dtype))
        traced = run(jnp.array(canvas, jnp.int32), jnp.array(shapes, jnp.int32))
        static = jax.jit(lambda: generator(canvas, shapes, shapes, dtype))()
        for levels in (traced, static):
            assert [len(level) for level in levels] == [
                h * w * count for (h, w), count in zip(shapes, generator.num_anchors_per_location(), strict=True)
            ]
            assert all(level.dtype == dtype for level in levels)
            np.testing.assert_array_equal(np.concatenate(levels), expected)


@pytest.mark.parametrize("config", [FCOS, RPN, MANY, (((8,),), ((1.0,),))])
def test_some_anchors_of_a_level_are_those_of_torchvision(config):
    """The first, the last and repeated ones in any order, where every level has strides of its own."""
    generator, canvas = AnchorGenerator(*config), (800, 1088)
    shapes = fcos_shapes(*canvas)[-len(config[0]) :]
    expected = torchvision_anchors(config, canvas, shapes, np.float32)
    ends = np.cumsum([0] + [h * w * n for (h, w), n in zip(shapes, generator.num_anchors_per_location(), strict=True)])
    for level, (start, end) in enumerate(itertools.pairwise(ends)):
        index = np.concatenate([[end - start - 1, 0, 0], np.random.default_rng(level).permutation(end - start)[:60]])
        run = jax.jit(functools.partial(generator.at, level, shape=shapes[level]))
        found = run(jnp.asarray(index, jnp.int32), jnp.asarray(canvas), jnp.asarray(shapes[level]))
        np.testing.assert_array_equal(found, expected[start:end][index])


def test_a_bucket_changes_no_anchor_of_the_canvas():
    canvas, extents = (96, 160), fcos_shapes(96, 160)
    bucket = fcos_shapes(224, 256)
    generator = AnchorGenerator(*RPN)
    run = jax.jit(lambda: (generator(canvas, extents, bucket), generator.valid(extents, bucket)))
    alone = jax.jit(lambda: generator(canvas, extents, extents))()
    for mine, big, valid in zip(alone, *run(), strict=True):
        assert len(big) > len(mine)
        assert np.isfinite(big).all()
        np.testing.assert_array_equal(mine, np.asarray(big)[np.asarray(valid)])
    assert all(np.asarray(level).all() for level in jax.jit(lambda: generator.valid(extents, extents))())


def test_images_of_one_batch_have_their_own_strides():
    canvases = [(96, 160), (224, 256), (0, 0)]
    extents = [fcos_shapes(*canvas) for canvas in canvases]
    bucket = fcos_shapes(224, 256)
    generator = AnchorGenerator(*FCOS)

    def run(canvas, extents):
        return generator(canvas, extents, bucket), generator.valid(extents, bucket)

    anchors, valid = jax.jit(jax.vmap(run))(jnp.array(canvases, jnp.int32), jnp.array(extents, jnp.int32))
    anchors, valid = jax.tree.map(np.asarray, (anchors, valid))
    single = jax.jit(run)
    for i in range(3):
        for batched, alone in zip((anchors, valid), single(canvases[i], extents[i]), strict=True):
            for level, level_alone in zip(batched, alone, strict=True):
                np.testing.assert_array_equal(level[i], level_alone)
    # an empty slot of the batch: nothing valid, nothing infinite
    assert all(np.isfinite(level[2]).all() for level in anchors)
    assert not any(level[2].any() for level in valid)


def test_half_precision_gets_float32():
    (level,) = jax.jit(lambda: AnchorGenerator((32,), (1.0,))((64, 64), [(2, 2)], [(2, 2)], jnp.bfloat16))()
    assert level.dtype == jnp.float32


def test_flat_sequences_and_lists_as_in_torchvision():
    flat = AnchorGenerator([8, 16], [0.5, 1.0])
    assert flat.sizes == ((8,), (16,))
    assert flat.aspect_ratios == ((0.5, 1.0), (0.5, 1.0))
    assert flat == AnchorGenerator([[8], [16]], [[0.5, 1.0]] * 2)
    assert hash(flat) == hash(AnchorGenerator(((8,), (16,)), ((0.5, 1.0),) * 2))
    assert AnchorGenerator().num_anchors_per_location() == [9]


@pytest.mark.parametrize(
    ("sizes", "ratios", "message"),
    [
        (((8,), (16,)), ((1.0,),) * 3, "same levels, found 2 and 3"),
        (((8,), ()), ((1.0,),) * 2, "sizes must hold numbers above 0"),
        (((8,), (-1,)), ((1.0,),) * 2, "sizes must hold numbers above 0"),
        ((8,), ((0,),), "aspect_ratios must hold numbers above 0"),
        ((), (1.0,), "sizes must hold numbers above 0"),
    ],
)
def test_bad_configurations(sizes, ratios, message):
    with pytest.raises(ValueError, match=message):
        AnchorGenerator(sizes, ratios)


def test_number_of_levels_must_fit():
    generator = AnchorGenerator(*FCOS)
    with pytest.raises(ValueError, match="sizes for 5 levels, found 2 extents and 2 shapes"):
        generator((64, 64), [(8, 8), (4, 4)], [(8, 8), (4, 4)])
    with pytest.raises(ValueError, match="sizes for 5 levels, found 5 extents and 4 shapes"):
        generator.valid([(1, 1)] * 5, [(1, 1)] * 4)
