"""Checkpoints: the same bits back, on any number of devices, whatever dies in between."""

from __future__ import annotations

import json
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdet.train.checkpoints import Checkpoints
from tests.train.states import assert_same, copied, make_state, names

# ---------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("wanted", ["arrays", "abstract", "numpy"])
def test_the_same_bits_come_back(tmp_path, ema, wanted):
    state, place = make_state(7, ema=ema), {"epoch": 2, "index": 2**60, "nested": {"list": [1, 2.5, None, "a"]}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, place, metrics={"AP": np.float32(0.25), "AP50": 0.5})
    template = {
        "arrays": lambda: make_state(seed=3, ema=ema),
        "abstract": lambda: jax.eval_shape(lambda: make_state(ema=ema)),
        "numpy": lambda: copied(make_state(ema=ema)),
    }[wanted]()
    with Checkpoints(tmp_path) as checkpoints:
        found, place_found, info = checkpoints.restore(template)
    assert_same(found, state)
    assert place_found == place
    assert info == {"step": 7, "metrics": {"AP": 0.25, "AP50": 0.5}}
    kind = np.ndarray if wanted == "numpy" else jax.Array
    assert all(isinstance(leaf, kind) for leaf in jax.tree.leaves(found))


def test_float64_stays_float64(tmp_path, x64):
    state = make_state(1).replace(params={"a": jnp.arange(5.0, dtype=jnp.float64) / 7, "b": jnp.asarray(2**40)})
    assert state.params["a"].dtype == np.float64
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, wait=True)
        found, _, _ = checkpoints.restore(state)
    assert_same(found, state)


def test_float64_without_x64_is_an_error(tmp_path):
    with jax.enable_x64(True), Checkpoints(tmp_path) as checkpoints:
        state = make_state(1).replace(params={"a": jnp.arange(5.0, dtype=jnp.float64)})
        checkpoints.save(state, wait=True)
    with pytest.raises(ValueError, match=r"params/a is float64, which jax has only with jax_enable_x64"):
        Checkpoints(tmp_path).restore(state)


def test_uncommitted_arrays_stay_free_to_move(tmp_path):
    state = make_state(1)
    pinned = jax.device_put(state, jax.devices()[0])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, wait=True)
        free, _, _ = checkpoints.restore(state)
        fixed, _, _ = checkpoints.restore(pinned)
    assert not any(leaf.committed for leaf in jax.tree.leaves(free))
    assert all(leaf.committed for leaf in jax.tree.leaves(fixed) if leaf.size)


def test_a_donated_step_right_after_does_not_reach_the_checkpoint(tmp_path):
    state = make_state(1).replace(params={"big": jnp.arange(2_000_000.0)})
    expected = copied(state)
    step = jax.jit(lambda s: jax.tree.map(lambda leaf: leaf * jnp.asarray(0, leaf.dtype), s), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        state = jax.block_until_ready(step(state))
    with Checkpoints(tmp_path) as checkpoints:
        found, _, _ = checkpoints.restore(state)
        assert_same(found, expected)
        kept = copied(found)
        jax.block_until_ready(step(found))  # what was restored can be donated too
        again, _, _ = checkpoints.restore(state)
        assert_same(again, kept)


def test_orbax_reads_it_alone(tmp_path):
    from orbax.checkpoint import v1 as ocp

    state = make_state(2)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
    with pytest.warns(UserWarning, match="Sharding info not provided"):
        plain = ocp.load(tmp_path / "2", checkpointable_name="state")
    assert np.array_equal(plain["params"]["head"]["kernel"], state.params["head"]["kernel"])
    assert set(plain) == {"step", "params", "batch_stats", "opt_state", "key"}


# ----------------------------------------------------------------------------------------------- which are kept


@pytest.mark.parametrize(
    ("keep", "scores", "kept", "best"),
    [
        (1, [None, None, None], [3], None),
        (2, [None, None, None], [2, 3], None),
        (1, [0.1, 0.3, 0.2], [2, 3], 2),
        (1, [0.3, 0.3, 0.3], [1, 3], 1),
        (1, [0.1, 0.2, 0.3], [3], 3),
        (1, [0.3, None, 0.2, None], [1, 4], 1),
        (1, [None, float("nan"), None], [3], None),
        (1, [0.0, 0.0, 0.0], [3], None),  # AP 0 throughout: the last is as good as any
        (1, [0.0, 0.1, 0.0], [2, 3], 2),
        (3, [0.5, 0.1, 0.2, 0.3, 0.4], [1, 3, 4, 5], 1),
    ],
)
def test_the_last_and_the_best_are_kept(tmp_path, keep, scores, kept, best):
    with Checkpoints(tmp_path, keep=keep) as checkpoints:
        assert (checkpoints.last, checkpoints.best) == (None, None)
        for step, score in enumerate(scores, 1):
            checkpoints.save(make_state(step), metrics=None if score is None else {"AP": score, "AP50": 1.0})
        checkpoints.close()
        assert (checkpoints.steps, checkpoints.last, checkpoints.best) == (kept, len(scores), best)
    again = Checkpoints(tmp_path, keep=keep)  # and read back from the disk
    assert (again.steps, again.last, again.best) == (kept, len(scores), best)
    if best is not None:
        found, _, info = again.restore(make_state(), step="best")
        assert_same(found, make_state(best))
        assert info["step"] == best


def test_metrics_other_than_ap_choose_no_best(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(1), metrics={"loss": 0.1}, wait=True)
        assert checkpoints.best is None


def test_a_step_that_is_saved_takes_metrics_later(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(1), {"a": 1}, wait=True)
        checkpoints.save(make_state(1), {"a": 1})  # nothing to do
        checkpoints.save(make_state(1), metrics={"AP": 0.5})
        assert checkpoints.best == 1
    _, place, info = Checkpoints(tmp_path).restore(make_state())
    assert place == {"a": 1}
    assert info == {"step": 1, "metrics": {"AP": 0.5}}


def test_resume_goes_on_in_the_same_folder(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(1), metrics={"AP": 0.5})
        checkpoints.save(make_state(2))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.restore(make_state())
        checkpoints.save(make_state(3), metrics={"AP": 0.4})
    assert names(tmp_path) == ["1", "3"]


# ---------------------------------------------------------------------------------------------------- bad input


def test_a_folder_of_another_run_is_not_written_to(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(make_state(1), metrics={"AP": 0.5})
        checkpoints.save(make_state(2))
    fresh = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        with pytest.raises(ValueError, match=r"holds checkpoints of another run, up to step 2; resume it"):
            fresh.save(make_state(step))
    fresh.restore(make_state(), step=1)
    with pytest.raises(ValueError, match=r"a run that went on from step 1, up to step 2"):
        fresh.save(make_state(3))
    assert names(tmp_path) == ["1", "2"]


def test_missing_checkpoints(tmp_path):
    checkpoints = Checkpoints(tmp_path / "a" / "b")
    with pytest.raises(FileNotFoundError, match=r"a/b: holds no whole checkpoint"):
        checkpoints.restore(make_state())
    checkpoints.save(make_state(4), wait=True)
    with pytest.raises(FileNotFoundError, match=r"holds no step 3, only 4"):
        checkpoints.restore(make_state(), step=3)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint was evaluated"):
        checkpoints.restore(make_state(), step="best")


def test_other_options_are_named_with_both_values(tmp_path):
    options = {"model": "fcos", "optimiser": {"lr": 0.01, "steps": (2, 3)}, "gone": None}
    with Checkpoints(tmp_path, config=options) as checkpoints:
        checkpoints.save(make_state(1))
    assert json.loads((tmp_path / "config.json").read_text())["optimiser"] == {"lr": 0.01, "steps": [2, 3]}
    Checkpoints(tmp_path, config=options).restore(make_state())
    Checkpoints(tmp_path).restore(make_state())  # without options nothing is compared
    other = {"model": "fcos", "optimiser": {"lr": 0.02, "steps": [2, 3]}, "new": [1]}
    with pytest.raises(ValueError, match="other options") as error:
        Checkpoints(tmp_path, config=other).restore(make_state())
    assert "gone was null, is absent; new was absent, is [1]; optimiser.lr was 0.01, is 0.02." in str(error.value)
    assert not any(same in str(error.value) for same in ("model", "steps"))


def test_options_of_a_run_that_saved_nothing_do_not_bind(tmp_path):
    (tmp_path / "config.json").write_text('{"lr": 1}')
    with Checkpoints(tmp_path, config={"lr": 2}) as checkpoints:
        checkpoints.save(make_state(1))
    Checkpoints(tmp_path, config={"lr": 2}).restore(make_state())


def test_another_structure_is_told_in_a_few_lines(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(1, ema=True), wait=True)
        with pytest.raises(ValueError, match="of another model, class count or optimiser") as error:
            checkpoints.restore(make_state(classes=5).replace(batch_stats={"new": jnp.zeros(2)}))
    text = str(error.value)
    assert len(text.splitlines()) <= 14
    assert "opt_state/1/0/mu/head/bias: bfloat16[3] stored, bfloat16[5] here" in text
    assert "6 differ, among them:" in text
    assert "ema/batch_stats/body/flags: bool[2]" in text
    assert "1 are expected, but not stored:\n    batch_stats/new: float32[2]" in text


def test_another_dtype_is_no_match(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(1), wait=True)
        with pytest.raises(ValueError, match=r"step: int32\[\] stored, uint32\[\] here"):
            checkpoints.restore(make_state().replace(step=jnp.uint32(0)))


def test_what_cannot_be_stored(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(TypeError, match="params/a must be a jax or numpy array, got str"):
        checkpoints.save(make_state(1).replace(params={"a": "text"}))
    with pytest.raises(TypeError, match="key is a typed random key"):
        checkpoints.save(make_state(1).replace(key=jax.random.key(0)))
    with pytest.raises(TypeError, match="data_state must be what JSON can hold"):
        checkpoints.save(make_state(1), {"a": np.zeros(2)})
    with pytest.raises(TypeError, match="config must be what JSON can hold"):
        Checkpoints(tmp_path, config={"a": object()})
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        Checkpoints(tmp_path, keep=0)
    assert names(tmp_path) == []


# tensorstore answers late, when orbax has closed the loop it should answer to
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["array", "all arrays", "metadata", "truncated metadata"])
def test_a_damaged_checkpoint_is_one_line(tmp_path, damage):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(1))
    if damage == "array":
        for path in tmp_path.glob("1/state/**/d/*"):
            path.write_bytes(path.read_bytes()[:20])
    elif damage == "all arrays":
        shutil.rmtree(tmp_path / "1" / "state")
    elif damage == "metadata":
        (tmp_path / "1" / "_CHECKPOINT_METADATA").unlink()
    else:
        (tmp_path / "1" / "_CHECKPOINT_METADATA").write_text('{"custom')
    with pytest.raises((ValueError, OSError), match="the checkpoint of step 1") as error:
        Checkpoints(tmp_path).restore(make_state())
    time.sleep(0.2)
    assert len(str(error.value).splitlines()) == 1
    assert str(tmp_path) in str(error.value)
