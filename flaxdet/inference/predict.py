"""Images of any size in, detections out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from flaxdet.images.transform import check_canvas, check_images
from flaxdet.inference.detect import Found
from flaxdet.inference.engine import run
from flaxdet.inference.folded import folded
from flaxdet.inference.programs import JittedPrograms
from flaxdet.inference.samples import place
from flaxdet.models.detector import Detector


def predict(
    model: Detector, variables: Any, images: Sequence[Any], *, canvas: Literal["image", "batch"] = "image"
) -> list[Found]:
    """Detects objects in images of any sizes.

    Compiles a program for each canvas size, and keeps it for the life of the process. BatchNorm is folded into the
    convolutions, as ``Predictor`` does; a model that is folded already, or has nothing to fold, runs as it is.

    Args:
        model: from a builder or ``flaxdet.load``.
        variables: {"params": ..., "batch_stats": ...}. For those in jax arrays the folded ones are computed once and
            kept as long as these live, in as much memory again; for those in numpy arrays at every call.
        images: arrays [H, W, 3], RGB, all uint8 or all floats in [0, 1].
        canvas: "image": the answer for an image is the one that it gets alone. "batch": all images share the
            largest canvas, which reproduces torchvision's answer for this very list.

    Returns:
        For each image {"boxes": [N, 4] xyxy in pixels of the original image, "scores": [N] in [0, 1],
        "labels": [N] int32}, best first.

    Raises:
        TypeError: for images of another or of mixed dtypes.
        ValueError: for something that is no image, naming it by its number, an unknown ``canvas``, or variables that
            don't fit the model.
        MemoryError: if the device has too little memory for an image, or for the batch.
    """
    check_canvas(canvas, ("image", "batch"))
    arrays = check_images(images)
    # alone, the canvas of an image is the bucket: no masks are traced, and nothing is computed beyond the canvas
    samples = [place(i, array, f"image {i}", model.transform, None) for i, array in enumerate(arrays)]
    if not samples:
        return []
    count = 1
    if canvas == "batch":
        largest = max(sample.canvas[0] for sample in samples), max(sample.canvas[1] for sample in samples)
        samples, count = [sample._replace(bucket=largest) for sample in samples], len(samples)
    model, variables = folded(model, variables)
    programs = JittedPrograms(model, variables, batch_size=count)
    return list(run(samples, programs))  # pyright: ignore[reportReturnType]
