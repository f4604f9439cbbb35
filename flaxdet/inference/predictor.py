"""``Predictor``: compiled once for each of a few buckets, fed images of any size."""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from flaxdet.images.ahead import read_ahead
from flaxdet.images.buckets import Size, assign, holds, model_buckets
from flaxdet.images.decode import read_image
from flaxdet.images.resize import resize_array
from flaxdet.images.transform import canvas_size, check_image, check_images, resized_size
from flaxdet.inference.predict import unpad
from flaxdet.inference.programs import Programs
from flaxdet.models.detector import Detector
from flaxdet.models.folding import fold_batch_norm
from flaxdet.structures import Detections, ImageBatch
from flaxdet.xla import routes
from flaxdet.xla.mesh import DATA_AXIS, replicated

Found = dict[str, np.ndarray]
Source = np.ndarray | str | Path | Callable[[], np.ndarray]

RAW_SIZES = (640, 1280, 2560)  # sides of the square arrays that images are sent to the device in
# Batches that a stream reads on before it runs a bucket whose batch is not full; after twice as many it waits for the
# result.
_PATIENCE = 8


class _Sample(NamedTuple):
    """One image on its way to the device."""

    number: int
    image: np.ndarray
    resized: bool  # and normalised already, in a stream's thread
    size: Size
    new_size: Size
    canvas: Size
    bucket: Size
    raw: int | None  # the smallest of raw_sizes that holds it


class Predictor:
    """Detects objects in images of any sizes with few compiled programs.

    Each image is computed on its own canvas inside the smallest bucket that holds it, with everything beyond the canvas
    masked. So the answers are those of ``predict`` on each image alone, up to rounding, whatever the bucket, the batch
    and its neighbours; and a new size compiles nothing. Resize, normalisation, network, decoding and NMS run on the
    device: a small program for each pair of raw size and bucket, and one of the model for each bucket. Programs are
    compiled when first needed, or ahead of time by ``warmup``.

    A predictor holds no lock: use one in each thread.

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
        self._rows = 1 if mesh is None and routes.platform() == "cpu" else batch_size  # of a call
        self.raw_sizes = tuple(sorted({int(size) for size in raw_sizes}))
        folded: Any = fold_batch_norm(model, variables) if fold else (model, variables)  # pyright: ignore[reportArgumentType]
        self.model, variables = folded
        variables = jax.device_put(variables, None if mesh is None else replicated(mesh))
        self._programs = Programs(self.model, variables, batch_size=self._rows, masked=masked, mesh=mesh)

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
        samples = [self._sample(i, array, f"image {i}") for i, array in enumerate(check_images(images))]
        return list(self._run(iter(samples), patience=None))  # pyright: ignore[reportReturnType]

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
        ahead = self.batch_size + workers
        with contextlib.closing(read_ahead(self._load, enumerate(images), ahead=ahead, workers=workers)) as samples:
            yield from self._run(samples, patience=_PATIENCE * self._rows)

    def _load(self, numbered: tuple[int, Source]) -> _Sample | tuple[int, Exception]:
        """One image of a stream, in a thread of its own: numpy alone."""
        index, source = numbered
        name = str(source) if isinstance(source, (str, Path)) else f"image {index}"
        try:
            image = read_image(source) if isinstance(source, (str, Path)) else source() if callable(source) else source
            sample = self._sample(index, check_image(image, name), name)
            return sample if sample.raw else sample._replace(image=self._resize_on_host(sample), resized=True)
        except (OSError, TypeError, ValueError) as error:
            return index, error

    def _sample(self, index: int, image: np.ndarray, name: str) -> _Sample:
        config, size = self.model.transform, (image.shape[0], image.shape[1])
        new_size = resized_size(size, config, name=name)
        canvas = canvas_size(new_size, config)
        bucket = self.buckets[assign(np.array([canvas]), self.buckets, names=[name])[0]]
        fitting = (side for side in self.raw_sizes if side >= max(size))
        raw = next(fitting, None) if image.dtype == np.uint8 else None
        return _Sample(index, image, False, size, new_size, canvas, bucket, raw)

    def _resize_on_host(self, sample: _Sample) -> np.ndarray:
        config = self.model.transform
        return resize_array(
            sample.image,
            sample.new_size,
            bucket=sample.new_size,
            mean=config.image_mean,  # pyright: ignore[reportArgumentType]
            std=config.image_std,  # pyright: ignore[reportArgumentType]
            dtype=np.dtype(self.model.box_dtype),
        )

    def _run(
        self, samples: Iterator[_Sample | tuple[int, Exception]], *, patience: int | None
    ) -> Iterator[Found | Exception]:
        """Batches by bucket; the device has its next batch before the host waits for the last."""
        waiting: dict[Size, list[_Sample]] = {}  # in the order of the oldest
        running: deque[tuple[list[_Sample], Size, Detections]] = deque()
        done: dict[int, Found | Exception] = {}
        given = 0

        def settle() -> None:
            batch, bucket, detections = running.popleft()
            with self._programs.memory(bucket):
                host = jax.device_get(detections)
            for row, sample in enumerate(batch):
                own = jax.tree.map(lambda x, row=row: x[row : row + 1], host)
                (done[sample.number],) = unpad(own)

        def start(bucket: Size) -> None:
            batch = self._take(waiting, bucket)
            with self._programs.memory(bucket):
                running.append((batch, bucket, self._detect(batch, bucket)))
            if len(running) > 1:
                settle()

        for sample in samples:
            if isinstance(sample, _Sample):
                number, queue = sample.number, waiting.setdefault(sample.bucket, [])
                queue.append(sample)
                if len(queue) == self._rows:
                    start(sample.bucket)
            else:
                number, error = sample
                done[number] = error
            if patience is not None:
                oldest, queue = next(iter(waiting.items()), (None, []))
                if oldest is not None and number - queue[0].number >= patience:
                    start(oldest)
                # where few images follow, no next batch makes room for the results of the last
                while running and number - min(row.number for row in running[0][0]) >= 2 * patience:
                    settle()
            while given in done:
                yield done.pop(given)
                given += 1
        while waiting:
            start(max(waiting, key=lambda bucket: bucket[0] * bucket[1]))
        while running:
            settle()
        yield from (done[index] for index in sorted(done))

    def _take(self, waiting: dict[Size, list[_Sample]], bucket: Size) -> list[_Sample]:
        """A batch of a bucket, taken out of the queues; empty places go to images that wait for smaller buckets."""
        batch = waiting.pop(bucket)
        for other in [other for other in waiting if holds(bucket, other)]:
            places = self._rows - len(batch)
            batch += waiting[other][:places]
            waiting[other] = waiting[other][places:]
            if not waiting[other]:
                del waiting[other]
        return batch

    def _detect(self, batch: list[_Sample], bucket: Size) -> Detections:
        put = self._programs.put
        rows = batch + batch[:1] * (self._rows - len(batch))
        sizes = {
            name: np.array([getattr(row, name) for row in rows], np.int32) for name in ("size", "new_size", "canvas")
        }
        raw_sizes = [row.raw for row in rows]
        if None in raw_sizes:
            pixels = np.zeros((len(rows), *bucket, 3), np.dtype(self.model.box_dtype))
            for place, row in zip(pixels, rows, strict=True):
                ready = row.image if row.resized else self._resize_on_host(row)
                place[: row.new_size[0], : row.new_size[1]] = ready
            pixels = put(pixels)
        else:
            side = max(raw_sizes)  # pyright: ignore[reportArgumentType]
            raw = np.zeros((len(rows), side, side, 3), np.uint8)
            for place, row in zip(raw, rows, strict=True):
                place[: row.size[0], : row.size[1]] = row.image
            resize = self._programs.resize(bucket, side)
            pixels = resize(put(raw), put(sizes["size"]), put(sizes["new_size"]))
        inputs = ImageBatch(
            pixels=pixels,
            size=put(sizes["new_size"]),
            original_size=put(sizes["size"]),
            canvas=put(sizes["canvas"]) if self._programs.masked else None,
        )
        return self._programs.detect(bucket)(inputs)
