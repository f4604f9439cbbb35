"""``Predictor``: compiled once for each of a few buckets, fed images of any size."""

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
from flaxdet.inference.detect import Found
from flaxdet.inference.engine import Failed, run, stream
from flaxdet.inference.folded import folded
from flaxdet.inference.programs import CompiledPrograms
from flaxdet.inference.samples import Sample, place
from flaxdet.models.detector import Detector
from flaxdet.xla import routes
from flaxdet.xla.mesh import DATA_AXIS, replicated

Source = np.ndarray | str | Path | Callable[[], np.ndarray]

RAW_SIZES = (640, 1280, 2560)  # sides of the square arrays that images are sent to the device in
# Batches that a stream reads on before it runs a bucket whose batch is not full; after twice as many it waits for the
# result.
_PATIENCE = 8


class Predictor:
    """Detects objects in images of any sizes with few compiled programs.

    Each image is computed on its own canvas inside the smallest bucket that holds it, with everything beyond the canvas
    masked. So the answers are those of ``predict`` on each image alone, up to rounding, whatever the bucket, the batch
    and its neighbours; and a new size compiles nothing. Resize, normalisation, network, decoding and NMS run on the
    device: a small program for each pair of raw size and bucket, and one of the model for each bucket. Programs are
    compiled when first needed, or ahead of time by ``warmup``.

    Not thread-safe: use one in each thread.

    Args:
        model: from a builder or ``flaxdet.load``. A model with ``dtype=jnp.bfloat16`` computes in bfloat16.
        variables: its ``{"params": ..., "batch_stats": ...}``.
        buckets: (rows, columns) of the static shapes, in pixels after the resize, multiples of 32; default
            ``default_buckets(model.transform)``, which hold every image. A model with ``fixed_size`` has one canvas,
            which may be of any size where it is the one bucket.
        batch_size: B, images a call of the model. A batch that is not full is filled up with copies. On a CPU, without
            a mesh, every call is of one image, whatever B: as quick there, in the memory of one, and nothing is spent
            on filling up.
        raw_sizes: an image of 8-bit pixels is sent to the device in the smallest square array of these sides that
            holds it, and resized there. Larger ones, and floats, take the same resize on the host.
        fold: fold BatchNorm into the convolutions (``flaxdet.fold_batch_norm``).
        mesh: of ``flaxdet.train.make_mesh``; the batch is divided over its devices.

    Raises:
        ValueError: where canvases may be smaller than their bucket, for a bucket or a ``size_divisible`` that is no
            multiple of 32; for a batch that the mesh's devices don't divide, or sizes below 1.
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
            jax.device_put(variables, None if mesh is None else replicated(mesh)),
            batch_size=1 if mesh is None and routes.platform() == "cpu" else batch_size,
            masked=masked,
            raw_sizes=self.raw_sizes,
            mesh=mesh,
        )

    @property
    def compile_count(self) -> int:
        """Programs compiled so far: at most one of the model a bucket, and one resize a bucket and raw size."""
        return len(self._programs.resizes) + len(self._programs.detects)

    @property
    def model_compile_count(self) -> int:
        """Programs of the model among them."""
        return len(self._programs.detects)

    def warmup(self, *, progress: bool = False) -> None:
        """Compiles every program ahead of time, so that no image has to wait for it.

        Args:
            progress: shows a bar.
        """
        from tqdm import tqdm

        models = [functools.partial(self._programs.detect, bucket) for bucket in self.buckets]
        resizes = [
            functools.partial(self._programs.resize, bucket, raw) for bucket in self.buckets for raw in self.raw_sizes
        ]
        for compile_one in tqdm([*models, *resizes], desc="compiling", disable=not progress):
            compile_one()

    def __call__(self, images: Sequence[Any]) -> list[Found]:
        """Detects objects in a list of images.

        Args:
            images: arrays [H, W, 3] of any sizes, RGB, all uint8 or all floats in [0, 1]; may be empty.

        Returns:
            For each image, in the order given, {"boxes": [N, 4] xyxy in pixels of the original image, "scores": [N] in
            [0, 1], "labels": [N] int32}, best first.

        Raises:
            TypeError: for images of another or of mixed dtypes.
            ValueError: for something that is no image, or that no bucket holds, naming it by its number; nothing is
                computed then.
            MemoryError: if the device has too little memory for a batch of a bucket.
        """
        arrays, config = check_images(images), self.model.transform
        samples = [place(i, array, f"image {i}", config, self.buckets) for i, array in enumerate(arrays)]
        return list(run(samples, self._programs))  # pyright: ignore[reportReturnType]

    def stream(self, images: Iterable[Source], *, workers: int = 2) -> Generator[Found | Exception]:
        """Detects objects in a long or endless sequence of images, reading ahead while the device computes.

        A result comes when a few more images have been read, 16 batches at most, since batches are filled and the
        device is kept busy. Images that can't be read count too. For single images that come one by one, call the
        predictor with a list of one.

        Args:
            images: arrays [H, W, 3], uint8 or floats in [0, 1]; paths of image files; or functions without arguments
                that return an array. Few are held at a time.
            workers: threads that read files and call functions.

        Yields:
            For each image, in order, what ``__call__`` returns for it. For one that can't be read, is no image, or that
            no bucket holds, the exception in its place (``flaxdet.data.ImageError``, ``ValueError`` or ``TypeError``,
            naming the file or the number of the image), and all others as usual.

        Raises:
            ValueError: for fewer than one worker.
            MemoryError: as ``__call__``; what a function raises beyond OSError, TypeError and ValueError.
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
        """One image of a stream, in a thread of its own: numpy alone."""
        number, source = numbered
        name = str(source) if isinstance(source, (str, Path)) else f"image {number}"
        try:
            image = read_image(source) if isinstance(source, (str, Path)) else source() if callable(source) else source
            sample = place(number, check_image(image, name), name, self.model.transform, self.buckets)
            return self._programs.prepare(sample)
        except (OSError, TypeError, ValueError) as error:
            return Failed(number, error)
