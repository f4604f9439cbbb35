"""Meshes of devices: rows of a batch over the devices, everything else on each of them.

One program serves one device, many, and many processes under ``jax.distributed``: it is written for the global batch,
and XLA divides it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA_AXIS = "data"  # the axis of a mesh over which images are divided


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of one axis, "data".

    Args:
        devices: default all, those of other processes included.

    Returns:
        The mesh.
    """
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of the state: whole on each device."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its rows divided over the devices."""
    if DATA_AXIS not in mesh.axis_names:
        raise ValueError(f'the mesh should have an axis "{DATA_AXIS}" (see make_mesh), got {mesh.axis_names}')
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def on_mesh(function: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """The function, traced with the mesh in scope, so that the models keep what is per image on the image's device."""
    if mesh is None:
        return function

    def traced(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced


def per_image(function: Callable[..., Any]) -> Callable[..., Any]:
    """``jax.vmap`` that stays on each image's own device where the batch is divided over a mesh's axis "data".

    XLA divides most of a program by images by itself, but not this: it gathers the scores of all images on every device
    for a top-k, and its NMS loops wait for the slowest image of all devices at every turn.

    Args:
        function: of one image's arrays; it closes over no traced ones.

    Returns:
        The function of all images' arrays [B, ...].
    """
    mapped = jax.vmap(function)

    def call(*args: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()  # empty unless a train step on a mesh, or the user, has set one
        rows = jax.tree.leaves(args)[0].shape[0]
        if DATA_AXIS not in mesh.auto_axes or rows % mesh.shape[DATA_AXIS]:
            return mapped(*args)
        spec = PartitionSpec(DATA_AXIS)
        return jax.shard_map(mapped, in_specs=spec, out_specs=spec, axis_names={DATA_AXIS}, check_vma=False)(*args)

    return call
