"""Data parallelism: rows of the batch over the devices of a mesh, everything else on each of them.

One program serves one device, many, and many processes under ``jax.distributed``: the train step is written for the
global batch, and XLA divides it. So BatchNorm's statistics and the normalisers of the losses are the global batch's
without further ado.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flaxdet.models.detector import DATA_AXIS

# What the step reads; anything else in a batch dict, such as image_id (64 bits), stays on the host.
BATCH_KEYS = ("pixels", "size", "original_size", "canvas", "boxes", "labels", "valid")


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


def shard_batch(batch: Mapping[str, Any], mesh: Mesh | None) -> dict[str, jax.Array]:
    """Puts a batch on the devices.

    Args:
        batch: numpy arrays by name, this process's rows of the global batch. Names that the step has no use for are
            left out.
        mesh: of ``make_mesh``; ``None`` for the default device.

    Returns:
        Arrays in the shapes of the global batch, divided by rows.

    Raises:
        ValueError: if this process's devices don't divide its rows.
    """
    kept = {name: batch[name] for name in BATCH_KEYS if batch.get(name) is not None}
    if mesh is None:
        return jax.device_put(kept)
    rows = len(kept["pixels"])
    local = sum(device.process_index == jax.process_index() for device in mesh.devices.flat)
    if rows % local:
        total = f", {mesh.devices.size} in all" if mesh.devices.size != local else ""
        raise ValueError(f"a batch of {rows} images can't be divided over {local} devices{total}: make it a multiple")
    sharding = by_rows(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in kept.items()}


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Puts a pytree on every device of a mesh.

    Args:
        tree: arrays, the same in every process.
        mesh: of ``make_mesh``; ``None`` leaves everything where it is.

    Returns:
        The same, replicated.

    Raises:
        ValueError, AssertionError: by jax, where the processes' arrays differ.
    """
    return tree if mesh is None else jax.device_put(tree, replicated(mesh))
