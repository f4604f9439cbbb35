"""A bit that flips in a checkpoint is an error that names the folder, or changes nothing that is restored."""

from __future__ import annotations

import os
import random

import jax.numpy as jnp
import numpy as np
import pytest

from flaxdet.train.checkpoints import Checkpoints
from tests.train.states import assert_same, make_state

CONFIG = {"epochs": 3, "seed": 0}
FLIPS = 60 if os.environ.get("FLAXDET_CI") == "release" else 6  # of each file; each flip takes two restores
# tensorstore answers late, when orbax has closed the loop it should answer to
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def restored(folder):
    """Both checkpoints, or the error."""
    try:
        with Checkpoints(folder, config=CONFIG) as checkpoints:
            return checkpoints.restore(make_state()), checkpoints.restore(make_state(), step="best")
    except (ValueError, OSError) as error:
        return str(error)


@pytest.mark.ci  # the next test, and those of a damaged description in test_checkpoints.py, run always
def test_flipped_bits_in_every_file(tmp_path):
    with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
        checkpoints.save(make_state(6), {"batches": 6}, metrics={"AP": 0.25})
        checkpoints.save(make_state(7), {"batches": 7})
        checkpoints.save(make_state(7), metrics={"AP": 0.125})  # in a file of its own
    expected = restored(tmp_path)
    assert [found[1:] for found in expected] == [
        ({"batches": 7}, {"step": 7, "metrics": {"AP": 0.125}}),
        ({"batches": 6}, {"step": 6, "metrics": {"AP": 0.25}}),
    ]
    files = [path for path in sorted(tmp_path.rglob("*")) if path.is_file() and path.stat().st_size > 0]
    assert len(files) >= 10
    rng, errors = random.Random(0), set()
    for path in files:
        whole = path.read_bytes()
        for _ in range(FLIPS):
            bit = rng.randrange(8 * len(whole))
            path.write_bytes(bytes(byte ^ (1 << bit % 8 if i == bit // 8 else 0) for i, byte in enumerate(whole)))
            found = restored(tmp_path)
            if isinstance(found, str):
                assert str(tmp_path) in found
                assert len(found.splitlines()) == 1 or "is of another model" in found, found
                errors.add(path.name)
                continue
            for (state, *rest), (good, *others) in zip(found, expected, strict=True):
                assert_same(state, good)
                assert rest == others, (path, bit)
        path.write_bytes(whole)
    assert {"config.json", "metrics.json", "_CHECKPOINT_METADATA", "manifest.ocdbt"} <= errors


def test_values_that_changed_are_named_and_the_other_checkpoint(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(1), metrics={"AP": 0.5})
        checkpoints.save(make_state(2), wait=True)
        load = checkpoints._orbax.load_checkpointables

        def flip(*arguments):
            arrays = load(*arguments)
            bias = arrays["state"]["params"]["head"]["bias"] = np.array(arrays["state"]["params"]["head"]["bias"])
            bias.view(np.uint16)[1] ^= 1
            return arrays

        monkeypatch.setattr(checkpoints._orbax, "load_checkpointables", flip)
        with pytest.raises(ValueError, match="damaged: params/head/bias changed since the save") as error:
            checkpoints.restore(make_state())
    assert str(error.value).endswith(f"To use the checkpoint of step 1, remove {tmp_path / '2'}")


def test_checksums_of_arrays_on_devices_and_hosts_are_the_same(tmp_path):
    """So that a run may go on on other devices; and a change of dtype or shape alone shows."""
    from flaxdet.files import checksums

    values = np.arange(6, dtype=np.float32)
    sums = {checksums.of_array(values), checksums.of_array(np.asarray(jnp.asarray(values)))}
    assert len(sums) == 1
    others = [values.reshape(2, 3), values.view(np.int32), values[::-1], values.reshape(2, 3).T, values[:0]]
    assert len(sums | {checksums.of_array(other) for other in others}) == 6
    assert checksums.of_array(values[::2]) == checksums.of_array(values[::2].copy())  # not contiguous
