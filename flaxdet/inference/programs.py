"""The compiled programs of a ``Predictor``: one of the model a bucket, and a small resize a bucket and raw size."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flaxdet.images.buckets import Size
from flaxdet.images.resize import resize_image
from flaxdet.inference.predict import detect
from flaxdet.models.detector import Detector
from flaxdet.structures import Detections, ImageBatch
from flaxdet.xla.devices import platform_of
from flaxdet.xla.memory import give_memory_back
from flaxdet.xla.mesh import by_rows, on_mesh
from flaxdet.xla.options import compiler_options


class Programs:
    """Compiles the model and its resize for a batch, each for a bucket, when first asked for.

    Args:
        model: the detector.
        variables: its variables, on the devices.
        batch_size: B, images a call.
        masked: whether an image's canvas may be smaller than its bucket.
        mesh: over whose devices a batch is divided.
    """

    def __init__(self, model: Detector, variables: Any, *, batch_size: int, masked: bool, mesh: Mesh | None):
        self.model, self.variables = model, variables
        self.batch_size, self.masked, self.mesh = batch_size, masked, mesh
        self.resizes: dict[tuple[Size, int], Callable[..., Any]] = {}
        self.detects: dict[Size, Callable[..., Any]] = {}

    def resize(self, bucket: Size, raw: int) -> Callable[..., Any]:
        """The resize of a batch, compiled now if it is not there.

        Args:
            bucket: (rows, columns) of the result.
            raw: side of the square arrays of 8-bit pixels that images lie in.

        Returns:
            (images [B, raw, raw, 3], sizes [B, 2], new sizes [B, 2]) -> pixels [B, rows, columns, 3].

        Raises:
            MemoryError: if compiling takes more memory than there is.
        """
        if (bucket, raw) not in self.resizes:
            config = self.model.transform
            run = functools.partial(
                resize_image,
                bucket=bucket,
                mean=config.image_mean,  # pyright: ignore[reportArgumentType]
                std=config.image_std,  # pyright: ignore[reportArgumentType]
                dtype=self.model.box_dtype,
            )
            sizes = self._abstract((2,), jnp.int32)
            image = self._abstract((raw, raw, 3), jnp.uint8)
            self.resizes[bucket, raw] = self._compile(jax.vmap(run), (image, sizes, sizes), bucket)
        return self.resizes[bucket, raw]

    def detect(self, bucket: Size) -> Callable[[ImageBatch], Detections]:
        """The model on a batch, compiled now if it is not there.

        Args:
            bucket: (rows, columns) of the pixels.

        Returns:
            Batch -> detections in the pixels of the original images.

        Raises:
            MemoryError: if compiling takes more memory than there is.
        """
        if bucket not in self.detects:
            sizes: Any = self._abstract((2,), jnp.int32)
            pixels: Any = self._abstract((*bucket, 3), self.model.box_dtype)
            batch = ImageBatch(
                pixels=pixels,
                size=sizes,
                original_size=sizes,
                canvas=sizes if self.masked else None,
            )
            self.detects[bucket] = self._compile(functools.partial(detect, self.model), (self.variables, batch), bucket)
        return functools.partial(self.detects[bucket], self.variables)

    def put(self, array: np.ndarray) -> jax.Array:
        """A batch's array on the device, or divided over the mesh.

        Args:
            array: [B, ...].
        """
        return jax.device_put(array, None if self.mesh is None else by_rows(self.mesh))

    @contextlib.contextmanager
    def memory(self, bucket: Size) -> Iterator[None]:
        """Turns XLA's error of too little memory into one that names the bucket.

        Args:
            bucket: (rows, columns) of the batch at work.

        Raises:
            MemoryError: instead of XLA's error.
        """
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) and "Out of memory" not in str(error):
                raise
            remedy = "make the batch, or the model's min_size and max_size, smaller"
            if self.batch_size == 1:
                remedy = "make the model's min_size and max_size smaller"
            raise MemoryError(
                f"out of memory in bucket {bucket[0]}x{bucket[1]} (rows x columns) in batches of "
                f"{self.batch_size}: {remedy}"
            ) from error

    def _compile(self, run: Callable[..., Any], shapes: tuple[Any, ...], bucket: Size) -> Callable[..., Any]:
        with self.memory(bucket):
            options = compiler_options(self.model.box_dtype, platform=platform_of(self.variables))
            program = jax.jit(on_mesh(run, self.mesh)).lower(*shapes).compile(options)
        give_memory_back()
        return program

    def _abstract(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        sharding = None if self.mesh is None else by_rows(self.mesh)
        return jax.ShapeDtypeStruct((self.batch_size, *shape), dtype, sharding=sharding)
