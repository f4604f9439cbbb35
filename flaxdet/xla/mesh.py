"""Meshes of devices: the rows of a batch are divided over the devices, everything else is replicated.

One program serves one device, several devices, and several processes under ``jax.distributed``. The program is written
for the global batch, and XLA divides it.
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
        devices: default all devices, including the devices of other processes.

    Returns:
        The mesh.
    """
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of the train state: a full copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: the rows are divided over the devices."""
    if DATA_AXIS not in mesh.axis_names:
        raise ValueError(f'the mesh should have an axis "{DATA_AXIS}" (see make_mesh), got {mesh.axis_names}')
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def on_mesh(function: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """Wraps a function so that it is traced with the mesh in scope, which ``per_image`` reads."""
    if mesh is None:
        return function

    def traced(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced


def per_image(function: Callable[..., Any]) -> Callable[..., Any]:
    """``jax.vmap`` that keeps the work of each image on one device if a batch is divided over the mesh axis "data".

    XLA divides most of a program by images without help, but not a top-k and not NMS. For a top-k it gathers the scores
    of all images on every device. In NMS, every iteration of the loop waits for the slowest image of all devices.

    Args:
        function: a function of the arrays of one image; it should close over no traced arrays.

    Returns:
        The function of the arrays of all images, [B, ...] each.
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
