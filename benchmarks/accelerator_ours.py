"""flaxdet's side of accelerator.py: its programs compiled, inference and training steps measured. Imports no torch."""

from __future__ import annotations

import dataclasses
import functools
import gc
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from accelerator_common import SIZE, Notes, peak_resident, sizes, timed, weights_file
from accelerator_kernels import jax_kernels
from contenders import flaxdet_training, load_flaxdet, make_predictor
from photos import photos, training_examples

import flaxdet
from flaxdet.images.transform import resized_size
from flaxdet.models.detector import call_part
from flaxdet.models.levels import feature_extents
from flaxdet.structures import ImageBatch

Run = Callable[[], Any]
RATE = 1e-6  # of the steps: weights, and with them proposals, are to stay
POOLED = 1000  # boxes an image whose pooled features the network's box head gets


def compile_programs(options: dict[str, Any], notes: Notes) -> str:
    """Compiles the programs of the stages to come, several at a time, into the cache that all stages share.

    One process with threads and not many processes: XLA lets a process try out one program's kernels at a time, so that
    its choice of the quickest is not disturbed. Weights are made meanwhile, and a program does not depend on them.
    """
    start = time.perf_counter()
    tasks = [task for task in (_Inference, _Training) if task.task in options["tasks"]]
    cases = [(task, model, batch) for task in tasks for batch in options["batches"] for model in options["models"]]

    def one(case: tuple[Any, str, int]) -> None:
        task, model, batch = case
        about = {"task": task.task, "model": model, "dtype": options["dtype"], "batch": batch}
        began = time.perf_counter()
        with notes.attempt(what="compile", **about):
            task(model, model, batch, options).compile()
            notes.add("compiled ahead", seconds=time.perf_counter() - began, **about)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, cases))
    return f"{len(cases)} cases in {time.perf_counter() - start:.0f} s"


def inference(options: dict[str, Any], notes: Notes) -> str:
    """Images/s of one model: from pixels to detections, on the device alone, and the network alone."""
    return _run_all(_Inference, options, notes)


def training(options: dict[str, Any], notes: Notes) -> str:
    """Images/s of one model's training step."""
    return _run_all(_Training, options, notes)


def _run_all(task: Any, options: dict[str, Any], notes: Notes) -> str:
    """Measures every batch size, the smallest first, since the device's peak of memory can only rise."""
    found, one = [], None
    for batch in sorted(options["batches"]):
        case = {**task.shape(options), "task": task.task, "model": options["model"], "dtype": options["dtype"]}
        case |= {"batch": batch, "contender": "flaxdet"}
        one = None  # the one before, and its memory
        gc.collect()
        with notes.attempt(**case):
            one = task(options["model"], weights_file(options, options["model"]), batch, options)
            seconds = one.compile()
            notes.add("compiled", seconds=seconds, **case)
            with notes.attempt(what="counting operations", **case):
                notes.add("gflop", gflop=_gflop(one.lowered), **case)
            for what, run in one.runs().items():
                times = timed(run, jax.block_until_ready, options)
                notes.add("rate", what=what, images_per_second=batch / times["median"], **times, **one.loss(), **case)
                if what == task.first:
                    found.append(f"batch {batch}: {batch / times['median']:.1f} images/s")
                    notes.add("memory", mib=_peak(), **case)
            if options.get("profile"):
                notes.add("kernels", **jax_kernels(one.runs()[task.profiled]), **case)
    return ", ".join(found) or "nothing measured"


def _peak() -> float:
    """MiB of the device at its peak, since the process began."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats["peak_bytes_in_use"] / 1024**2 if "peak_bytes_in_use" in stats else peak_resident()


class _Inference:
    """A model at one batch size."""

    task, first, profiled = "inference", "pixels", "device"

    @staticmethod
    def shape(options: dict[str, Any]) -> dict[str, Any]:
        return {"size": sizes(options)["min_size"]}

    def __init__(self, model: str, weights: Any, batch: int, options: dict[str, Any]):
        numbers = {"dtype": options["dtype"], "min_size": sizes(options)["min_size"]}
        self.predictor = make_predictor(weights, SIZE, batch=batch, **numbers)
        self.images, self.boxes = photos(batch, *SIZE), 8 if options["small"] else POOLED
        self.model, self.programs = self.predictor.model, self.predictor._programs
        (self.bucket,) = self.predictor.buckets
        self.masked = all(self.programs.variants())  # the photos fill the bucket
        network = jax.jit(self._network, compiler_options=flaxdet.compiler_options(self.model.dtype))
        shapes = jax.eval_shape(lambda: self._batch(*self._some())), jax.eval_shape(self._pooled)
        self.lowered = network.lower(self.programs.variables, *shapes)

    def _raw(self) -> list[Any]:
        """8-bit images in the square arrays that the predictor sends, and their sizes before and after the resize.

        For each call of the programs: all images in one, but on a CPU an image in each.
        """
        (side,) = self.predictor.raw_sizes
        raw = jnp.zeros((len(self.images), side, side, 3), jnp.uint8)
        raw = raw.at[:, : SIZE[0], : SIZE[1]].set(jnp.stack([jnp.asarray(image) for image in self.images]))
        new_size = resized_size(SIZE, self.model.transform)
        sizes = (jnp.tile(jnp.asarray([size], jnp.int32), (len(raw), 1)) for size in (SIZE, new_size))
        calls = len(raw) // self.programs.batch_size
        return list(zip(*(jnp.split(array, calls) for array in (raw, *sizes)), strict=True))

    def _some(self) -> Any:
        """Pixels of a batch after the resize, whatever they are, and their sizes."""
        pixels = jax.random.normal(jax.random.key(0), (len(self.images), *self.bucket, 3), jnp.float32)
        size = jnp.tile(jnp.asarray([self.bucket], jnp.int32), (len(pixels), 1))
        return pixels, size, size

    def _batch(self, pixels: Any, size: Any, new_size: Any) -> ImageBatch:
        """A batch as the predictor makes it."""
        canvas = jnp.tile(jnp.asarray([self.bucket], jnp.int32), (len(size), 1)) if self.masked else None
        return ImageBatch(pixels, new_size, size, canvas)

    def _pooled(self) -> Any:
        """Pooled features for a box head, whatever they are; None for a model without one."""
        if isinstance(self.model, flaxdet.FCOS):
            return None
        boxes = len(self.images) * self.boxes
        shape = (boxes, *self.model.box_roi_pool.output_size, self.model.backbone.out_channels)
        return jax.random.uniform(jax.random.key(0), shape, jnp.float32).astype(self.model.dtype)

    def _network(self, variables: Any, batch: Any, pooled: Any) -> Any:
        """Convolutions and products alone: no proposals, no RoIAlign, no decoding, no NMS."""

        def apply(model: Any, batch: Any, pooled: Any) -> Any:
            features = model.features(batch)
            if pooled is None:
                return call_part(model.head, features, role="head", extents=feature_extents(features, batch))
            vectors = call_part(model.box_head, pooled, role="box_head")
            return model.rpn(features, batch), call_part(model.box_predictor, vectors, role="box_predictor")

        return self.model.apply(variables, batch, pooled, method=apply)

    def compile(self) -> float:
        """Compiles both programs; seconds it took."""
        start = time.perf_counter()
        self.predictor.warmup()
        self.network = self.lowered.compile()
        return time.perf_counter() - start

    def runs(self) -> dict[str, Run]:
        """What is measured, by name; inputs on the device are made when first used, since their memory counts."""
        resize = self.programs.resize(self.bucket, *self.predictor.raw_sizes)
        detect = self.programs.detect(self.bucket, self.masked)
        raw = functools.cache(self._raw)
        sized = functools.cache(lambda: [self._batch(None, *call[1:]) for call in raw()])
        batch, pooled = functools.cache(lambda: self._batch(*self._some())), functools.cache(self._pooled)
        return {
            "pixels": lambda: self.predictor(self.images),
            "device": lambda: [
                detect(dataclasses.replace(batch, pixels=resize(*call)))
                for batch, call in zip(sized(), raw(), strict=True)
            ],
            "network": lambda: self.network(self.programs.variables, batch(), pooled()),
        }

    def loss(self) -> dict[str, float]:
        """No loss."""
        return {}


class _Training:
    """A model's train step at one batch size."""

    task, first, profiled = "training", "step", "step"

    @staticmethod
    def shape(options: dict[str, Any]) -> dict[str, Any]:
        rows, columns = options.get("shape") or (sizes(options)["rows"], sizes(options)["columns"])
        return {"size": rows, "columns": columns}

    def __init__(self, model: str, weights: Any, batch: int, options: dict[str, Any]):
        rows, columns = self.shape(options).values()
        geometry = {"min_size": rows, "max_size": columns}
        own, variables = load_flaxdet(weights, dtype=options["dtype"], **geometry)
        step, self.state, self.batch = flaxdet_training(own, variables, *training_examples(batch, rows, columns), RATE)
        self.lowered = step.lower(self.state, self.batch)

    def compile(self) -> float:
        """Compiles the step; seconds it took."""
        start = time.perf_counter()
        self.program = self.lowered.compile()
        return time.perf_counter() - start

    def runs(self) -> dict[str, Run]:
        """What is measured, by name."""
        return {"step": self._step}

    def _step(self) -> Any:
        self.state, self.metrics = self.program(self.state, self.batch)
        return self.state

    def loss(self) -> dict[str, float]:
        """Of the last step: if it is not finite, the time means nothing."""
        return {"loss": float(self.metrics["loss"])}


def _gflop(lowered: Any) -> float:
    """Of a network or a step, a batch, as XLA counts them."""
    return lowered.cost_analysis()["flops"] / 1e9
