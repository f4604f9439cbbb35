"""The results that ``flaxdet train`` writes: the best model with its figures, the last model, pictures."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flaxdet.cli.options import is_primary, say

if TYPE_CHECKING:
    from flaxdet.cli.train_options import TrainOptions
    from flaxdet.data import CocoDataset
    from flaxdet.evaluation.evaluate import CocoResult
    from flaxdet.train import Checkpoints, TrainState

PICTURED = 4  # images in predictions.png
_MODEL = ("model.safetensors", "model.pth", "metrics.json")  # the last describes the others, and is replaced last
_UNFINISHED = ".model-"  # a folder with files that are being written
_TEMPORARY = re.compile(r"\.(log\.jsonl|curves\.png|predictions\.png|last\.safetensors)\.[0-9a-f]{8}\.tmp")


class Report:
    """Writes the results of a run.

    model.safetensors, model.pth and metrics.json always belong together: the model with the best AP so far, or as long
    as AP is 0 or undefined, the last that was saved.
    """

    def __init__(
        self,
        options: TrainOptions,
        model: Any,
        train: CocoDataset,
        val: CocoDataset | None,
        checkpoints: Checkpoints,
    ):
        from flaxdet.train.validation import ValidationLosses

        self.options, self.model, self.train, self.val = options, model, train, val
        self.out, self.checkpoints = options.out, checkpoints
        self._losses = None if val is None else ValidationLosses(model, val)
        if is_primary():
            self._remove_leftovers()

    def evaluate(self, variables: Mapping[str, Any], step: int) -> dict[str, float]:
        """The figures on the validation images under the names of the log; writes the model if it is the best."""
        from flaxdet.evaluation.evaluate import evaluate, on_one_device
        from flaxdet.xla.memory import give_memory_back

        assert self.val is not None
        assert self._losses is not None
        progress = self.options.progress and is_primary()
        give_memory_back()  # the train step's temporary buffers, on CPUs
        result = evaluate(self.model, variables, self.val, batch_size=self.options.batch_size, progress=progress)
        losses = self._losses(on_one_device(variables), progress=progress)
        figures = log_row(result, losses)
        if is_primary():
            if self.checkpoints.best_with({step: figures}) in (None, step):
                defined = {name: None if math.isnan(value) else value for name, value in losses.items()}
                self._write_model(variables, {"step": step, **result.to_dict(), "losses": defined})
            self.draw(variables, {"step": step, **figures})
            shown = {name: figures[name] for name in ("AP", "AP50", "AP75")} | {"validation loss": losses["loss"]}
            say(f"step {step}: " + ", ".join(f"{name} {_shown(value)}" for name, value in shown.items()))
        return figures

    def after_save(self, variables: Mapping[str, Any], step: int) -> None:
        """Writes the model of a step that is saved and not evaluated, unless there is a better one."""
        if is_primary() and self.checkpoints.best is None:
            self._write_model(variables, {"step": step})

    def finish(self, state: TrainState) -> None:
        """Writes the last model, and the pictures of the best."""
        from flaxdet.train import evaluation_variables

        last = int(state.step)
        self.write_last(state)
        best = self.checkpoints.best
        step = last if best is None else best
        if step != last:
            state, _, _ = self.checkpoints.restore(state, step=step)
        variables = evaluation_variables(state)
        if self._step_of_model() != step:  # files were removed, or an older flaxdet wrote them
            if best is None:
                self.after_save(variables, step)
            else:
                self.evaluate(variables, step)
        if is_primary():
            self.draw(variables, {})
            say(f"{self.out / 'model.safetensors'}: the model of step {step}")

    def write_last(self, state: TrainState) -> None:
        """Writes last.safetensors."""
        import flaxdet
        from flaxdet.train import evaluation_variables

        if is_primary():
            path = self.out / "last.safetensors"
            flaxdet.save(path, self.model, evaluation_variables(state), categories=self.train.categories)
            say(f"{path}: the model of step {int(state.step)}")

    def draw(self, variables: Mapping[str, Any], latest: dict[str, float]) -> None:
        """Writes curves.png, from the log and the figures that the log does not have yet, and predictions.png."""
        from flaxdet.evaluation.evaluate import on_one_device
        from flaxdet.inference.predict import predict
        from flaxdet.train.logs import read_log
        from flaxdet.train.pictures import draw_curves, draw_predictions

        data = self.train if self.val is None else self.val
        chosen = np.linspace(0, len(data) - 1, min(PICTURED, len(data))).astype(int).tolist()
        images = [data.read_image(i) for i in chosen]
        predictions = predict(self.model, on_one_device(variables), images)
        truths = [{"boxes": data[i].boxes, "labels": data[i].labels} for i in chosen]
        names = self.train.categories
        draw_predictions(images, truths, predictions, names, self.out / "predictions.png", font=self.options.font)
        rows = read_log(self.out / "log.jsonl")
        draw_curves([*rows, latest] if latest else rows, self.out / "curves.png")

    def _remove_leftovers(self) -> None:
        """Removes the incomplete files of a run that was killed."""
        for path in self.out.iterdir():
            if path.name.startswith(_UNFINISHED):
                shutil.rmtree(path)
            elif _TEMPORARY.fullmatch(path.name):
                path.unlink()

    def _write_model(self, variables: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
        """Replaces the files of the model: all of them are written before the first is replaced."""
        import flaxdet
        from flaxdet.files.checkpoint import CheckpointFileError, replacing

        with tempfile.TemporaryDirectory(dir=self.out, prefix=_UNFINISHED) as name:
            folder = Path(name)
            try:
                for file in _MODEL[:-1]:
                    flaxdet.save(folder / file, self.model, dict(variables), categories=self.train.categories)
                with replacing(folder / _MODEL[-1]) as file:
                    file.write(json.dumps(metrics, indent=1, allow_nan=False).encode())
            except CheckpointFileError as error:
                raise CheckpointFileError(str(error).replace(str(folder), str(self.out))) from error
            for file in _MODEL:
                os.replace(folder / file, self.out / file)

    def _step_of_model(self) -> int | None:
        """The step that metrics.json names; ``None`` if a file of the model is missing."""
        if not all((self.out / name).is_file() for name in _MODEL):
            return None
        try:
            return json.loads((self.out / _MODEL[-1]).read_text())["step"]
        except (ValueError, KeyError, TypeError):
            return None


def log_row(result: CocoResult, losses: Mapping[str, float]) -> dict[str, float]:
    """The figures of an evaluation under the names of the log.

    Args:
        result: COCO's figures.
        losses: on the same images.

    Returns:
        "AP", "AP50", "AP75", "AR100", "AP/NAME" for each class, and "val/NAME" for each loss; NaN for an undefined
        figure.
    """
    figures = {"AP": result.ap, "AP50": result.ap50, "AP75": result.ap75, "AR100": result.ar100}
    figures |= {f"AP/{row.name}": row.ap for row in result.per_class}
    row = {name: math.nan if value is None else value for name, value in figures.items()}
    return row | {f"val/{name}": value for name, value in losses.items()}


def _shown(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"
