"""Exports a detector as StableHLO: a folder of programs that run with jax, without flaxdet.

The folder holds signature.json, weights.safetensors, and one file per bucket: a serialised ``jax.export.Exported``,
lowered for several platforms. A program is the whole pipeline from 8-bit pixels to detections: resize, normalise,
network, decode, NMS. README.md shows how to run a program with jax alone.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from flax import traverse_util

from flaxdet.files.checkpoint import replacing, write_safetensors
from flaxdet.files.models import check_categories
from flaxdet.files.variables import flat_arrays
from flaxdet.images.buckets import Size, model_buckets
from flaxdet.inference.detect import detect
from flaxdet.inference.programs import resize_to
from flaxdet.models.detector import Detector
from flaxdet.models.folding import fold_batch_norm, store_in_compute_dtype
from flaxdet.structures import ImageBatch
from flaxdet.xla.options import compiler_options

FORMAT = 1
PLATFORMS = ("cpu", "cuda", "tpu")
SIGNATURE, WEIGHTS = "signature.json", "weights.safetensors"


def export(
    folder: str | Path,
    model: Detector,
    variables: Any,
    *,
    buckets: Sequence[Size] | None = None,
    batch_sizes: Sequence[int] | None = None,
    raw_size: int = 1280,
    platforms: Sequence[str] = PLATFORMS,
    fold: bool = True,
    categories: Sequence[str] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Writes a detector as StableHLO programs, and the weights of the detector.

    A program is ``(weights, images, size, new_size) -> detections``:

    - images: [B, raw_size, raw_size, 3] uint8, each image in the top left corner;
    - size: [B, 2] int32, (rows, columns) of each image;
    - new_size: [B, 2] int32, (rows, columns) of each image after the resize. The caller computes ``new_size`` in double
      precision, as torchvision does (README.md): in float32 on a device, some sizes would be wrong by a pixel;
    - detections: {"boxes": [B, K, 4] xyxy in pixels of the given image, "scores": [B, K], "labels": [B, K] int32,
      "valid": [B, K] bool}. Everything beyond the canvas of an image is masked, as everywhere in flaxdet.

    Args:
        folder: the folder to write; created if it does not exist. Files of an earlier artifact are replaced,
            signature.json last.
        model: from a builder or ``flaxdet.load``.
        variables: {"params": ..., "batch_stats": ...} of the model.
        buckets: (rows, columns) after the resize, multiples of 32; default ``default_buckets(model.transform)``. A
            model with ``fixed_size`` has one canvas; if this canvas is the only bucket, any size is accepted.
        batch_sizes: fixed batch sizes, one program each; default one program with a symbolic batch size.
        raw_size: side of the square input arrays, in pixels. Larger photos must be made smaller first.
        platforms: platforms that each program is lowered for: "cpu", "cuda", "rocm" and "tpu".
        fold: fold BatchNorm into the convolutions.
        categories: name of each label, label 0 first, for the signature.
        progress: shows a progress bar.

    Returns:
        The content of signature.json.

    Raises:
        ValueError: for a bucket or a ``size_divisible`` that is no multiple of 32, if canvases may be smaller than the
            bucket; for sizes below 1, no platform, an unknown platform, or a number of categories that isn't
            num_classes.
        OSError: if the folder can't be written.
    """
    from tqdm import tqdm

    config, folder = model.transform, Path(folder)
    shapes, masked = model_buckets(buckets, config)
    platforms = (platforms,) if isinstance(platforms, str) else tuple(platforms)
    if raw_size < 1 or not all(size >= 1 for size in batch_sizes or ()):
        raise ValueError(f"raw_size and batch_sizes should be at least 1, got {raw_size} and {batch_sizes}")
    if not platforms or not {*platforms} <= {*PLATFORMS, "rocm"}:
        raise ValueError(f'platforms should be some of "cpu", "cuda", "rocm" and "tpu", got {platforms}')
    check_categories(folder, model, categories)
    if fold:
        model, variables = fold_batch_norm(model, variables)
        variables = store_in_compute_dtype(model, variables)
    weights = flat_arrays(variables, sep=".")
    abstract = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in weights.items()}
    batches: list[Any] = list(batch_sizes) if batch_sizes else [jax.export.symbolic_shape("batch")[0]]
    programs = []
    for bucket, batch in tqdm(
        [(bucket, batch) for bucket in shapes for batch in batches], desc="lowering", disable=not progress
    ):
        exported = jax.export.export(jax.jit(_pipeline(model, bucket, masked)), platforms=platforms)(
            abstract,
            jax.ShapeDtypeStruct((batch, raw_size, raw_size, 3), jnp.uint8),
            jax.ShapeDtypeStruct((batch, 2), jnp.int32),
            jax.ShapeDtypeStruct((batch, 2), jnp.int32),
        )
        fixed = batch if isinstance(batch, int) else None
        name = f"detect-{bucket[0]}x{bucket[1]}{'' if fixed is None else f'-batch{fixed}'}.stablehlo"
        content = bytes(exported.serialize())
        folder.mkdir(parents=True, exist_ok=True)  # only now: a failed export leaves no empty folder
        with replacing(folder / name) as file:
            file.write(content)
        programs.append({"file": name, "bucket": list(bucket), "batch": fixed, "sha256": digest(content)})
    write_safetensors(folder / WEIGHTS, weights, {"format": str(FORMAT)})
    signature = {
        "format": FORMAT,
        "model": type(model).__name__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "jax": jax.__version__,
        "calling_convention_version": jax.export.maximum_supported_calling_convention_version,
        "platforms": list(platforms),
        "raw_size": raw_size,
        "inputs": ["weights", "images [B, raw, raw, 3] uint8", "size [B, 2] int32", "new_size [B, 2] int32"],
        "outputs": ["boxes [B, K, 4]", "scores [B, K]", "labels [B, K] int32", "valid [B, K] bool"],
        "resize": {
            "min_size": config.min_size[-1],
            "max_size": config.max_size,
            "fixed_size": config.fixed_size,
            "size_divisible": config.size_divisible,
        },
        "compiler_options": {"cpu": compiler_options(model.box_dtype, platform="cpu") or {}},
        "categories": None if categories is None else list(categories),
        "weights": {"file": WEIGHTS, "sha256": digest((folder / WEIGHTS).read_bytes())},
        "programs": programs,
    }
    with replacing(folder / SIGNATURE) as file:
        file.write((json.dumps(signature, indent=1) + "\n").encode())
    return signature


def _pipeline(model: Detector, bucket: Size, masked: bool) -> Callable[..., dict[str, jax.Array]]:
    resize = resize_to(model, bucket)

    def pipeline(weights: dict[str, Any], images: Any, size: Any, new_size: Any) -> dict[str, jax.Array]:
        step = int(model.transform.size_divisible)
        batch = ImageBatch(
            pixels=resize(images, size, new_size),
            size=new_size,
            original_size=size,
            canvas=-(-new_size // step) * step if masked else None,
        )
        detections = detect(model, traverse_util.unflatten_dict(weights, sep="."), batch)
        return {
            "boxes": detections.boxes,
            "scores": detections.scores,
            "labels": detections.labels,
            "valid": detections.valid,
        }

    return pipeline


def digest(content: bytes) -> str:
    """The hash of a file's content, as stored in signature.json."""
    return hashlib.sha256(content).hexdigest()
