"""``Predictor``: detects objects in images of any size with one compiled program per bucket."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flaxdet.images.buckets import Size, model_buckets
from flaxdet.images.decode import read_image
from flaxdet.images.transform import check_image, check_images
from flaxdet.inference.detect import ImageDetections
from flaxdet.inference.engine import Failed, run, stream
from flaxdet.inference.folded import folded
from flaxdet.inference.programs import CompiledPrograms
from flaxdet.inference.samples import Sample, place
from flaxdet.models.detector import Detector
from flaxdet.xla import routes
from flaxdet.xla.layouts import put_weights
from flaxdet.xla.mesh import DATA_AXIS, replicated

Source = np.ndarray | str | Path | Callable[[], np.ndarray]

RAW_SIZES = (640, 1280, 2560)  # sides of the square arrays in which images are sent to the device
# A stream runs a batch that is not full after reading this many more batches of images. After twice as many, the stream
# waits for the result.
_PATIENCE = 8


class Predictor:
    """Detects objects in images of any sizes with few compiled programs.

    Each image has a separate canvas inside the smallest bucket that holds the canvas, and everything beyond the canvas
    is masked. So the detections in an image are equal to the result of ``predict`` for the image alone, up to rounding,
    and do not depend on the bucket or on other images in the batch. An image of a new size compiles nothing. Resize,
    normalisation, network, decoding and NMS run on the device: a small resize program per raw size and bucket, and a
    program of the model per bucket. On a GPU or TPU, a bucket has a second program without masks, for batches whose
    canvases all fill the bucket. A program is compiled on first use, or by ``warmup``.

    Not thread-safe: use one predictor per thread.

    Args:
        model: from a builder or ``flaxdet.load``. A model with ``dtype=jnp.bfloat16`` computes in bfloat16.
        variables: {"params": ..., "batch_stats": ...} of the model.
        buckets: (rows, columns) of the static shapes, in pixels after the resize, multiples of 32; default
            ``default_buckets(model.transform)``, which hold every image. A model with ``fixed_size`` has one canvas; if
            this canvas is the only bucket, any size is accepted.
        batch_size: B, images per call of the model. A batch that is not full is filled up with copies. On a CPU without
            a mesh, every call has one image, whatever B is: this is as fast as a batch, needs less memory, and computes
            no copies.
        raw_sizes: sides of square arrays, in pixels. An image of 8-bit pixels is sent to the device in the smallest
            array that holds the image, and is resized on the device. Larger images, and images of floats, are resized
            on the host, with the same result.
        fold: fold BatchNorm into the convolutions (``flaxdet.fold_batch_norm``).
        mesh: the result of ``flaxdet.train.make_mesh``; the batch is divided over the devices of the mesh.

    Raises:
        ValueError: for a bucket or a ``size_divisible`` that is no multiple of 32, if canvases may be smaller than the
            bucket; for a ``batch_size`` that is no multiple of the number of devices, or sizes below 1.
    """

    def __init__(
        self,
        model: Detector,
        variables: Any,
        *,
        buckets: Sequence[Size] | None = None,
        batch_size: int = 1,
        raw_sizes: Sequence[int] = RAW_SIZES,
        fold: bool = True,
        mesh: Mesh | None = None,
    ):
        self.buckets, masked = model_buckets(buckets, model.transform)
        if batch_size < 1 or not all(size >= 1 for size in raw_sizes):
            raise ValueError(f"batch_size and raw_sizes should be at least 1, got {batch_size} and {tuple(raw_sizes)}")
        if mesh is not None and batch_size % mesh.shape[DATA_AXIS]:
            raise ValueError(
                f"batch_size={batch_size} should be a multiple of the mesh's {mesh.shape[DATA_AXIS]} devices"
            )
        self.batch_size = batch_size
        self.raw_sizes = tuple(sorted({int(size) for size in raw_sizes}))
        self.model, variables = folded(model, variables) if fold else (model, variables)
        self._programs = CompiledPrograms(
            self.model,
            jax.device_put(variables) if mesh is None else put_weights(variables, replicated(mesh)),
            batch_size=1 if mesh is None and routes.platform() == "cpu" else batch_size,
            masked=masked,
            raw_sizes=self.raw_sizes,
            mesh=mesh,
        )

    @property
    def compile_count(self) -> int:
        """Number of compiled programs: the models (``model_compile_count``), and a resize per bucket and raw size."""
        return len(self._programs.resizes) + len(self._programs.detects)

    @property
    def model_compile_count(self) -> int:
        """Number of compiled programs of the model: at most one per bucket on a CPU, two on a GPU or TPU."""
        return len(self._programs.detects)

    def warmup(self, *, progress: bool = False) -> None:
        """Compiles every program, so that no image has to wait for compilation.

        Args:
            progress: shows a progress bar.
        """
        from tqdm import tqdm

        models = [
            functools.partial(self._programs.detect, bucket, masked)
            for bucket in self.buckets
            for masked in self._programs.variants()
        ]
        resizes = [
            functools.partial(self._programs.resize, bucket, raw) for bucket in self.buckets for raw in self.raw_sizes
        ]
        for compile_one in tqdm([*models, *resizes], desc="compiling", disable=not progress):
            compile_one()

    def __call__(self, images: Sequence[Any]) -> list[ImageDetections]:
        """Detects objects in a list of images.

        Args:
            images: arrays [H, W, 3] of any sizes, RGB, all uint8 or all floats in [0, 1]; may be empty.

        Returns:
            For each image, in the given order, {"boxes": [N, 4] xyxy in pixels of the original image, "scores": [N] in
            [0, 1], "labels": [N] int32}, best first.

        Raises:
            TypeError: for images of other dtypes or of mixed dtypes.
            ValueError: for an array that is no image, or an image that no bucket holds; the message has the number of
                the image. Nothing is computed then.
            MemoryError: if the device has too little memory for a batch of a bucket.
        """
        arrays, config = check_images(images), self.model.transform
        samples = [place(i, array, f"image {i}", config, self.buckets) for i, array in enumerate(arrays)]
        return list(run(samples, self._programs))

    def stream(self, images: Iterable[Source], *, workers: int = 2) -> Generator[ImageDetections | Exception]:
        """Detects objects in a long or endless sequence of images; threads read images while the device computes.

        A result is yielded after at most 16 more batches of images are read (images with errors count too), since
        batches are filled up and the device is kept busy. To detect objects in single images without delay, call the
        predictor with a list of one image.

        Args:
            images: arrays [H, W, 3], uint8 or floats in [0, 1]; paths of image files; or functions without arguments
                that return an array. Few images are in memory at a time.
            workers: number of threads that read files and call functions.

        Yields:
            For each image, in order, the dict that ``__call__`` returns. For a file that can't be read, an array that
            is no image, and an image that no bucket holds, the exception (``flaxdet.data.ImageError``, ``ValueError``
            or ``TypeError``, with the file or the number of the image); the stream then continues.

        Raises:
            ValueError: for fewer than one worker.
            MemoryError: as ``__call__``.
            Exception: any error of a function in ``images`` that is no OSError, TypeError or ValueError.
        """
        if workers < 1:
            raise ValueError(f"workers should be at least 1, got {workers}")
        rows = self._programs.batch_size
        yield from stream(
            self._load,
            enumerate(images),
            self._programs,
            ahead=self.batch_size + workers,
            workers=workers,
            patience=_PATIENCE * rows,
        )

    def _load(self, numbered: tuple[int, Source]) -> Sample | Failed:
        """Reads one image of a stream. Runs in a thread, so computes in numpy only."""
        number, source = numbered
        name = str(source) if isinstance(source, (str, Path)) else f"image {number}"
        try:
            image = read_image(source) if isinstance(source, (str, Path)) else source() if callable(source) else source
            sample = place(number, check_image(image, name), name, self.model.transform, self.buckets)
            return self._programs.prepare(sample)
        except (OSError, TypeError, ValueError) as error:
            return Failed(number, error)
