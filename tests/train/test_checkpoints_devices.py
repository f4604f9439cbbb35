"""Checkpoints of several devices and processes, and onto other numbers of them."""

from __future__ import annotations

import concurrent.futures
import socket

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdet.train.checkpoints import Checkpoints
from tests.train.states import assert_same, make_state, names, run

DEVICES = """
from jax.sharding import AxisType, NamedSharding, PartitionSpec
assert jax.device_count() == 8
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
place = lambda leaf: NamedSharding(mesh, PartitionSpec("data") if leaf.shape[0:1] == (8,) else PartitionSpec())
state = make_state(1).replace(params={"even": jnp.zeros((8, 2)), "odd": jnp.zeros(3)})
template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(leaf)), state)
with Checkpoints(sys.argv[1]) as checkpoints:
    state, _, _ = checkpoints.restore(template)
assert all(leaf.sharding == place(leaf) and leaf.is_fully_addressable for leaf in jax.tree.leaves(state))
step = jax.jit(lambda s: jax.tree.map(lambda leaf: leaf + jnp.ones((), leaf.dtype), s), donate_argnums=0)
state = step(state.replace(batch_stats={}))
with Checkpoints(sys.argv[2]) as checkpoints:
    checkpoints.save(state)
    step(state)
"""


def test_other_numbers_of_devices(tmp_path):
    rng = np.random.default_rng(0)
    params = {"even": jnp.asarray(rng.normal(size=(8, 2)), jnp.float32), "odd": jnp.asarray([1.0, -0.0, 3.0])}
    state = make_state(1).replace(params=params)
    with Checkpoints(tmp_path / "one") as checkpoints:
        checkpoints.save(state)
    run(DEVICES, tmp_path / "one", tmp_path / "eight", devices=8)
    state = state.replace(batch_stats={})
    expected = jax.tree.map(lambda leaf: leaf + jnp.ones((), leaf.dtype), state)
    found, _, _ = Checkpoints(tmp_path / "eight").restore(state)
    assert_same(found, expected)


PROCESSES = """
from jax.sharding import AxisType, NamedSharding, PartitionSpec
folder, port, index = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", 2, index)
assert (jax.process_count(), jax.device_count()) == (2, 4)
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
whole, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
spread = lambda tree: jax.tree.map(
    lambda leaf: jax.make_array_from_callback(
        leaf.shape, rows if leaf.shape == (8,) else whole, lambda i, leaf=np.asarray(leaf): leaf[i]
    ),
    tree,
)
states = [spread(make_state(step).replace(params={"rows": jnp.arange(8.0) + step})) for step in range(4)]
with Checkpoints(folder, config={"a": 1}) as checkpoints:
    checkpoints.save(states[1], {"place": 1}, metrics={"AP": 0.5})
    checkpoints.save(states[2], {"place": 2}, metrics={"AP": 0.4}, wait=True)
    assert (checkpoints.steps[-1], checkpoints.best) == (2, 1)
with Checkpoints(folder, config={"a": 1}) as checkpoints:
    found, place, _ = checkpoints.restore(states[0])
    assert place == {"place": 2}
    for a, b, kind in zip(*map(jax.tree.leaves, (found, states[2], states[0])), strict=True):
        assert a.sharding == kind.sharding
        for x, y in zip(a.addressable_shards, b.addressable_shards, strict=True):
            assert np.array_equal(x.data, y.data)
    checkpoints.save(states[3], {"place": 3})
jax.distributed.shutdown()
"""


@pytest.mark.ci  # other numbers of devices, above, run always
def test_two_processes_save_together(tmp_path):
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(lambda index: run(PROCESSES, tmp_path, port, index, devices=2), range(2)))
    assert names(tmp_path) == ["1", "3", "config.json"]
    state = make_state(3).replace(params={"rows": jnp.arange(8.0) + 3})
    found, place, _ = Checkpoints(tmp_path).restore(state)  # by one process
    assert place == {"place": 3}
    assert_same(found, state)
