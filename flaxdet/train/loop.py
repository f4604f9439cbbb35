"""The training loop: steps, logs, evaluation and checkpoints around a jitted train step.

It takes any step of ``make_train_step`` and any iterator of batch dicts; the allowed labels of a batch are all that it
knows of detection. To change the loop, write another around the same step.
"""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from flaxdet.train._signals import stop_requests
from flaxdet.train.first_batch import look_at_labels
from flaxdet.train.sharding import shard_batch
from flaxdet.train.state import TrainState

if TYPE_CHECKING:
    from flaxdet.train.checkpoints import Checkpoints
    from flaxdet.train.logs import Writer

Metrics = Mapping[str, Any]
_IN_FLIGHT = 2  # steps whose losses are not fetched yet, so that the host prepares batches while the device works


class ResumableBatches(Protocol):
    """An iterator of batch dicts whose position can be stored (``flaxdet.data.train_batches``)."""

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]: ...

    def __next__(self) -> dict[str, np.ndarray]: ...

    def get_state(self) -> dict[str, Any]:
        """The position after the last delivered batch, of values that JSON can hold."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Restores a position."""
        ...


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient became NaN or infinite."""


class InterruptedTrainingError(KeyboardInterrupt):
    """Training was interrupted by a signal, after a complete step.

    Attributes:
        step: the last step.
        saved: True if the state after the last step was saved.
        state: the state after the last step.
    """

    def __init__(self, step: int, saved: bool, state: TrainState):
        super().__init__(f"interrupted after step {step}" + (", which was saved" if saved else ""))
        self.step = step
        self.saved = saved
        self.state = state


def fit(
    train_step: Callable[[TrainState, Any], tuple[TrainState, Metrics]],
    state: TrainState,
    batches: ResumableBatches | Iterator[dict[str, np.ndarray]],
    *,
    steps: int,
    mesh: Mesh | None = None,
    schedule: Callable[[int], Any] | None = None,
    evaluate: Callable[[dict[str, Any], int], Mapping[str, float]] | None = None,
    evaluate_every: int | None = None,
    checkpoints: Checkpoints | None = None,
    save_every: int | None = None,
    after_save: Callable[[dict[str, Any], int], None] | None = None,
    writers: Sequence[Writer] = (),
    log_every: int = 10,
    progress: bool = True,
) -> TrainState:
    """Trains from ``state.step`` to ``steps``.

    Labels are checked against the classes of the model: for batches of ``train_batches``, the labels of the whole data
    set before the first step; for other batches, the labels of each batch before it goes to the device.

    After Ctrl-C or SIGTERM a line on stderr says what is waited for: the end of the step or of the evaluation. Then the
    state is saved, and an error is raised. A second Ctrl-C raises at once.

    The state is saved before it is evaluated, so that an evaluation that fails loses nothing. A run that ended during
    an evaluation begins with this evaluation when it is resumed.

    Args:
        train_step: the result of ``make_train_step``; it may donate the state. A custom step may have the attribute
            ``target_labels`` of the model; without it, labels are not checked.
        state: the state to begin with; for a resumed run, the restored one.
        batches: dicts of numpy arrays, in the shapes of ``train_batches``, with this process's rows. Checkpoints
            include the position in the data if there is a method ``get_state``.
        steps: number of the last step.
        mesh: the mesh that the step was made for.
        schedule: step -> learning rate, for the log.
        evaluate: ``(variables, step) -> {"AP": ..., ...}``, called every ``evaluate_every`` steps and after the last
            step; with the averaged variables if the state has them. Every number is logged; NaN for an undefined one.
            The checkpoint with the best "AP" is kept.
        evaluate_every: in steps; default only after the last.
        checkpoints: saves the state every ``save_every`` steps, before each evaluation, and at the end.
        save_every: in steps; default only with the evaluations.
        after_save: ``(variables, step)``, called after each new save (before the evaluation of that step, if there is
            one), with the variables that ``evaluate`` gets.
        writers: receive the log: losses, learning rate, images per second (of all processes), AP.
        log_every: in steps. Losses are means over these steps.
        progress: shows a bar with loss, images per second and the time left.

    Returns:
        The state after the last step.

    Raises:
        NonFiniteLossError: for a loss that is not finite, naming step, losses and images; the state is not saved.
        InterruptedTrainingError: (a KeyboardInterrupt) after Ctrl-C or SIGTERM.
        ValueError: if the batches end before the last step, or for a box with a label that the model doesn't allow,
            naming image, label and classes.
    """
    from tqdm import tqdm

    first = int(state.step)
    primary = jax.process_index() == 0
    pending: collections.deque[tuple[int, Any, Metrics]] = collections.deque()
    window = _Window(schedule)
    target_labels: range | None = getattr(train_step, "target_labels", None)
    # the batches' own, which checks the labels of the whole data set at once
    check_labels: Callable[[range], None] | None = getattr(batches, "check_labels", None)
    if target_labels is not None and check_labels is not None:
        check_labels(target_labels)
    get_state: Callable[[], dict[str, Any]] | None = getattr(batches, "get_state", None)
    advice = "; labels outside the model's classes give NaN too" if target_labels is None else ""

    def settle(keep: int = 0) -> None:
        """Waits for all but the last ``keep`` steps, and takes their losses into the log."""
        while len(pending) > keep:
            step, images, metrics = pending.popleft()
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            _check_finite(step, images, values, checkpoints, advice)
            window.add(step, values, 0 if images is None else len(images) * jax.process_count())
            bar.set_postfix(loss=f"{window.loss:.3f}", images_per_s=f"{window.speed:.1f}", refresh=False)

    saved = first  # the step of the last call of after_save

    def save(step: int, metrics: Mapping[str, float] | None = None) -> None:
        nonlocal saved
        settle()
        write(step, window.take())  # so that a run resumed from here writes the same lines
        if checkpoints is not None:
            position = {} if get_state is None else get_state()
            checkpoints.save(state, position, metrics=metrics)
            if after_save is not None and saved != step:
                saved = step
                after_save(evaluation_variables(state), step)

    def write(step: int, values: Mapping[str, float]) -> None:
        if primary and values:
            for writer in writers:
                writer.scalars(step, dict(values))

    def is_due(step: int) -> bool:
        return evaluate is not None and (step == steps or bool(evaluate_every and step % evaluate_every == 0))

    def evaluate_saved(step: int) -> None:
        assert evaluate is not None
        save(step)
        if checkpoints is not None:
            checkpoints.wait()
        stop.waiting_for = f"the evaluation of step {step}{unless_lost(', which is saved')}" if primary else None
        scores = evaluate(evaluation_variables(state), step)
        write(step, scores)
        save(step, scores)
        window.restart_clock()

    def stop_if_asked(step: int) -> None:
        if stop:
            save(step)
            if checkpoints is not None:
                checkpoints.wait()
            raise InterruptedTrainingError(step, checkpoints is not None, state)

    def unless_lost(text: str) -> str:
        return "" if checkpoints is None else text

    with (
        stop_requests() as stop,
        tqdm(total=steps, initial=first, unit="step", disable=not (progress and primary), dynamic_ncols=True) as bar,
    ):
        if first and is_due(first) and checkpoints is not None and not checkpoints.is_evaluated(first):
            evaluate_saved(first)
            stop_if_asked(first)
        for step in range(first + 1, steps + 1):
            stop.waiting_for = f"the end of step {step}{unless_lost(' and its checkpoint')}" if primary else None
            try:
                batch = next(batches)
            except StopIteration:
                raise ValueError(f"the batches ended after step {step - 1}, expected {steps}") from None
            if target_labels is not None and check_labels is None:
                look_at_labels(batch, target_labels)
            images = batch.get("image_id")
            state, metrics = train_step(state, shard_batch(batch, mesh))
            pending.append((step, images, metrics))
            settle(keep=_IN_FLIGHT)
            bar.update()
            if step % log_every == 0 or step == steps:
                settle()
                write(step, window.take())
            if is_due(step):
                evaluate_saved(step)
            elif save_every and step % save_every == 0:
                save(step)
            stop_if_asked(step)
        stop.waiting_for = "the last checkpoint" if primary and checkpoints is not None else None
        save(steps)
    if checkpoints is not None:
        checkpoints.wait()
    return state


def evaluation_variables(state: TrainState) -> dict[str, Any]:
    """The variables for evaluation and for the trained model.

    Args:
        state: the state of a run.

    Returns:
        {"params": ..., "batch_stats": ...}: the moving averages if the state has them.
    """
    if state.ema is not None:
        return state.ema
    return {"params": state.params, "batch_stats": state.batch_stats}


class _Window:
    """Means of the losses, and images per second, of the steps since the last line of the log."""

    def __init__(self, schedule: Callable[[int], Any] | None):
        self.schedule = schedule
        self.rows: list[dict[str, float]] = []
        self.step = 0
        self.loss = math.nan
        self.speed = math.nan
        self.restart_clock()

    def restart_clock(self) -> None:
        """Excludes the time until the next step is done, which includes compilation or evaluation, from the speed."""
        self.clock: float | None = None
        self.images = 0

    def add(self, step: int, values: dict[str, float], images: int) -> None:
        self.rows.append(values)
        self.step = step
        self.loss = values["loss"] if math.isnan(self.loss) else 0.9 * self.loss + 0.1 * values["loss"]
        if self.clock is None:
            self.clock = time.perf_counter()
        else:
            self.images += images
            self.speed = self.images / max(time.perf_counter() - self.clock, 1e-9)

    def take(self) -> dict[str, float]:
        """The numbers to log of the steps since the last call; empty if there was no step."""
        if not self.rows:
            return {}
        values = {name: float(np.mean([row[name] for row in self.rows])) for name in self.rows[0]}
        if self.schedule is not None:
            values["learning_rate"] = float(self.schedule(self.step - 1))
        if not math.isnan(self.speed):
            values["images_per_second"] = self.speed
        self.rows.clear()
        self.clock, self.images = time.perf_counter(), 0
        return values


def _check_finite(
    step: int, images: Any, values: Mapping[str, float], checkpoints: Checkpoints | None, advice: str
) -> None:
    bad = [f"{name} {value:g}" for name, value in values.items() if not math.isfinite(value)]
    if not bad:
        return
    named = "" if images is None else f", in the batch of images {[int(i) for i in images if i >= 0]}"
    if checkpoints is not None:
        checkpoints.wait()
    last = None if checkpoints is None else checkpoints.last
    saved = "nothing has been saved yet" if last is None else f"the last good checkpoint is of step {last}"
    raise NonFiniteLossError(
        f"step {step}: {', '.join(bad)}{named}; {saved}. A lower learning rate, a longer warm-up or clipping may help"
        f"{advice}"
    )
