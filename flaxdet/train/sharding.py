"""Data parallelism: rows of the batch over the devices of a mesh, everything else on each of them.

One program serves one device, many, and many processes under ``jax.distributed``: the train step is written for the
global batch, and XLA divides it. So BatchNorm's statistics and the normalisers of the losses are the global batch's
without further ado.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from flaxdet.xla.mesh import by_rows, replicated

# What the step reads; anything else in a batch dict, such as image_id (64 bits), stays on the host.
BATCH_KEYS = ("pixels", "size", "original_size", "canvas", "boxes", "labels", "valid")


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
