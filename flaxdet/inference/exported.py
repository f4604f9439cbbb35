"""``load_exported``: the artifacts of ``export`` in use."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
import safetensors.numpy

from flaxdet.images.buckets import Size, assign
from flaxdet.images.transform import canvas_size, check_images, resized_size
from flaxdet.inference.export import FORMAT, SIGNATURE, digest
from flaxdet.inference.predict import unpad
from flaxdet.structures import Detections, TransformConfig
from flaxdet.xla import routes


class ExportError(ValueError):
    """A folder holds no artifact that this flaxdet can run; the message names it and what was expected."""


@dataclass(frozen=True)
class ExportedDetector:
    """An artifact of ``export`` in use: what its README page does, with checks.

    Attributes:
        signature: the content of signature.json.
        weights: arrays by dotted name.
    """

    signature: dict[str, Any]
    weights: dict[str, Any]
    _run: Callable[[int], Callable[..., dict[str, jax.Array]]]

    def __call__(self, images: Sequence[Any]) -> list[dict[str, np.ndarray]]:
        """Detects objects in images of any sizes up to the artifact's raw size.

        Images of a bucket run together where the artifact has programs of several ``batch_sizes``. On a CPU the larger
        programs run while enough images are left to fill them; elsewhere the rest of the images runs in the smallest
        program that holds it. A program of any batch size runs for each image alone, so that it is compiled once.

        Args:
            images: arrays [H, W, 3] uint8, RGB.

        Returns:
            As ``flaxdet.predict``: for each image {"boxes": [N, 4] xyxy in its pixels, "scores": [N], "labels": [N]}.

        Raises:
            TypeError: for images that are not uint8.
            ValueError: for something that is no image, is larger than the raw size, or fits no bucket, by its number.
        """
        signature = self.signature
        raw, resize = signature["raw_size"], signature["resize"]
        config = TransformConfig(
            resize["min_size"],
            resize["max_size"],
            size_divisible=resize["size_divisible"],
            fixed_size=resize["fixed_size"],
        )
        programs: dict[Size, dict[int, int]] = {}  # by bucket and batch size, their numbers
        for number, program in enumerate(signature["programs"]):
            programs.setdefault((program["bucket"][0], program["bucket"][1]), {})[program["batch"] or 1] = number
        buckets = list(programs)
        waiting: dict[Size, list[tuple[int, np.ndarray, Size]]] = {}
        arrays = check_images(images)
        for i, image in enumerate(arrays):
            size = (image.shape[0], image.shape[1])
            if image.dtype != np.uint8:
                raise TypeError(f"image {i}: expected uint8, got {image.dtype}")
            if max(size) > raw:
                raise ValueError(f"image {i}: expected at most {raw} pixels a side, got {size[0]}x{size[1]}")
            new_size = resized_size(size, config, name=f"image {i}")
            own = np.array([canvas_size(new_size, config)])
            bucket = buckets[assign(own, buckets, names=[f"image {i}"])[0]]
            waiting.setdefault(bucket, []).append((i, image, new_size))
        results: list[dict[str, np.ndarray]] = [{}] * len(arrays)
        for bucket, queue in waiting.items():
            for count in split_batch(len(queue), programs[bucket], fill=routes.platform() != "cpu"):
                batch, queue = queue[:count], queue[count:]
                found = self._detect(programs[bucket][count], batch + batch[:1] * (count - len(batch)))
                for (i, _, _), row in zip(batch, found, strict=False):  # the rest are copies
                    results[i] = row
        return results

    def _detect(self, number: int, batch: Sequence[tuple[int, np.ndarray, Size]]) -> list[dict[str, np.ndarray]]:
        """Runs a program on as many images (number, pixels, size after the resize) as it takes."""
        raw = self.signature["raw_size"]
        padded = np.zeros((len(batch), raw, raw, 3), np.uint8)
        for place, (_, image, _) in zip(padded, batch, strict=True):
            place[: image.shape[0], : image.shape[1]] = image
        sizes = np.array([image.shape[:2] for _, image, _ in batch], np.int32)
        new_sizes = np.array([new_size for _, _, new_size in batch], np.int32)
        found = self._run(number)(self.weights, padded, sizes, new_sizes)
        return unpad(Detections(**found))


def split_batch(count: int, sizes: Iterable[int], *, fill: bool) -> list[int]:
    """The batches that some images run in, by programs of fixed batch sizes.

    Args:
        count: images.
        sizes: batch sizes of the programs.
        fill: whether a batch that is not full costs less than several small ones, as on a GPU or TPU.

    Returns:
        The batch size of each call; at most the last call is filled up with copies.
    """
    calls = []
    while count > 0:
        smaller, larger = [size for size in sizes if size <= count], [size for size in sizes if size >= count]
        calls.append(min(larger) if larger and (fill or not smaller) else max(smaller))
        count -= calls[-1]
    return calls


def load_exported(folder: str | Path) -> ExportedDetector:
    """Reads an artifact of ``export``.

    Args:
        folder: with signature.json.

    Returns:
        A function of images; each program is compiled when first needed.

    Raises:
        ExportError: if a file is missing or not the one that was exported, or the artifact's format is another's.
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
    platform = jax.export.default_export_platform()  # default_backend() calls both "cuda" and "rocm" "gpu"
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
