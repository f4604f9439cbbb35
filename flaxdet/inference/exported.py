"""``load_exported``: loads and runs the artifacts of ``export``."""

from __future__ import annotations

import datetime
import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np

from flaxdet.files import json_text, schema, tensor_file
from flaxdet.files.messages import one_line
from flaxdet.files.opening import HEAD, foreign_kind, open_regular
from flaxdet.images.buckets import Size
from flaxdet.images.transform import check_images
from flaxdet.inference.detect import ImageDetections
from flaxdet.inference.engine import out_of_memory, run
from flaxdet.inference.export import FORMAT, SIGNATURE, digest
from flaxdet.inference.samples import Sample, place, raw_squares, size_arrays
from flaxdet.structures import Detections, TransformConfig
from flaxdet.xla.options import NAMES, known

_GUARANTEED = 180  # days for which jax runs an exported program
_LONGEST = 300  # characters of an error of jax


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
        self.config = _config(signature)
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

    Warns where the artifact is more than 180 days old and another jax wrote it, since jax then no longer guarantees to
    run it, and says what to do.

    Args:
        folder: the folder that holds signature.json.

    Returns:
        A function of images. Each program is compiled on first use.

    Raises:
        ExportError: if a file is missing or was changed, or the artifact has another format, no program for the
            platform, or programs that this jax can't read; then the message says how to get others.
    """
    folder = Path(folder)
    signature = _read_signature(folder)
    contents = {part["file"]: _read_part(folder, part) for part in (signature["weights"], *signature["programs"])}
    platform = jax.export.default_export_platform()  # jax's backends call both "cuda" and "rocm" "gpu"
    if platform not in signature["platforms"]:
        raise ExportError(
            f"{folder}: was exported for {', '.join(signature['platforms'])}, this process runs on {platform}"
        )
    file = signature["weights"]["file"]
    try:
        weights = jax.device_put(tensor_file.read_bytes(contents[file]))
    except (ValueError, TypeError, MemoryError) as error:
        raise _error(folder / file, str(error)) from None
    programs = [_read_program(folder, signature, part, contents[part["file"]]) for part in signature["programs"]]
    for part, program in zip(signature["programs"], programs, strict=True):
        _check_program(folder / part["file"], program, weights, signature["raw_size"], part["batch"])
    _warn_of_age(folder, signature)

    @functools.cache
    def run(number: int) -> Callable[..., dict[str, jax.Array]]:
        given = signature["compiler_options"].get(platform, {})
        options = {name: value for name, value in given.items() if known(name, value)} or None
        program = jax.jit(programs[number].call, compiler_options=options)

        def call(*args: Any) -> dict[str, jax.Array]:
            try:
                return program(*args)
            except (ValueError, TypeError, RuntimeError) as error:
                if out_of_memory(error):
                    raise
                raise _unreadable(folder, signature, signature["programs"][number], error) from error

        return call

    return ExportedDetector(signature, weights, run)


def _error(path: Path, message: str) -> ExportError:
    return ExportError(one_line(f"{path}: {message}"))


def _read_signature(folder: Path) -> dict[str, Any]:
    """The content of signature.json, as the schema says."""
    path = folder / SIGNATURE
    try:
        signature = json_text.read(path)
        schema.record({"format": schema.integer(1)})(signature, "")
    except FileNotFoundError:
        raise ExportError(f"{folder}: expected a folder with {SIGNATURE}, which `flaxdet export` writes") from None
    except OSError as error:
        raise _error(path, f"cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise _error(path, f"expected the JSON that `flaxdet export` writes ({error})") from None
    if signature["format"] != FORMAT:
        raise ExportError(
            f"{path}: the artifact has format {signature['format']}, this flaxdet runs format {FORMAT}: export it "
            "again, or use the flaxdet that wrote it"
        )
    try:
        schema.SIGNATURE(signature, "")
        _config(signature)
        for platform, options in signature["compiler_options"].items():
            if unknown := sorted({*options} - NAMES):
                raise ValueError(f"compiler_options.{platform}.{unknown[0]} is no option that flaxdet sets")
        runs = [(*program["bucket"], program["batch"] or 1) for program in signature["programs"]]
        if len({*runs}) != len(runs):
            raise ValueError("programs has two of one bucket and batch size")
    except (ValueError, TypeError, OverflowError) as error:
        raise _error(path, f"expected the JSON that `flaxdet export` writes ({error})") from None
    return signature


def _config(signature: dict[str, Any]) -> TransformConfig:
    resize = signature["resize"]
    return TransformConfig(
        resize["min_size"],
        resize["max_size"],
        size_divisible=resize["size_divisible"],
        fixed_size=resize["fixed_size"],
    )


def _read_part(folder: Path, part: dict[str, Any]) -> bytes:
    """The content of a file that the signature names; checks the hash."""
    path = folder / part["file"]
    try:
        with open_regular(path) as file:
            content = file.read()
    except OSError as error:
        raise _error(path, f"{error.strerror or error}; an artifact needs it beside {SIGNATURE}") from None
    if digest(content) != part["sha256"]:
        kind = foreign_kind(content[:HEAD])
        what = f"; it {kind}" if kind else ""
        raise _error(path, f"is not the file that {SIGNATURE} was written with (sha256 differs){what}")
    return content


def _read_program(folder: Path, signature: dict[str, Any], part: dict[str, Any], content: bytes) -> jax.export.Exported:
    written = signature.get("calling_convention_version")
    low = jax.export.minimum_supported_calling_convention_version
    high = jax.export.maximum_supported_calling_convention_version
    if written is not None and not low <= written <= high:
        reason = f"its calling convention is {written}, and this jax knows {low} to {high}"
    else:
        try:
            return jax.export.deserialize(bytearray(content))
        except Exception as error:  # flatbuffers and jax raise many types of errors
            raise _unreadable(folder, signature, part, error) from error
    raise _unreadable(folder, signature, part, reason)


def _unreadable(folder: Path, signature: dict[str, Any], part: dict[str, Any], reason: object) -> ExportError:
    said = repr(reason) if isinstance(reason, KeyError) else str(reason).strip() or type(reason).__name__
    message = f"jax {jax.__version__} can't run the program ({said[:_LONGEST]}). {_advice(signature)}"
    return _error(folder / part["file"], message)


def _advice(signature: dict[str, Any]) -> str:
    """Advice for the user, if this version of jax can't run an artifact."""
    version = signature.get("jax", "of an unknown version")
    known_version = f", or pip install 'jax=={version}'" if "jax" in signature else ""
    return (
        f"The artifact was exported {_when(signature)}by jax {version}, and jax runs an exported program for "
        f"{_GUARANTEED} days: export it again from the weights of the model (flaxdet export OUT --weights FILE)"
        f"{known_version}"
    )


def _when(signature: dict[str, Any]) -> str:
    return f"on {signature['date']} " if "date" in signature else ""


def _warn_of_age(folder: Path, signature: dict[str, Any]) -> None:
    if "date" not in signature or signature.get("jax") == jax.__version__:
        return
    age = _today() - datetime.date.fromisoformat(signature["date"])
    if age.days > _GUARANTEED:
        warnings.warn(
            one_line(f"{folder}: this is jax {jax.__version__}, {age.days} days later. {_advice(signature)}"),
            stacklevel=3,
        )


def _today() -> datetime.date:
    return datetime.datetime.now(datetime.UTC).date()


def _check_program(path: Path, program: jax.export.Exported, weights: Any, raw: int, batch: int | None) -> None:
    """Raises ExportError unless the program takes the weights, and images as the signature says."""
    rows: Any = "batch" if batch is None else batch
    expected = [f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(weights)]
    expected += [f"uint8[{rows}, {raw}, {raw}, 3]", f"int32[{rows}, 2]", f"int32[{rows}, 2]"]
    found = [f"{aval.dtype}[{', '.join(map(str, aval.shape))}]" for aval in program.in_avals]
    structure = jax.tree.structure(((weights, 0, 0, 0), {}))
    if found != expected or program.in_tree != structure:
        pairs = zip(found, expected, strict=False)
        which = next((f": it takes {a}, expected {b}" for a, b in pairs if a != b), "")
        raise _error(path, f"is not a program for the weights and sizes that {SIGNATURE} names{which}")
    try:
        given = jax.tree.unflatten(program.out_tree, program.out_avals)
        shapes = {name: (str(aval.dtype), *map(str, aval.shape)) for name, aval in given.items()}
        _, rows, slots, _ = shapes["boxes"]
        wanted = {"boxes": (rows, slots, "4"), "scores": (rows, slots), "labels": (rows, slots), "valid": (rows, slots)}
        fits = {name: shape[1:] for name, shape in shapes.items()} == wanted
    except (AttributeError, KeyError, ValueError, TypeError):
        fits = False
    if not fits:
        raise _error(path, "is not a program that gives boxes, scores, labels and valid")
