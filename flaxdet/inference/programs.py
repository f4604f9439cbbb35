"""The programs of inference: compiled for one predictor, or jitted and shared by the whole process."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flaxdet.images.buckets import Size
from flaxdet.images.resize import resize_array, resize_image
from flaxdet.images.transform import transform
from flaxdet.inference.detect import detect, jitted_detect
from flaxdet.inference.engine import naming_bucket
from flaxdet.inference.samples import Sample, raw_squares, resized_pixels, size_arrays
from flaxdet.models.detector import Detector
from flaxdet.structures import Detections, ImageBatch
from flaxdet.xla import routes
from flaxdet.xla.devices import platform_of
from flaxdet.xla.memory import give_memory_back
from flaxdet.xla.mesh import by_rows, on_mesh
from flaxdet.xla.options import compiler_options


class JittedPrograms:
    """``jitted_detect`` on batches from ``transform``: compiled once per shape and process.

    Args:
        model: the detector.
        variables: {"params": ..., "batch_stats": ...}.
        batch_size: B, images per call.
        masked: buckets that are larger than some canvas, so that the program needs masks.
    """

    def __init__(
        self,
        model: Detector,
        variables: Any,
        *,
        batch_size: int,
        masked: Collection[Size] = (),
    ):
        self.model, self.variables = model, variables
        self._batch_size, self._masked = batch_size, masked

    def batch_sizes(self, bucket: Size) -> Sequence[int]:
        """As ``engine.Programs``."""
        del bucket
        return (self._batch_size,)

    def masked(self, bucket: Size) -> bool:
        """As ``engine.Programs``."""
        return bucket in self._masked

    def start(self, bucket: Size, rows: Sequence[Sample]) -> Detections:
        """As ``engine.Programs``."""
        batch = transform(
            [row.image for row in rows],
            self.model.transform,
            canvas="image" if self.masked(bucket) else "bucket",
            bucket=bucket,
            dtype=self.model.box_dtype,
        )
        if self.masked(bucket) and batch.canvas is None:  # a batch without canvases would compile another program
            canvas = jnp.tile(jnp.asarray(bucket, jnp.int32)[None], (len(rows), 1))
            batch = dataclasses.replace(batch, canvas=canvas)
        return jitted_detect(self.model, self.variables, batch)


class CompiledPrograms:
    """Compiles the model and the resize for each bucket, on first use.

    Args:
        model: the detector.
        variables: {"params": ..., "batch_stats": ...}, on the devices.
        batch_size: B, images per call.
        masked: True if a canvas may be smaller than the bucket. On accelerators, where masks cost a tenth of the time,
            a batch whose canvases all fill the bucket then runs a second program of the bucket, without masks.
        raw_sizes: sides of the square arrays in which 8-bit images are sent to the device, the smallest first.
        mesh: a batch is divided over the devices of this mesh; None for one device.
    """

    def __init__(
        self,
        model: Detector,
        variables: Any,
        *,
        batch_size: int,
        masked: bool,
        raw_sizes: Sequence[int],
        mesh: Mesh | None,
    ):
        self.model, self.variables = model, variables
        self.batch_size, self.raw_sizes, self.mesh, self._masked = batch_size, raw_sizes, mesh, masked
        self.resizes: dict[tuple[Size, int], Callable[..., Any]] = {}
        self.detects: dict[tuple[Size, bool], Callable[..., Any]] = {}

    def batch_sizes(self, bucket: Size) -> Sequence[int]:
        """As ``engine.Programs``."""
        del bucket
        return (self.batch_size,)

    def masked(self, bucket: Size) -> bool:
        """As ``engine.Programs``."""
        del bucket
        return self._masked

    def prepare(self, sample: Sample) -> Sample:
        """Resizes the sample on the host if the device can't. Called in a thread, so that ``start`` needn't resize."""
        return sample if sample.resized or self._raw_size(sample) else self._resize_on_host(sample)

    def start(self, bucket: Size, rows: Sequence[Sample]) -> Detections:
        """As ``engine.Programs``."""
        size, new_size, canvas = size_arrays(rows)
        sides = [side for row in rows if (side := self._raw_size(row)) is not None]
        if len(sides) < len(rows):
            resized = [row if row.resized else self._resize_on_host(row) for row in rows]
            pixels = self.put(resized_pixels(resized, bucket, np.dtype(self.model.box_dtype)))
        else:
            side = max(sides)
            resize = self.resize(bucket, side)
            pixels = resize(self.put(raw_squares(rows, side)), self.put(size), self.put(new_size))
        filled = all(row.canvas == bucket for row in rows)
        masked = self._masked and not (filled and False in self.variants())
        batch = ImageBatch(
            pixels=pixels,
            size=self.put(new_size),
            original_size=self.put(size),
            canvas=self.put(canvas) if masked else None,
        )
        return self.detect(bucket, masked)(batch)

    def variants(self) -> Sequence[bool]:
        """For each program of a bucket, whether the program has masks."""
        if not self._masked:
            return (False,)
        return (True,) if routes.platform() == "cpu" else (True, False)

    def _raw_size(self, sample: Sample) -> int | None:
        """The side of the smallest raw square that holds the image; None for an image that the host resizes."""
        if sample.resized or sample.image.dtype != np.uint8:
            return None
        return next((side for side in self.raw_sizes if side >= max(sample.size)), None)

    def _resize_on_host(self, sample: Sample) -> Sample:
        config = self.model.transform
        image = resize_array(
            sample.image,
            sample.new_size,
            bucket=sample.new_size,
            mean=config.image_mean,
            std=config.image_std,
            dtype=np.dtype(self.model.box_dtype),
        )
        return sample._replace(image=image, resized=True)

    def resize(self, bucket: Size, raw: int) -> Callable[..., Any]:
        """The compiled resize of a batch. Compiles it on first use.

        Args:
            bucket: (rows, columns) of the result.
            raw: side of the square arrays with the 8-bit pixels of images.

        Returns:
            (images [B, raw, raw, 3], sizes [B, 2], new sizes [B, 2]) -> pixels [B, rows, columns, 3].

        Raises:
            MemoryError: if there is too little memory to compile.
        """
        if (bucket, raw) not in self.resizes:
            sizes = self._abstract((2,), jnp.int32)
            images = self._abstract((raw, raw, 3), jnp.uint8)
            self.resizes[bucket, raw] = self._compile(resize_to(self.model, bucket), (images, sizes, sizes), bucket)
        return self.resizes[bucket, raw]

    def detect(self, bucket: Size, masked: bool) -> Callable[[ImageBatch], Detections]:
        """The compiled model for a bucket. Compiles it on first use.

        Args:
            bucket: (rows, columns) of the pixels.
            masked: True for the program that takes canvases.

        Returns:
            Batch -> detections in the pixels of the original images.

        Raises:
            MemoryError: if there is too little memory to compile.
        """
        if (bucket, masked) not in self.detects:
            sizes: Any = self._abstract((2,), jnp.int32)
            pixels: Any = self._abstract((*bucket, 3), self.model.box_dtype)
            batch = ImageBatch(
                pixels=pixels,
                size=sizes,
                original_size=sizes,
                canvas=sizes if masked else None,
            )
            shapes = self.variables, batch
            self.detects[bucket, masked] = self._compile(functools.partial(detect, self.model), shapes, bucket)
        return functools.partial(self.detects[bucket, masked], self.variables)

    def put(self, array: np.ndarray) -> jax.Array:
        """Transfers an array of a batch to the device, or divides it over the devices of the mesh.

        Args:
            array: [B, ...].
        """
        return jax.device_put(array, None if self.mesh is None else by_rows(self.mesh))

    def _compile(self, run: Callable[..., Any], shapes: tuple[Any, ...], bucket: Size) -> Callable[..., Any]:
        with naming_bucket(bucket, self.batch_size):
            options = compiler_options(self.model.box_dtype, platform=platform_of(self.variables))
            program = jax.jit(on_mesh(run, self.mesh)).lower(*shapes).compile(options)
        give_memory_back()
        return program

    def _abstract(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        sharding = None if self.mesh is None else by_rows(self.mesh)
        return jax.ShapeDtypeStruct((self.batch_size, *shape), dtype, sharding=sharding)


def resize_to(model: Detector, bucket: Size) -> Callable[..., Any]:
    """The resize of a batch into a bucket.

    Args:
        model: the detector, of which mean, standard deviation and dtype are used.
        bucket: (rows, columns) of the result.

    Returns:
        (images [B, H, W, 3], sizes [B, 2], new sizes [B, 2]) -> pixels [B, rows, columns, 3].
    """
    config = model.transform
    return jax.vmap(
        functools.partial(
            resize_image,
            bucket=bucket,
            mean=config.image_mean,
            std=config.image_std,
            dtype=model.box_dtype,
        )
    )
