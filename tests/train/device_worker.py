"""Trains tiny detectors for two steps and writes losses, gradients and the state; run by test_devices.py.

python device_worker.py OUT.npz [PORT PROCESS_COUNT PROCESS]

Alone, a process trains Faster R-CNN on one device and on all: it has all that devices tell each other, BatchNorm in the
box head too, and sampling. It trains FCOS on one device, for comparison with two processes that train FCOS on a device
each, where each process gives its own images.
"""

from __future__ import annotations

import sys
from typing import Any

import jax
import numpy as np
import optax

from flaxdet.convert.state_dict import abstract_variables
from flaxdet.train import create_state, make_mesh, make_train_step, replicate, sgd, shard_batch
from tests.drawn import drawn
from tests.tiny import FCOS_NAME, V2_NAME
from tests.train.cases import random_batch, tiny_with_norm

ROWS = 8


def recorder() -> optax.GradientTransformation:
    """Keeps the last gradient in the optimiser's state."""
    return optax.GradientTransformation(lambda params: params, lambda updates, state, params=None: (updates, updates))


def my_batch(seed: int, dtype: Any, mesh: Any) -> dict[str, jax.Array]:
    share = ROWS // jax.process_count()
    mine = slice(share * jax.process_index(), share * (jax.process_index() + 1))
    batch = random_batch(ROWS, seed=seed, canvases=True, dtype=dtype)
    return shard_batch({key: value[mine] for key, value in batch.items()}, mesh)


def train(model: Any, variables: Any, mesh: Any) -> dict[str, Any]:
    """Two steps in float64."""
    tx = optax.chain(recorder(), sgd(0.01, weight_decay=1e-4))
    state = replicate(create_state(model, variables, tx, key=jax.random.key(3), ema=True), mesh)
    step = make_train_step(model, tx, mesh=mesh, ema_decay=0.9).lower(state, my_batch(0, np.float64, mesh)).compile()
    found: dict[str, Any] = {}
    if mesh is not None:
        names = ("all-gather", "all-to-all", "collective-permute", "all-reduce")
        found["collectives"] = [f"{name} {step.as_text().count(name + '(')}" for name in names]
    for i in range(2):
        state, metrics = step(state, my_batch(i, np.float64, mesh))
        found |= {f"loss{i}/{key}": np.asarray(value) for key, value in metrics.items()}
        gradients = jax.tree_util.tree_leaves_with_path(state.opt_state[0])
        found |= {f"gradient{i}{jax.tree_util.keystr(path)}": np.asarray(leaf) for path, leaf in gradients}
    kept = {"params": state.params, "batch_stats": state.batch_stats, "ema": state.ema}
    for path, leaf in jax.tree_util.tree_leaves_with_path(kept):
        found[f"state{jax.tree_util.keystr(path)}"] = np.asarray(leaf)
    return found


def on_each(meshes: dict[str, Any], name: str) -> dict[str, Any]:
    """What training finds on each mesh, from the same variables."""
    model = tiny_with_norm(name, np.float64)
    variables = drawn(abstract_variables(model))
    found: dict[str, Any] = {}
    for kind, mesh in meshes.items():
        found |= {f"{kind}/{name}/{key}": value for key, value in train(model, variables, mesh).items()}
    return found


def main() -> None:
    out, *cluster = sys.argv[1:]
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    if cluster:
        port, count, process = cluster
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(process))
        assert jax.process_count() == int(count)
    found: dict[str, Any] = {}
    mesh, alone = {"mesh": make_mesh()}, {"alone": None}
    with jax.enable_x64(True):
        for name, meshes in {FCOS_NAME: mesh if cluster else alone, V2_NAME: {} if cluster else mesh | alone}.items():
            found |= on_each(meshes, name)
    if not cluster:
        try:
            shard_batch(random_batch(ROWS + 1), mesh["mesh"])
        except ValueError as error:
            found["uneven"] = str(error)
    np.savez(out, **found)


if __name__ == "__main__":
    main()
