"""Checkpoints of a training run: the last and the best, written in the background, and atomically.

    run/checkpoints/
      .lock           held by the process that writes
      config.json     the options of the run at the first save
      images.json     size, date and checksum of each image of ``flaxdet train`` at the first step
      1200/           orbax's checkpoint of step 1200: state, position in the data, metrics; the best here
      1500/           the last; by default only the last and the best are kept
      1600.orbax-checkpoint-tmp/    being written; renamed to 1600 when complete, removed at the next start if not

Without this module ``orbax.checkpoint.v1.load(folder / "1500", checkpointable_name="state")`` gives the arrays.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax

from flaxdet.files import checksums
from flaxdet.files.checkpoint import CheckpointError
from flaxdet.train import _files, _note, _stored
from flaxdet.train._lock import FolderLock, LockedError

State = TypeVar("State")
Metrics = Mapping[str, float]

_STATE = "state"
_LEFTOVER = re.compile(r"\d+\.(orbax-checkpoint-tmp|removed)|\.(config|images)\.json\.\w+\.tmp")


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoints of one run, in one folder.

    A save continues in the background while training goes on; an error in the background is raised by the next
    ``save``, ``restore``, ``wait`` or ``close``. Whenever the process dies, the folder holds the last complete
    checkpoint and the best: a checkpoint gets its name when it is complete, and only then are older ones removed. Each
    array has a checksum, which ``restore`` checks.

    One object at a time may write to a folder: it has a lock until ``close``, or until its process ends.

    With several processes (``jax.distributed``), each process makes a ``Checkpoints`` on the same shared folder, and
    all processes must call each method together. The first process alone writes config and metrics and removes files.

    Attributes:
        folder: the folder of the checkpoints.
        keep: number of last checkpoints that are kept, besides the best.
        config: the options of the run, as JSON gives them back; ``None`` for no comparison.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep: int = 1,
        config: Mapping[str, Any] | None = None,
        read_only: bool = False,
    ):
        """Opens or makes a folder, locks it, and removes the incomplete files of a run that was killed.

        Args:
            folder: for checkpoints alone.
            keep: number of last checkpoints to keep.
            config: options of the run, of values that JSON can hold. ``restore`` compares them with the stored ones.
            read_only: only for ``restore``, also while another process writes to the folder: takes no lock, makes and
                removes nothing. ``save`` then raises an error.

        Raises:
            ImportError: if orbax is not installed.
            ValueError: if ``keep`` is below 1.
            TypeError: if JSON cannot hold ``config``.
            OSError: if another process, or an object of this process that is not closed, writes to the folder; or if
                the folder cannot be made or cleaned.
        """
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self._orbax, self._context = _files.import_orbax()
        self.folder = Path(folder).absolute()
        self.keep = keep
        self.config = None if config is None else _files.as_json(config, "config")
        self._pending: tuple[int, Any, dict[str, float] | None] | None = None
        self._at: int | None = None  # the step that this object saved or restored last
        self._metrics: dict[int, dict[str, float] | None] = {}  # metrics of complete checkpoints by step, read once
        self._primary = jax.process_index() == 0
        self._read_only, self._lock = read_only, None
        self._open()
        self._quiet = _files.QuietOrbax()
        self._quiet.start()

    @property
    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, ascending."""
        paths = self.folder.iterdir() if self.folder.is_dir() else []
        return sorted(int(path.name) for path in paths if path.name.isdecimal() and path.is_dir())

    @property
    def last(self) -> int | None:
        """The step of the last complete checkpoint; ``None`` if there is none."""
        return max(self.steps, default=None)

    @property
    def best(self) -> int | None:
        """The step of highest AP, the earliest if several are equal.

        ``None`` if no checkpoint was evaluated, or if AP is 0 or undefined (NaN) throughout: then the last model is as
        good as any.
        """
        return self.best_with({})

    def best_with(self, metrics: Mapping[int, Metrics]) -> int | None:
        """``best`` if further steps had been evaluated.

        Args:
            metrics: of each of these steps.

        Returns:
            The step, as ``best``.
        """
        return _note.best_step({**{step: self._read_metrics(step) for step in self.steps}, **metrics})

    def is_evaluated(self, step: int) -> bool:
        """Whether there is a checkpoint with metrics.

        Args:
            step: the step of the checkpoint.

        Returns:
            True if there is.
        """
        return step in self.steps and self._read_metrics(step) is not None

    @property
    def stored_config(self) -> Any:
        """The options with which the checkpoints in the folder were made; ``None`` if there is none."""
        path = self.folder / "config.json"
        if not self.steps or not path.is_file():
            return None
        with self._explained("config.json cannot be read"):
            return json.loads(path.read_text())

    def replace_config(self) -> None:
        """Stores ``config`` as the options of the checkpoints in the folder, for a run that goes on with others.

        Raises:
            OSError: if the file cannot be written.
        """
        if self._primary and self.config is not None:
            with self._explained("config.json could not be saved"):
                _files.write_json(self.folder / "config.json", self.config)
        if jax.process_count() > 1:  # another process must not compare with the old ones
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(f"{self.folder}/config.json")

    def save(
        self,
        state: Any,
        data_state: Mapping[str, Any] | None = None,
        *,
        metrics: Metrics | None = None,
        wait: bool = False,
    ) -> None:
        """Starts a save. When this returns the arrays are copied, so that the next step may donate them.

        Args:
            state: a pytree of jax or numpy arrays with an attribute ``step``, such as a ``TrainState``.
            data_state: the position in the data, of values that JSON can hold; the same in every process.
            metrics: of this state, if evaluated; the best has the highest "AP". For a saved step they are added.
            wait: if True, waits until the checkpoint is complete.

        Raises:
            OSError: in one line, if this or the previous save failed (disk full); earlier checkpoints stay unchanged.
            ValueError: if the folder holds checkpoints of a run that this run is no continuation of, or is opened with
                ``read_only``.
            TypeError: if a leaf of the state is no array, or JSON cannot hold ``data_state``.
        """
        if self._read_only:
            raise ValueError(f"{self.folder}: was opened with read_only=True, so nothing can be saved there")
        self._open()
        self._settle()
        step, last = int(state.step), self.last
        self._check_succession(step, last)
        numbers = None if metrics is None else {name: float(value) for name, value in metrics.items()}
        if step == last:
            if numbers is not None:
                self._add_metrics(step, numbers)
            return
        arrays = _stored.to_nested(state)
        position = _files.as_json({} if data_state is None else data_state, "data_state")
        note = _note.to_json(_note.Note(position, numbers, _stored.array_checksums(arrays)))
        # Ctrl-C is delayed until the save has started: at exit, orbax's threads would wait 20 minutes for the rest.
        with _files.uninterrupted(), self._explained(f"the checkpoint of step {step} could not be saved", failed=step):
            if self._primary and self._at is None and self.config is not None:
                _files.write_json(self.folder / "config.json", self.config)
            with self._context:
                response = self._orbax.save_checkpointables_async(
                    self.folder / str(step), {_STATE: arrays}, custom_metadata=note
                )
            self._pending = (step, response, numbers)
        if wait:
            self._settle()

    def restore(
        self, template: State, *, step: int | Literal["best"] | None = None
    ) -> tuple[State, Any, dict[str, Any]]:
        """Reads a checkpoint.

        Args:
            template: a pytree like the saved one, of arrays or ``jax.ShapeDtypeStruct``. Restored leaves have the
                shardings of the template, so the number of devices or processes may differ from the save. For a numpy
                leaf the result is a numpy array; a leaf without a sharding is on the default device, not committed.
            step: the step; default the last. "best" is the step of highest AP, or the last if AP is 0 or undefined in
                all evaluations.

        Returns:
            ``(state, data_state, info)``: the state, bit for bit; the saved ``data_state``; and
            {"step": int, "metrics": dict or None}.

        Raises:
            FileNotFoundError: if there is no such checkpoint.
            ValueError: if the run's options differ from the stored ones, naming each with old and new value; if the
                state has another structure, naming some of the leaves that differ; or if the checkpoint is damaged.
            OSError: if a save failed before, or the files cannot be read.
        """
        self._settle()
        self.check_config()
        step = self._find(step)
        metrics = self._read_metrics(step)
        stored, note = self._read_metadata(step)
        _stored.check_structure(stored, template, f"{self.folder}: the checkpoint of step {step}")
        with self._reading(step):
            as_numpy = {_STATE: _stored.numpy_template(stored)}
            arrays = self._orbax.load_checkpointables(self.folder / str(step), as_numpy)[_STATE]
            if note.arrays is not None and (changed := _stored.differing(arrays, note.arrays)):
                raise ValueError(f"it is damaged: {checksums.named(changed)} changed since the save")
        state = _stored.from_nested(arrays, template)
        self._at = step
        return state, note.data, {"step": step, "metrics": metrics}

    def check_config(self) -> None:
        """Compares the options of this run with the stored ones; ``restore`` calls it first.

        Raises:
            ValueError: if an option differs; names each, with old and new value.
        """
        stored = self.stored_config
        if stored is None or self.config is None:
            return
        if changed := _files.differences(stored, self.config):
            raise ValueError(
                f"{self.folder}: holds a run with other options: {'; '.join(changed)}. Resume it with the stored "
                "options, or begin a new run in another folder"
            )

    def wait(self) -> None:
        """Waits for the save in progress.

        Raises:
            OSError: if the save failed.
        """
        self._settle()

    def close(self) -> None:
        """Waits for the save in progress, and gives up the lock; call it at the end, or use ``with``.

        Raises:
            OSError: if the save failed.
        """
        try:
            self._settle()
            self._quiet.stop()  # not after a failure, since orbax continues to log it
        finally:
            if self._pending is None and self._lock is not None:  # not at Ctrl-C while a save is being written
                self._lock.release()
                self._lock = None

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> None:
        """Locks the folder and removes the files of a killed run, unless this was done or another process does it."""
        if self._read_only or not self._primary or self._lock is not None:
            return
        with self._explained("cannot be opened"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(self.folder)
            self._remove_leftovers()

    def _settle(self) -> None:
        """Waits for the save in progress, and then removes the checkpoints that it replaces."""
        if self._pending is None:
            return
        step, response, metrics = self._pending
        with self._explained(f"the checkpoint of step {step} could not be saved", failed=step):
            try:
                response.result()
            except Exception:
                self._pending = None  # not at Ctrl-C, when the checkpoint is still being written
                raise
        self._pending = None
        self._at, self._metrics[step] = step, metrics
        if not self._primary:
            return
        steps = self.steps
        steps_to_keep = {*steps[-self.keep :], self.best}
        with self._explained("old checkpoints cannot be removed"):
            for old in {*steps} - steps_to_keep:
                # renamed first: if the process is killed during the removal, the rest must not look complete
                removed = self.folder / f"{old}.removed"
                os.replace(self.folder / str(old), removed)
                shutil.rmtree(removed)

    def _check_succession(self, step: int, last: int | None) -> None:
        if last is None or (self._at == last and step >= last):
            return
        here = "another run" if self._at is None else f"a run that went on from step {self._at}"
        raise ValueError(
            f"{self.folder}: holds checkpoints of {here}, up to step {last}; resume it, or take another folder"
        )

    def _find(self, step: int | Literal["best"] | None) -> int:
        steps = self.steps
        if not steps:
            raise FileNotFoundError(f"{self.folder}: holds no whole checkpoint")
        if step == "best":
            if not any(map(self.is_evaluated, steps)):
                raise FileNotFoundError(f"{self.folder}: no checkpoint was evaluated, so none is the best")
            best = self.best
            return steps[-1] if best is None else best
        if step is not None and step not in steps:
            raise FileNotFoundError(f"{self.folder}: holds no step {step}, only {', '.join(map(str, steps))}")
        return steps[-1] if step is None else step

    def _read_metrics(self, step: int) -> dict[str, float] | None:
        if step not in self._metrics:
            with self._reading(step):
                metrics = _note.read_metrics(self.folder / str(step))
            self._metrics[step] = self._read_metadata(step)[1].metrics if metrics is None else metrics
        return self._metrics[step]

    def _read_metadata(self, step: int) -> tuple[Any, _note.Note]:
        """Shapes and dtypes of the state and of the values that are stored with it."""
        with self._reading(step):
            metadata = self._orbax.checkpointables_metadata(self.folder / str(step))
            state = metadata.metadata.get(_STATE)
            if not state:
                raise ValueError("it is damaged, or flaxdet did not write it: it has no state")
            return state, _note.from_json(metadata.custom_metadata)

    def _add_metrics(self, step: int, metrics: dict[str, float]) -> None:
        self._metrics[step] = metrics
        if self._primary:
            with self._explained(f"the metrics of step {step} could not be saved"):
                _note.write_metrics(self.folder / str(step), metrics)

    def _remove_leftovers(self) -> None:
        for path in self.folder.iterdir():
            if _LEFTOVER.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Turns an error into one line that names the folder, and says which other checkpoint there is.

        Delays a Ctrl-C, which orbax would take for damage.
        """
        try:
            with _files.uninterrupted(), self._explained(f"the checkpoint of step {step} cannot be read"):
                yield
        except CheckpointError as error:
            others = [other for other in self.steps if other != step]
            if others:
                error.args = (f"{error}. To use the checkpoint of step {others[-1]}, remove {self.folder / str(step)}",)
            raise

    @contextlib.contextmanager
    def _explained(self, what: str, failed: int | None = None) -> Iterator[None]:
        """Turns an error into one line that names the folder, and removes the incomplete files of step ``failed``."""
        try:
            yield
        except LockedError:
            raise
        except Exception as error:
            if failed is not None and self._primary:  # frees the space on the disk
                _files.remove_folder(self.folder / f"{failed}.orbax-checkpoint-tmp")
            raise _files.explain(f"{self.folder}: {what}", error) from error
