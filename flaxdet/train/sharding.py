"""Data parallelism: the rows of the batch are divided over the devices of a mesh, everything else is replicated.

The train step is written for the global batch, and XLA divides the work. So the same program runs on one device, on
many, and in many processes under ``jax.distributed``, and BatchNorm's statistics and the normalisers of the losses are
computed over the global batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from flaxdet.xla.mesh import by_rows, replicated

# The keys that the step reads; others in a batch dict, such as image_id (64 bits), stay on the host.
BATCH_KEYS = ("pixels", "size", "original_size", "canvas", "boxes", "labels", "valid")


def shard_batch(batch: Mapping[str, Any], mesh: Mesh | None) -> dict[str, jax.Array]:
    """Puts a batch on the devices.

    Args:
        batch: numpy arrays by name, this process's rows of the global batch. Keys that the step doesn't read are left
            out.
        mesh: the result of ``make_mesh``; ``None`` for the default device.

    Returns:
        Arrays in the shapes of the global batch, divided by rows.

    Raises:
        ValueError: if the number of rows is no multiple of the number of this process's devices.
    """
    arrays = {name: batch[name] for name in BATCH_KEYS if batch.get(name) is not None}
    if mesh is None:
        return jax.device_put(arrays)
    rows = len(arrays["pixels"])
    local = sum(device.process_index == jax.process_index() for device in mesh.devices.flat)
    if rows % local:
        total = f", {mesh.devices.size} in all" if mesh.devices.size != local else ""
        raise ValueError(f"a batch of {rows} images can't be divided over {local} devices{total}: make it a multiple")
    sharding = by_rows(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in arrays.items()}


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Puts a pytree on every device of a mesh.

    Args:
        tree: pytree of arrays, the same in every process.
        mesh: the result of ``make_mesh``; ``None`` leaves the arrays where they are.

    Returns:
        The pytree, replicated.

    Raises:
        ValueError, AssertionError: by jax, if the arrays differ between processes.
    """
    return tree if mesh is None else jax.device_put(tree, replicated(mesh))
