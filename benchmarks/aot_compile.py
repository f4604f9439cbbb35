"""Compiles one program for a device that isn't there; ``aot.py`` starts it in a process that sees the compilers.

    python benchmarks/aot_compile.py OPTIONS-AS-JSON FOLDER

Writes program.hlo and facts.json into the folder.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from aot_devices import DEVICES, Device
from jax.experimental import topologies
from jax.sharding import Mesh

from flaxdet.images.transform import transform, transform_targets
from flaxdet.inference.detect import detect
from flaxdet.inference.folded import folded
from flaxdet.models.initial import initial_variables
from flaxdet.registry import make_model
from flaxdet.train import create_state, make_mesh, make_train_step, sgd, shard_batch
from flaxdet.xla.layouts import weight_format
from flaxdet.xla.mesh import by_rows, on_mesh, replicated
from flaxdet.xla.routes import routes_for

CLASSES = 91
MAX_BOXES = 100  # of an image's targets: 93 in COCO


def mesh_of(device: Device, count: int) -> Mesh:
    """A mesh of the first ``count`` devices."""
    topology = topologies.get_topology_desc(platform=device.platform, **device.topology)
    return make_mesh(topology.devices[:count])


def abstract(tree: Any, batch: int | None = None) -> Any:
    """Shapes in place of arrays; where ``batch`` is given, with that many rows."""
    rows = lambda x: x.shape if batch is None else (batch, *x.shape[1:])  # noqa: E731
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(rows(x), x.dtype), tree)


def make(asked: dict[str, Any], mesh: Mesh) -> tuple[Any, Any, tuple[Any, ...], tuple[int, ...]]:
    """The model and its program, whose second argument is the batch.

    Args:
        asked: the options of ``aot.py``.
        mesh: the devices over which the batch is divided.

    Returns:
        The model, a function, its arguments as shapes, and the numbers of the arguments that are donated.
    """
    rows, columns = asked["size"]
    geometry = {"min_size": min(rows, columns), "max_size": max(rows, columns)}
    model: Any = make_model(asked["model"], num_classes=CLASSES, dtype=jnp.dtype(asked["dtype"]), **geometry)
    if asked["depth"] != 50:
        backbone: Any = model.backbone
        model = model.clone(backbone=backbone.clone(body=backbone.body.clone(depth=asked["depth"])))
    variables = jax.eval_shape(functools.partial(initial_variables, model), jax.random.key(0))
    # where every canvas fills its bucket, no masks are traced
    images = transform([np.zeros((rows, columns, 3), np.uint8)], model.transform, bucket=(rows, columns))
    if images.canvas is not None:
        raise ValueError(f"size should be a multiple of {model.transform.size_divisible}, got {rows}x{columns}")
    if asked["masked"]:
        images = dataclasses.replace(images, canvas=images.size)  # pyright: ignore[reportArgumentType]
    if asked["program"] == "infer":
        ones = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), variables)
        model, variables = folded(model, ones)
        return (
            model,
            on_mesh(functools.partial(detect, model), mesh),
            (abstract(variables), abstract(images, asked["batch"])),
            (),
        )
    tx = sgd(0.01, momentum=0.9, weight_decay=1e-4)
    state = jax.eval_shape(lambda v: create_state(model, v, tx, key=jax.random.key(0)), variables)
    truth = {"boxes": np.zeros((0, 4), np.float32), "labels": np.zeros(0, np.int64)}
    targets = transform_targets([truth], images, model=model, max_boxes=MAX_BOXES)
    arrays = shard_batch({**vars(images), **vars(targets)}, None)
    step: Any = make_train_step(model, tx)
    return model, on_mesh(step.__wrapped__, mesh), (state, abstract(arrays, asked["batch"])), (0,)


def main() -> None:
    """Compiles and writes."""
    asked, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    device = DEVICES[asked["device"]]
    mesh = mesh_of(device, asked["devices"])
    whole, rows = replicated(mesh), by_rows(mesh)
    out = rows if asked["program"] == "infer" else whole
    with routes_for(device.routes):
        _, function, args, donated = make(asked, mesh)
        weights = whole  # of the train state, or of the weights in the layout that ``folded`` gives them
        if asked["program"] == "infer":
            weights = jax.tree.map(lambda x: weight_format(x.shape, whole), args[0])

        def aot_program(*args: Any) -> Any:  # the name by which XLA dumps it
            return function(*args)

        jitted = jax.jit(aot_program, in_shardings=(weights, rows), out_shardings=out, donate_argnums=donated)
        start = time.perf_counter()
        lowered = jitted.lower(*args)
        lowering = time.perf_counter() - start
    start = time.perf_counter()
    compiled = lowered.compile(device.options)
    memory: Any = compiled.memory_analysis()
    costs: Any = compiled.cost_analysis() or {}
    facts = {
        "lower_seconds": round(lowering, 1),
        "compile_seconds": round(time.perf_counter() - start, 1),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", *device.packages)},
        "memory": {
            name: getattr(memory, f"{name}_size_in_bytes")
            for name in ("argument", "output", "alias", "temp", "generated_code")
        },
        "costs": {name: costs[name] for name in ("flops", "bytes accessed") if name in costs},
    }
    (folder / "program.hlo").write_text(compiled.as_text() or "")
    (folder / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
