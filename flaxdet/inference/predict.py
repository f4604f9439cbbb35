"""Detection in images of any size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from flaxdet.images.transform import check_canvas, check_images
from flaxdet.inference.detect import ImageDetections
from flaxdet.inference.engine import run
from flaxdet.inference.folded import folded
from flaxdet.inference.programs import JittedPrograms
from flaxdet.inference.samples import place
from flaxdet.models.detector import Detector


def predict(
    model: Detector, variables: Any, images: Sequence[Any], *, canvas: Literal["image", "batch"] = "image"
) -> list[ImageDetections]:
    """Detects objects in images of any sizes.

    Compiles one program per canvas size, and caches the programs for the life of the process. Folds BatchNorm into the
    convolutions, as ``Predictor`` does, unless the model is folded already or has nothing to fold.

    Args:
        model: from a builder or ``flaxdet.load``.
        variables: {"params": ..., "batch_stats": ...}. For jax arrays, the folded variables are computed once and
            cached as long as ``variables`` live, which doubles the memory. For numpy arrays, they are computed at every
            call.
        images: arrays [H, W, 3], RGB, all uint8 or all floats in [0, 1].
        canvas: "image": each image has a separate canvas, so the detections in an image do not depend on the other
            images. "batch": all images share the largest canvas, which reproduces torchvision's detections for a batch
            of these images.

    Returns:
        For each image {"boxes": [N, 4] xyxy in pixels of the original image, "scores": [N] in [0, 1],
        "labels": [N] int32}, best first.

    Raises:
        TypeError: for images of other dtypes or of mixed dtypes.
        ValueError: for an array that is no image (the message has the number of the image), an unknown ``canvas``, or
            variables that don't fit the model.
        MemoryError: if the device has too little memory for an image, or for the batch.
    """
    check_canvas(canvas, ("image", "batch"))
    arrays = check_images(images)
    # the bucket of an image is the canvas: so no masks are traced, and nothing is computed beyond the canvas
    samples = [place(i, array, f"image {i}", model.transform, None) for i, array in enumerate(arrays)]
    if not samples:
        return []
    count = 1
    if canvas == "batch":
        largest = max(sample.canvas[0] for sample in samples), max(sample.canvas[1] for sample in samples)
        samples, count = [sample._replace(bucket=largest) for sample in samples], len(samples)
    model, variables = folded(model, variables)
    programs = JittedPrograms(model, variables, batch_size=count)
    return list(run(samples, programs))
