"""``flaxdet train``: trains a detector on a data set in COCO's format."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flaxdet import registry
from flaxdet.cli.options import load_model, make_folder, say
from flaxdet.cli.train_options import TrainOptions
from flaxdet.cli.train_report import Report
from flaxdet.cli.train_resume import check_images, check_options, note_broken_image, say_more_epochs
from flaxdet.data.summary import counted

if TYPE_CHECKING:
    from flaxdet.data import Batches, CocoDataset
    from flaxdet.train import Checkpoints


@dataclass(frozen=True)
class Train(TrainOptions):
    """Fine-tune a detector on your own images.

    Annotations are COCO JSON. Files in OUT: model.safetensors (the model with the best AP on the validation images so
    far, or without validation the last that was saved; `flaxdet detect --weights OUT` takes it), model.pth (the same
    model for torchvision), metrics.json (the figures of this model), last.safetensors (the last model, at the end and
    at Ctrl-C), curves.png, predictions.png (predictions beside the ground truth), log.jsonl (losses, and every
    evaluation with the AP of each class and the validation losses), tensorboard/ and checkpoints/. Ctrl-C saves first.
    With --resume an interrupted run continues, and ends with the same model as a run without interruption.

    The class layers are new, unless the weights have exactly the class names of the data set.

    flaxdet train --train images/ train.json --val images/ val.json --out run/ --weights model.pth
    """

    def run(self) -> int:
        """Runs the command; returns the exit status."""
        self.check()
        import jax

        from flaxdet.train import Checkpoints, InterruptedTrainingError

        if self.coordinator is not None:
            address = None if self.coordinator == "auto" else self.coordinator
            jax.distributed.initialize(address, self.process_count, self.process_index)
        make_folder(self.out)
        begun = any(path.name.isdecimal() for path in (self.out / "checkpoints").glob("*"))
        if begun and not self.resume:
            raise ValueError(f"{self.out}: holds a run already; expected --resume to continue it, or another --out")
        if self.resume and not begun:
            raise ValueError(f"{self.out}: expected checkpoints to resume from, found none")
        checkpoints = Checkpoints(self.out / "checkpoints", config=self.config())  # the only run in this folder
        try:
            before = check_options(self, checkpoints)
            model, variables, train, val = self.starting_point()
            _check_evaluation(val)
            check_images(self, checkpoints, {"train": train, "val": val})
            self._fit(model, variables, train, val, checkpoints, before)
        except InterruptedTrainingError as stop:
            say(f"{stop}. To continue: {self.resume_command()}")
            return 130
        finally:
            checkpoints.close()
        return 0

    def starting_point(self) -> tuple[Any, dict[str, Any], CocoDataset, CocoDataset | None]:
        """The model with initial variables, the training data, and the validation data."""
        import jax

        import flaxdet
        from flaxdet.models.classes import match_classes, replace_classes

        options: dict[str, Any] = {
            "min_size": self.min_size,
            "max_size": self.max_size,
            "dtype": np.dtype("float32") if self.dtype == "float32" else jax.numpy.bfloat16,
            "remat": self.remat,
            "freeze_bn": self.pretrained if self.freeze_bn is None else self.freeze_bn,
            "trainable_backbone_layers": self.trainable_layers,
        }
        options = {name: value for name, value in options.items() if value is not None}
        key = jax.random.key(self.seed)
        data = None if self.keep_classes else self._data()  # faults show before weights are downloaded
        if not self.pretrained:
            assert data is not None
            builder = self.model or registry.names()[0]
            backbone = flaxdet.ResNet50_Weights.IMAGENET1K_V1 if self.weights == "backbone" else None
            classes = len(data[0].categories)
            model, variables = getattr(flaxdet, builder)(
                weights_backbone=backbone, num_classes=classes, key=key, progress=self.progress, **options
            )
        else:
            options = {"trainable_backbone_layers": 3} | options
            model, variables, names = load_model(
                self.model, self.weights, key=self.key, progress=self.progress, **options
            )
            data = data or self._data(categories=names, num_classes=model.num_classes)
            categories = data[0].categories
            if not self.keep_classes and names != categories:
                copy = match_classes(names or [], categories, self.copy_classes)
                model, variables = replace_classes(model, variables, len(categories), copy=copy, key=key)
                say(f"new class layers for {counted(len(categories) - 1, 'class')}, {len(copy)} of them copied")
        train, val = data
        return model, variables, train, val

    def _data(self, **labels: Any) -> tuple[CocoDataset, CocoDataset | None]:
        """The training data, and the validation data; prints the summary of each."""
        choice = {"remove_empty": not self.keep_empty, "drop_unused": self.drop_unused}
        train = self.data.read("train", *self.train, **choice, **labels)
        return train, None if self.val is None else self.data.read("val", *self.val, categories=train.categories)

    def _fit(
        self,
        model: Any,
        variables: dict[str, Any],
        train: CocoDataset,
        val: CocoDataset | None,
        checkpoints: Checkpoints,
        epochs_before: int | None,
    ) -> None:
        import jax

        from flaxdet.train import (
            InterruptedTrainingError,
            create_state,
            fit,
            make_mesh,
            make_train_step,
            replicate,
            split_trainable,
        )

        steps_per_epoch = math.ceil(len(train) / self.batch_size)
        steps = self.epochs * steps_per_epoch
        devices = jax.device_count()
        if self.batch_size % devices:
            raise ValueError(f"--batch-size should be a multiple of the {devices} devices, got {self.batch_size}")
        mesh = make_mesh() if devices > 1 else None
        batches = self.batches(model, train, steps)
        training = registry.nearest(model).training
        tx, schedule = self.optimiser(training, steps_per_epoch)
        state = create_state(model, variables, tx, key=jax.random.key(self.seed), ema=self.ema is not None)
        if mesh is not None:
            state = replicate(state, mesh)
        if self.resume:
            if checkpoints.stored_config != checkpoints.config:  # more epochs, or options that are new in flaxdet
                checkpoints.replace_config()
            state, position, _ = checkpoints.restore(state)
            batches.set_state(position)
            step = int(state.step)
            say(f"continuing after step {step}")
            if epochs_before is not None:
                _, old = dataclasses.replace(self, epochs=epochs_before).optimiser(training, steps_per_epoch)
                update = step // self.accumulate
                say_more_epochs(self, epochs_before, step, (float(old(update)), float(schedule(update))))
        trained = len(jax.tree.leaves(split_trainable(model, state.params)[0]))
        say(f"{steps} steps of {self.batch_size} images on {counted(devices, 'device')}; {trained} tensors train")

        writers = self._writers(int(state.step)) if jax.process_index() == 0 else []
        report = Report(self, model, train, val, checkpoints)
        try:
            with self._failing_well(checkpoints, {"train": train, "val": val}):
                state = fit(
                    make_train_step(model, tx, mesh=mesh, ema_decay=self.ema),
                    state,
                    batches,
                    steps=steps,
                    mesh=mesh,
                    schedule=lambda step: schedule(step // self.accumulate),
                    evaluate=None if val is None else report.evaluate,
                    evaluate_every=max(1, round(self.eval_every * steps_per_epoch)),
                    checkpoints=checkpoints,
                    save_every=self.save_every,
                    after_save=report.after_save,
                    writers=writers,
                    log_every=self.log_every,
                    progress=self.progress,
                )
        except InterruptedTrainingError as stop:
            report.write_last(stop.state)
            raise
        finally:
            for writer in writers:
                writer.close()
        report.finish(state)

    @contextlib.contextmanager
    def _failing_well(self, checkpoints: Checkpoints, data: Mapping[str, CocoDataset | None]) -> Iterator[None]:
        """After an error, prints which step is saved and how to continue. A broken image may then be mended."""
        from flaxdet.train import InterruptedTrainingError, NonFiniteLossError

        try:
            yield
        except (InterruptedTrainingError, NonFiniteLossError):  # their messages say it
            raise
        except (Exception, KeyboardInterrupt) as error:
            with contextlib.suppress(Exception):  # the first error counts
                checkpoints.wait()
            if isinstance(error, Exception):
                note_broken_image(checkpoints, data, error)
            if checkpoints.last is not None:
                say(f"step {checkpoints.last} is saved. To continue: {self.resume_command()}")
            raise

    def batches(self, model: Any, train: CocoDataset, steps: int) -> Batches:
        """The batches of a run: the rows of this process."""
        import jax

        from flaxdet.data import train_batches

        return train_batches(
            train,
            model.transform,
            batch_size=self.batch_size,
            steps=steps,
            seed=self.seed,
            flip=self.flip,
            min_size=self.multi_scale or None,
            jitter=None if self.crop is None else (0.1, 2.0),
            crop=self.crop,
            max_boxes=self.max_boxes,
            workers=self.workers,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def optimiser(self, training: registry.Training, steps_per_epoch: int) -> tuple[Any, Any]:
        """The optax transform, and the learning rate as a function of the number of updates."""
        import optax

        from flaxdet.train import sgd, warmup_cosine_schedule, warmup_multistep_schedule
        from flaxdet.train.recipes import WARMUP_ITERATIONS

        # the linear rule of torchvision's references
        rate = self.learning_rate or training.fine_tuning_lr / training.batch_size * self.batch_size * self.accumulate
        # With accumulation an update may span two epochs, so the schedule counts steps and not updates.
        warmup_updates = WARMUP_ITERATIONS if self.warmup_steps is None else self.warmup_steps
        warmup_steps = warmup_updates * self.accumulate
        if self.warmup_steps is None:
            warmup_steps = min(warmup_steps, steps_per_epoch - 1)
        if self.schedule == "cosine":
            rate_at_step = warmup_cosine_schedule(rate, steps_per_epoch, self.epochs, warmup_steps=warmup_steps)
        else:
            milestones = [round(self.epochs * share) for share in (2 / 3, 11 / 12)] if self.schedule == "step" else []
            rate_at_step = warmup_multistep_schedule(rate, steps_per_epoch, milestones, warmup_steps=warmup_steps)

        def schedule(update: Any) -> Any:
            return rate_at_step(update * self.accumulate)

        tx = sgd(
            schedule,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            norm_weight_decay=self.norm_weight_decay,
        )
        if self.clip is not None:
            tx = optax.chain(optax.clip_by_global_norm(self.clip), tx)
        if self.accumulate > 1:
            tx = optax.MultiSteps(tx, self.accumulate).gradient_transformation()
        return tx, schedule

    def _writers(self, step: int) -> list[Any]:
        from flaxdet.train.logs import JsonLinesWriter, TensorBoardWriter

        writers: list[Any] = [JsonLinesWriter(self.out / "log.jsonl", resume_from=step)]
        if self.tensorboard:
            writers.append(TensorBoardWriter(self.out / "tensorboard", resume_from=step))
        return writers


def _check_evaluation(val: CocoDataset | None) -> None:
    """Checks before the first step that evaluation can run: packages are installed and annotations are valid."""
    from flaxdet.evaluation.coco_metrics import read_annotations, require_pycocotools

    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("pictures of training need matplotlib: pip install 'flaxdet[train]'")
    if val is not None:
        require_pycocotools()
        read_annotations(val.annotations)
