"""The pytrees in functions that jax.export writes, and the options of the resize."""

from __future__ import annotations

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

import flaxdet
from flaxdet.structures import TransformConfig, exportable
from tests.saved.make import pytrees, serialise
from tests.tiny import FCOS_NAME, tiny_model


def test_every_pytree_goes_through_an_exported_function():
    trees = pytrees()
    exported = jax.export.deserialize(serialise(trees))
    assert exported.in_tree == jax.tree.structure(((trees,), {}))
    found = exported.call(trees)
    assert jax.tree.structure(found) == exported.out_tree == jax.tree.structure(trees)
    for own, other in zip(jax.tree.leaves(found), jax.tree.leaves(trees), strict=True):
        np.testing.assert_array_equal(own, other)


def test_a_model_of_no_folder():
    """jax.export of ``model.apply``, as a user would write it: a batch in, detections out."""
    model = tiny_model(FCOS_NAME)
    batch = jax.eval_shape(lambda: flaxdet.ImageBatch(jnp.zeros((1, 64, 64, 3)), *[jnp.zeros((1, 2), jnp.int32)] * 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), batch)
    exported = jax.export.export(jax.jit(model.apply))(variables, batch)
    found = jax.export.deserialize(exported.serialize())
    assert found.in_tree == jax.tree.structure(((variables, batch), {}))
    assert isinstance(jax.tree.unflatten(found.out_tree, found.out_avals), flaxdet.Detections)


@exportable
@struct.dataclass
class Small:
    a: jax.Array
    b: jax.Array


@exportable
@struct.dataclass
class Grown:
    a: jax.Array
    new: jax.Array | None
    b: jax.Array


@functools.partial(exportable, dropped=("new",))
@struct.dataclass
class Pared:
    a: jax.Array
    b: jax.Array


@exportable
@struct.dataclass
class Mixed:
    b: jax.Array
    a: jax.Array


def test_fields_are_told_by_name_and_may_be_added():
    """A file of Small, read where the class has become Grown, and the other way. Wrong orders don't pass."""
    array, other = jnp.ones(2), jnp.ones(3)

    def read(tree, name: str, became: str):
        return jax.export.deserialize(serialise(tree).replace(f"flaxdet.{name}".encode(), f"flaxdet.{became}".encode()))

    found = read(Small(array, other), "Small", "Grown")
    assert found.in_tree == jax.tree.structure(((Grown(a=array, b=other, new=None),), {}))
    found = jax.tree.unflatten(found.out_tree, found.out_avals)
    assert (found.a.shape, found.b.shape, found.new) == ((2,), (3,), None)
    found = read(Grown(a=array, b=other, new=None), "Grown", "Small")
    assert found.in_tree == jax.tree.structure(((Small(array, other),), {}))
    with pytest.raises(ValueError, match=r"flaxdet\.Small: expected the fields a, b, in this order, got a, new, b"):
        read(Grown(a=array, b=other, new=array), "Grown", "Small")
    with pytest.raises(ValueError, match=r"flaxdet\.Mixed: expected the fields b, a, in this order, got a, b"):
        read(Small(array, other), "Small", "Mixed")


def test_a_function_of_an_older_file_returns_the_class_without_the_dropped_field():
    written = jax.export.export(jax.jit(lambda x: [x, Grown(a=x, new=2 * x, b=3 * x)]))(jnp.ones(2)).serialize()
    same, found = jax.export.deserialize(written.replace(b"flaxdet.Grown", b"flaxdet.Pared")).call(jnp.ones(2))
    assert isinstance(found, Pared)
    assert [x.tolist() for x in (same, found.a, found.b)] == [[1, 1], [1, 1], [3, 3]]


@pytest.mark.parametrize("given", [64, np.int64(64), [64], np.array([64])])
def test_min_size_is_one_number_or_several(given):
    assert TransformConfig(min_size=given).min_size == (64,)
