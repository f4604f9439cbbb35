"""Small training states, and scripts that use them in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flaxdet.train.state import TrainState

ROOT = Path(__file__).resolve().parents[2]
_HEAD = """
import errno, os, signal, sys
from pathlib import Path
import jax
import jax.numpy as jnp
import numpy as np
from flaxdet.train.checkpoints import Checkpoints
from tests.train.states import copied, make_state, names
"""


def make_state(step: int = 0, *, seed: int = 0, ema: bool = False, classes: int = 3) -> TrainState:
    """Small, of many dtypes, with the nested named tuples of optax."""
    rng = np.random.default_rng(seed + 100 * step)

    def draw(*shape, dtype=jnp.float32):
        return jnp.asarray(rng.normal(size=shape), dtype)

    params = {
        "head": {"kernel": draw(3, 4, classes), "bias": draw(classes, dtype=jnp.bfloat16)},
        "body": {"layer1_0": {"scale": draw(5)}, "empty": {}, "none": draw(0, 3)},
    }
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(1e-3, 0.0, 10)))
    opt_state = jax.tree.map(lambda leaf: leaf + jnp.ones((), leaf.dtype), tx.init(params))
    stats = {"body": {"mean": draw(5), "flags": jnp.asarray([True, False])}}
    return TrainState(
        step=jnp.asarray(step, jnp.int32),
        params=params,
        batch_stats=stats,
        opt_state=opt_state,
        key=jax.random.key_data(jax.random.key(seed)),
        ema={"params": params, "batch_stats": stats} if ema else None,
    )


def copied(state):
    return jax.tree.map(lambda leaf: np.array(leaf), state)


def assert_same(found, expected) -> None:
    """Structure, dtypes and bits."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), path


def names(folder: Path) -> list[str]:
    """The content of a folder of checkpoints, but for the file of its lock."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def run(source: str, *arguments: object, devices: int = 1) -> str:
    """Runs a script that begins with ``_HEAD``; what it prints. Anything on stderr is a failure."""
    result = subprocess.run(
        [sys.executable, "-c", _HEAD + source, *map(str, arguments)],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    return result.stdout
