"""The loop around the step: what it logs, when it evaluates and saves, and how it stops."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from flaxdet.data import read_coco, train_batches
from flaxdet.train import (
    Checkpoints,
    InterruptedTrainingError,
    NonFiniteLossError,
    create_state,
    evaluation_variables,
    fit,
    make_train_step,
    sgd,
)
from flaxdet.train.logs import JsonLinesWriter, read_log
from tests.tiny import FCOS_NAME, V2_NAME, tiny_model, tiny_variables, write_coco

pytestmark = pytest.mark.xdist_group("loop")
STEPS = 8
STATE: Any = SimpleNamespace(step=0)  # for runs that end before it is needed


class Lines:
    """A writer that keeps what it is given."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.rows.append((step, values))

    def close(self) -> None:
        pass


class Training:
    """A tiny run; each call of ``fit`` begins it anew, or goes on from its checkpoints."""

    def __init__(self, folder: Any):
        self.model = tiny_model(FCOS_NAME)
        self.dataset = read_coco(*write_coco(folder, count=5))
        self.tx = sgd(0.01)
        self.step = make_train_step(self.model, self.tx)
        self.variables = tiny_variables(self.model)

    def fit(
        self, checkpoints: Checkpoints | None = None, *, step: Any = None, batches: Any = None, **options: Any
    ) -> Any:
        state = create_state(self.model, self.variables, self.tx, key=jax.random.key(2))
        place = None
        if checkpoints is not None and checkpoints.last is not None:
            state, place, _ = checkpoints.restore(state)
        if batches is None:
            batches = train_batches(self.dataset, self.model.transform, batch_size=2, steps=STEPS, seed=4)
            if place is not None:
                batches.set_state(place)
        options = {"steps": STEPS, "progress": False, **options}
        return fit(step or self.step, state, batches, checkpoints=checkpoints, **options)


@pytest.fixture(scope="module")
def training(tmp_path_factory) -> Training:
    return Training(tmp_path_factory.mktemp("data"))


def assert_same(a: Any, b: Any) -> None:
    leaves, others = jax.tree.leaves(jax.device_get(a)), jax.tree.leaves(jax.device_get(b))
    assert len(leaves) == len(others)
    for leaf, other in zip(leaves, others, strict=True):
        np.testing.assert_array_equal(leaf, other, strict=True)


def test_logs_means_rates_and_evaluations(training):
    lines, every, calls = Lines(), Lines(), []

    def evaluate(variables: dict[str, Any], step: int) -> dict[str, float]:
        calls.append((step, float(variables["params"]["backbone"]["conv0"]["bias"].sum())))
        return {"AP": step / 100}

    options = {"schedule": lambda step: 0.01 / (1 + step), "evaluate": evaluate, "evaluate_every": 3}
    state = training.fit(writers=[lines], log_every=4, **options)
    training.fit(writers=[every], log_every=1)
    assert int(state.step) == STEPS
    assert [step for step, _ in calls] == [3, 6, 8]
    assert calls[0][1] != calls[1][1]  # of the state at that moment
    losses = {step: values for step, values in lines.rows if "loss" in values}
    # also before each evaluation, so that a resumed run writes the same lines
    assert sorted(losses) == [3, 4, 6, 8]
    single = {step: values["loss"] for step, values in every.rows}
    assert losses[3]["loss"] == np.mean([single[1], single[2], single[3]])
    assert losses[4]["loss"] == single[4]
    assert losses[8]["learning_rate"] == 0.01 / 8
    assert losses[8]["images_per_second"] > 0
    assert {"classification", "bbox_regression", "bbox_ctrness", "grad_norm"} <= set(losses[8])
    assert [(step, values) for step, values in lines.rows if "AP" in values] == [
        (3, {"AP": 0.03}),
        (6, {"AP": 0.06}),
        (8, {"AP": 0.08}),
    ]


def test_saves_and_goes_on_bit_for_bit(training, tmp_path):
    expected = training.fit()
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        training.fit(checkpoints, steps=5, save_every=2)
        assert checkpoints.steps == [2, 4, 5]  # and the last
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        lines = Lines()
        assert_same(training.fit(checkpoints, save_every=2, writers=[lines], log_every=1), expected)
        assert [step for step, _ in lines.rows] == [6, 7, 8]
        assert checkpoints.last == STEPS
        assert_same(training.fit(checkpoints), expected)  # nothing left to do


def test_the_best_is_that_of_the_highest_ap(training, tmp_path):
    found = {2: 0.1, 4: 0.3, 6: 0.2, 8: 0.2}
    with Checkpoints(tmp_path) as checkpoints:
        training.fit(checkpoints, evaluate=lambda _, step: {"AP": found[step]}, evaluate_every=2)
        assert (checkpoints.best, checkpoints.last) == (4, 8)


def test_without_any_ap_the_last_is_as_good_as_the_best(training, tmp_path):
    lines = Lines()
    with Checkpoints(tmp_path) as checkpoints:
        found = {2: np.nan, 4: 0.0, 6: np.nan, 8: 0.0}
        training.fit(checkpoints, evaluate=lambda _, step: {"AP": found[step]}, evaluate_every=2, writers=[lines])
        assert (checkpoints.best, checkpoints.steps) == (None, [8])
        assert checkpoints._find("best") == 8
    assert [values["AP"] for _, values in lines.rows if "AP" in values] == pytest.approx([*found.values()], nan_ok=True)


def test_a_failing_evaluation_loses_nothing(training, tmp_path):
    """It is done first when the run is resumed: log, checkpoints and state are those of an undisturbed run."""

    def evaluate(variables: dict[str, Any], step: int) -> dict[str, float]:
        if step == broken:
            raise ValueError("a broken photo")
        return {"AP": float(np.abs(variables["params"]["backbone"]["conv0"]["bias"]).sum())}

    def run(name: str, log: JsonLinesWriter) -> tuple[Any, Checkpoints]:
        with contextlib.closing(log), Checkpoints(tmp_path / name) as checkpoints:
            options = {"evaluate": evaluate, "evaluate_every": 3, "log_every": 2, "writers": [log]}
            return training.fit(checkpoints, after_save=lambda _, step: saved.append(step), **options), checkpoints

    broken, expected = 0, None
    for name, failing in (("whole", 0), ("third", 3), ("last", 8)):
        saved: list[int] = []
        log = tmp_path / f"{name}.jsonl"
        if broken := failing:
            with pytest.raises(ValueError, match="a broken photo"):
                run(name, JsonLinesWriter(log))
            checkpoints = Checkpoints(tmp_path / name, read_only=True)
            assert (checkpoints.last, checkpoints.is_evaluated(broken)) == (broken, False)
            broken = 0
        state, checkpoints = run(name, JsonLinesWriter(log, resume_from=failing))
        rows = [{key: value for key, value in row.items() if "per_second" not in key} for row in read_log(log)]
        found = (rows, checkpoints.steps, checkpoints.best, saved)
        expected = expected or (state, found)
        assert found == expected[1], name
        assert_same(state, expected[0])
    assert saved == [3, 6, 8]
    assert [row["step"] for row in rows if "AP" in row] == [3, 6, 8]


def test_a_signal_in_an_evaluation_waits_for_it_and_says_so(training, tmp_path, capfd):
    def evaluate(variables: dict[str, Any], step: int) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGINT)
        return {"AP": 0.5}

    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(InterruptedTrainingError, match="after step 3, which was saved") as caught:
            training.fit(checkpoints, evaluate=evaluate, evaluate_every=3)
        assert (checkpoints.last, checkpoints.best) == (3, 3)
        assert_same(caught.value.state, checkpoints.restore(caught.value.state)[0])
        said = "Ctrl-C: waiting for the evaluation of step 3, which is saved; another Ctrl-C stops at once"
        assert said in capfd.readouterr().err
        checkpoints.folder.joinpath("3", "metrics.json").unlink()  # killed before the figures were saved
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(InterruptedTrainingError, match="after step 3"):  # evaluates first, and stops at once
            training.fit(checkpoints, evaluate=evaluate, evaluate_every=3)
        with pytest.raises(InterruptedTrainingError, match="after step 6"):
            training.fit(checkpoints, evaluate=evaluate, evaluate_every=3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops_after_the_step(training, tmp_path, number, capfd):
    expected = training.fit()
    taken = 0

    def interrupted(state: Any, batch: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == 3:
            os.kill(os.getpid(), number)  # in the middle of a step
        return training.step(state, batch)

    usual = signal.getsignal(number)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(InterruptedTrainingError, match="interrupted after step 3, which was saved") as caught:
            training.fit(checkpoints, step=interrupted)
        assert (caught.value.step, caught.value.saved, checkpoints.last) == (3, True, 3)
        assert isinstance(caught.value, KeyboardInterrupt)
        assert_same(training.fit(checkpoints), expected)
    assert signal.getsignal(number) is usual
    name = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}[number]
    assert f"{name}: waiting for the end of step 3 and its checkpoint; another" in capfd.readouterr().err


def test_a_second_ctrl_c_stops_at_once(training):
    def interrupted(state: Any, batch: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return training.step(state, batch)

    with pytest.raises(KeyboardInterrupt) as caught:
        training.fit(step=interrupted)
    assert not isinstance(caught.value, InterruptedTrainingError)


def test_nan_stops_names_the_batch_and_keeps_the_last_good_checkpoint(training, tmp_path):
    dataset, model = training.dataset, training.model

    def batches(steps: int = STEPS) -> Any:
        for i, batch in enumerate(train_batches(dataset, model.transform, batch_size=2, steps=steps, seed=4), 1):
            if i == 4:
                batch["pixels"] = np.full_like(batch["pixels"], np.nan)
                poisoned.append(batch["image_id"].tolist())
            yield batch

    poisoned: list[list[int]] = []
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(NonFiniteLossError) as caught:
            training.fit(checkpoints, batches=batches(), save_every=2)
        message = str(caught.value)
        assert message.startswith("step 4: ")
        for part in ("loss nan", f"images {poisoned[0]}", "the last good checkpoint is of step 2"):
            assert part in message
        assert checkpoints.last == 2
    with pytest.raises(NonFiniteLossError, match="nothing has been saved yet"):
        training.fit(batches=batches())


def test_too_few_batches(training):
    batches = train_batches(training.dataset, training.model.transform, batch_size=2, steps=3)
    with pytest.raises(ValueError, match="the batches ended after step 3, expected 8"):
        training.fit(batches=batches)


def test_any_iterator_of_batch_dicts_will_do(training, tmp_path):
    batch = next(iter(train_batches(training.dataset, training.model.transform, batch_size=2, steps=1)))
    del batch["image_id"]
    with Checkpoints(tmp_path) as checkpoints:
        state = training.fit(checkpoints, batches=iter([batch] * STEPS))
        assert checkpoints.last == int(state.step) == STEPS


def test_labels_that_the_model_lacks_stop_before_the_first_step(training):
    """Three categories and a model of three classes: the background was forgotten."""
    model = tiny_model(V2_NAME, num_classes=3)
    batches = train_batches(training.dataset, model.transform, batch_size=2, steps=2)
    dataset = training.dataset
    at = next((i, box) for i in range(len(dataset)) for box, label in enumerate(dataset[i].labels) if label == 3)
    record = dataset[at[0]]
    said = (
        f'{record.path} (image_id {record.image_id}), box {at[1]}, "blue": label 3 should be from 1 to 2: num_classes=3'
    )
    with pytest.raises(ValueError, match=re.escape(said)):
        fit(make_train_step(model, training.tx), STATE, batches, steps=2, progress=False)
    assert batches.get_state()["batches"] == 0


def test_batches_of_ones_own_are_looked_at_one_by_one(training):
    def step(state: Any, batch: Any) -> Any:
        return state, {"loss": 1.0}

    def batches() -> Any:
        for i, batch in enumerate(train_batches(training.dataset, training.model.transform, batch_size=2, steps=3)):
            batch["labels"][~batch["valid"]] = 77
            if i == 2:
                batch["labels"][1, 0] = -1
                asked.append(int(batch["image_id"][1]))
            yield batch

    asked: list[int] = []
    step.target_labels = training.model.target_labels
    with pytest.raises(ValueError, match="label -1 should be from 0 to 3") as caught:
        fit(step, STATE, batches(), steps=3, progress=False)
    assert str(caught.value).startswith(f"image_id {asked[0]}, box 0: ")


def test_a_step_that_does_not_know_its_labels(training):
    batches = train_batches(training.dataset, training.model.transform, batch_size=2, steps=1)
    with pytest.raises(NonFiniteLossError, match="clipping may help; labels outside the model's classes give NaN too"):
        fit(lambda state, batch: (state, {"loss": np.nan}), STATE, batches, steps=1, progress=False)


@pytest.mark.ci  # test_step.py has the averages, and test_checkpoints.py their way there and back
def test_averages_are_what_is_evaluated(training):
    state = create_state(training.model, training.variables, training.tx, key=jax.random.key(0), ema=True)
    step = make_train_step(training.model, training.tx, ema_decay=0.5)
    batches = train_batches(training.dataset, training.model.transform, batch_size=2, steps=2)
    seen = []
    state = fit(
        step,
        state,
        batches,
        steps=2,
        evaluate=lambda variables, _: seen.append(jax.device_get(variables)) or {"AP": 0.0},
        progress=False,
    )
    assert_same(seen[0], state.ema)
    assert_same(evaluation_variables(state), state.ema)
    plain = {"params": state.params, "batch_stats": state.batch_stats}
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(state.ema), strict=True))
