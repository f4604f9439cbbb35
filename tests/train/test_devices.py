"""One device, eight, and two processes: the same losses, gradients, statistics and parameters."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import pytest

from flaxdet.train import shard_batch
from tests.tiny import FCOS_NAME, V2_NAME
from tests.tolerances import DEVICES_F64, DEVICES_FLOOR_F64
from tests.train.cases import random_batch

pytestmark = [pytest.mark.slow, pytest.mark.ci]  # three processes that compile what no other test can use
ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("device_worker.py")


def start(devices: int, *arguments: object) -> subprocess.Popen[str]:
    # optimised code is no part of the question, and takes long to compile
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    flags += " --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(WORKER), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Mapping[str, np.ndarray]]:
    """What the workers wrote: of one process with eight devices (on one, and on all), and of each of two."""
    folder = tmp_path_factory.mktemp("devices")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    workers = {"one": start(8, folder / "one.npz")}
    workers |= {f"process {i}": start(1, folder / f"process {i}.npz", port, 2, i) for i in range(2)}
    try:
        for name, worker in workers.items():
            output, _ = worker.communicate(timeout=500)
            assert worker.returncode == 0, f"{name}: {output[-4000:]}"
    finally:
        for worker in workers.values():
            worker.kill()
            worker.communicate()  # closes its pipe
    return {name: dict(np.load(folder / f"{name}.npz")) for name in workers}


def of(values: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}


# FCOS on several devices is compared by the two processes alone
@pytest.mark.xdist_group("devices")
@pytest.mark.parametrize(("source", "name"), [("one", V2_NAME), ("process 0", FCOS_NAME), ("process 1", FCOS_NAME)])
def test_any_devices(found, name, source):
    expected = of(found["one"], f"alone/{name}/")
    actual = of(found[source], f"mesh/{name}/")
    # sums for BatchNorm, losses and gradients are all that devices tell each other; nothing is gathered
    *others, sums = actual.pop("collectives")
    assert [text.split()[-1] for text in others] == ["0"] * 3, others
    assert int(sums.split()[-1]) > 10
    assert actual.keys() == expected.keys()
    assert len(expected) > 100
    for key, value in expected.items():
        assert value.dtype in (np.float64, np.int32), key
        error, norm = (np.linalg.norm(x) for x in (actual[key] - value, value))
        assert error <= DEVICES_F64 * norm + DEVICES_FLOOR_F64, (key, error, norm)


@pytest.mark.xdist_group("devices")
def test_uneven_batch(found):
    assert str(found["one"]["uneven"]) == "a batch of 9 images can't be divided over 8 devices: make it a multiple"


def test_mesh_without_the_axis():
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    with pytest.raises(ValueError, match='should have an axis "data"'):
        shard_batch(random_batch(2), mesh)
