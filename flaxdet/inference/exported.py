"""``load_exported``: loads and runs the artifacts of ``export``."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
import safetensors.numpy

from flaxdet.images.buckets import Size
from flaxdet.images.transform import check_images
from flaxdet.inference.detect import ImageDetections
from flaxdet.inference.engine import run
from flaxdet.inference.export import FORMAT, SIGNATURE, digest
from flaxdet.inference.samples import Sample, place, raw_squares, size_arrays
from flaxdet.structures import Detections, TransformConfig


class ExportError(ValueError):
    """A folder holds no artifact that this flaxdet can run; the message says which file is wrong, and why."""


@dataclass(frozen=True)
class ExportedDetector:
    """A loaded artifact of ``export``: a function of images. Checks the images.

    Attributes:
        signature: the content of signature.json.
        weights: arrays by dotted name.
    """

    signature: dict[str, Any]
    weights: dict[str, Any]
    _run: Callable[[int], Callable[..., dict[str, jax.Array]]]

    def __call__(self, images: Sequence[Any]) -> list[ImageDetections]:
        """Detects objects in images of any sizes up to the artifact's raw size.

        If the artifact has programs of fixed ``batch_sizes``, images of a bucket run together. On a CPU, the next batch
        runs in the largest program that the remaining images fill. On other devices, the last images of a bucket run in
        the smallest program that holds them. A program with a symbolic batch size runs on one image per call, so that
        the program is compiled only once.

        Args:
            images: arrays [H, W, 3] uint8, RGB.

        Returns:
            As ``flaxdet.predict``: for each image {"boxes": [N, 4] xyxy in pixels of the image, "scores": [N],
            "labels": [N]}.

        Raises:
            TypeError: for images that are not uint8.
            ValueError: for an array that is no image, is larger than the raw size, or fits no bucket; the message has
                the number of the image.
            MemoryError: if the device has too little memory for a batch of a bucket.
        """
        programs = _ArtifactPrograms(self)
        raw, arrays, samples = self.signature["raw_size"], check_images(images), []
        for i, image in enumerate(arrays):
            if image.dtype != np.uint8:
                raise TypeError(f"image {i}: expected uint8, got {image.dtype}")
            if max(image.shape[:2]) > raw:
                raise ValueError(
                    f"image {i}: expected at most {raw} pixels a side, got {image.shape[0]}x{image.shape[1]}"
                )
            samples.append(place(i, image, f"image {i}", programs.config, programs.buckets))
        return list(run(samples, programs))


class _ArtifactPrograms:
    """The programs of an artifact, by bucket and batch size; a symbolic batch size counts as 1."""

    def __init__(self, artifact: ExportedDetector):
        self._artifact, signature = artifact, artifact.signature
        resize = signature["resize"]
        self.config = TransformConfig(
            resize["min_size"],
            resize["max_size"],
            size_divisible=resize["size_divisible"],
            fixed_size=resize["fixed_size"],
        )
        self._numbers: dict[Size, dict[int, int]] = {}
        for number, program in enumerate(signature["programs"]):
            rows, columns = program["bucket"]
            self._numbers.setdefault((rows, columns), {})[program["batch"] or 1] = number
        self.buckets = list(self._numbers)

    def batch_sizes(self, bucket: Size) -> Sequence[int]:
        """As ``engine.Programs``."""
        return tuple(self._numbers[bucket])

    def masked(self, bucket: Size) -> bool:
        """As ``engine.Programs``. An artifact without masks has only one bucket, so the answer is irrelevant."""
        del bucket
        return True

    def start(self, bucket: Size, rows: Sequence[Sample]) -> Detections:
        """As ``engine.Programs``."""
        program = self._artifact._run(self._numbers[bucket][len(rows)])
        size, new_size, _ = size_arrays(rows)
        pixels = raw_squares(rows, self._artifact.signature["raw_size"])
        return Detections(**program(self._artifact.weights, pixels, size, new_size))


def load_exported(folder: str | Path) -> ExportedDetector:
    """Reads an artifact of ``export``.

    Args:
        folder: the folder that holds signature.json.

    Returns:
        A function of images. Each program is compiled on first use.

    Raises:
        ExportError: if a file is missing or was changed, or the artifact has another format or no program for the
            platform.
    """
    folder = Path(folder)
    try:
        signature = json.loads((folder / SIGNATURE).read_text())
        version = signature["format"]
    except FileNotFoundError:
        raise ExportError(f"{folder}: expected a folder with {SIGNATURE}, which `flaxdet export` writes") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{folder / SIGNATURE}: expected the JSON that `flaxdet export` writes ({error})") from None
    if version != FORMAT:
        raise ExportError(
            f"{folder / SIGNATURE}: the artifact has format {version}, this flaxdet runs format {FORMAT}: export it "
            "again, or use the flaxdet that wrote it"
        )
    contents = {}
    for part in (signature["weights"], *signature["programs"]):
        path = folder / part["file"]
        try:
            contents[part["file"]] = path.read_bytes()
        except OSError as error:
            raise ExportError(f"{path}: {error.strerror}; an artifact needs it beside {SIGNATURE}") from None
        if digest(contents[part["file"]]) != part["sha256"]:
            raise ExportError(f"{path}: is not the file that {SIGNATURE} was written with (sha256 differs)")
    platform = jax.export.default_export_platform()  # jax's backends call both "cuda" and "rocm" "gpu"
    if platform not in signature["platforms"]:
        raise ExportError(
            f"{folder}: was exported for {', '.join(signature['platforms'])}, this process runs on {platform}"
        )

    @functools.cache
    def run(number: int) -> Callable[..., dict[str, jax.Array]]:
        exported = jax.export.deserialize(bytearray(contents[signature["programs"][number]["file"]]))
        options = signature["compiler_options"].get(platform) or None
        return jax.jit(exported.call, compiler_options=options)

    weights = jax.device_put(safetensors.numpy.load(contents[signature["weights"]["file"]]))
    return ExportedDetector(signature, weights, run)
