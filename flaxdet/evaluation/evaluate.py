"""COCO's average precision of a model on a data set."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxdet.data.coco import CocoDataset
from flaxdet.data.samples import Dataset
from flaxdet.evaluation.coco_metrics import (
    ClassResult,
    CocoResult,
    evaluate_results,
    read_annotations,
    require_pycocotools,
)
from flaxdet.images.buckets import assign, canvases, choose_buckets
from flaxdet.inference.detect import ImageDetections
from flaxdet.inference.engine import stream
from flaxdet.inference.folded import folded
from flaxdet.inference.programs import JittedPrograms
from flaxdet.inference.samples import Sample, place
from flaxdet.models.detector import Detector

__all__ = ["ClassResult", "CocoResult", "coco_results", "detect_dataset", "evaluate", "evaluate_results"]

# Most programs to compile: each takes a few seconds, and saves computation on pixels beyond the canvases.
_BUCKETS = 6


def evaluate(
    model: Detector,
    variables: Any,
    dataset: CocoDataset,
    *,
    batch_size: int = 1,
    workers: int = 2,
    progress: bool = False,
) -> CocoResult:
    """COCO's figures of a model on a data set, by pycocotools.

    The annotations count as the file has them, crowds and boxes without an area included, so that the figures are the
    figures of torchvision's evaluation. Detections whose label is none of the data set's categories are dropped.

    Args:
        model: from a builder or ``flaxdet.load``.
        variables: {"params": ..., "batch_stats": ...} of the model. Variables replicated over several devices are
            used on the first device of this process; nothing is communicated, so that one process may evaluate alone.
        dataset: from ``flaxdet.data.read_coco``.
        batch_size: images per call of the model; the figures do not depend on it.
        workers: threads that read images ahead of the device.
        progress: shows a bar.

    Returns:
        The figures: ``print(result.table())``, ``result.to_json()``.

    Raises:
        ValueError: for an empty data set, annotations that are not in COCO's format, or an image that can't be read
            (``ImageError``); the message names the image.
        MemoryError: if the device has too little memory for a batch; names the bucket.
        ImportError: without pycocotools.
    """
    require_pycocotools()
    truth = read_annotations(dataset.annotations)  # faults show before the first image is computed
    result, _ = evaluate_with_rows(
        model, variables, dataset, truth, batch_size=batch_size, workers=workers, progress=progress
    )
    return result


def evaluate_with_rows(
    model: Detector,
    variables: Any,
    dataset: CocoDataset,
    truth: Mapping[str, Any],
    *,
    batch_size: int,
    workers: int,
    progress: bool,
) -> tuple[CocoResult, list[dict[str, Any]]]:
    """``evaluate``, with annotations that are read already, and with the detections too.

    Args:
        model: as for ``evaluate``.
        variables: as for ``evaluate``.
        dataset: as for ``evaluate``.
        truth: ``read_annotations`` of the data set's annotations.
        batch_size: images per call of the model.
        workers: threads that read images.
        progress: shows a bar.

    Returns:
        The figures, and the detections as rows of COCO's format of results.

    Raises:
        ValueError, MemoryError, ImportError: as ``evaluate``.
    """
    detections = detect_dataset(model, variables, dataset, batch_size=batch_size, workers=workers, progress=progress)
    image_ids = [dataset[i].image_id for i in range(len(dataset))]
    rows = coco_results(detections, image_ids, dataset.category_ids)
    return evaluate_results(rows, truth, image_ids=image_ids), rows


def coco_results(
    detections: Sequence[Mapping[str, Any]],
    image_ids: Sequence[int | str],
    category_ids: Mapping[int, int] | None = None,
) -> list[dict[str, Any]]:
    """Converts the result of ``predict`` into rows of COCO's format of results, ready for JSON.

    Args:
        detections: for each image {"boxes": [N, 4] xyxy in pixels of the image, "scores": [N], "labels": [N]}.
        image_ids: COCO's id of each image; may be a string.
        category_ids: COCO's category id of each label; detections of other labels are left out. Default: the labels
            themselves are the ids.

    Returns:
        Rows {"image_id", "category_id", "bbox": [x, y, width, height], "score"}, in the order given.

    Raises:
        ValueError: if the two lists differ in length.
    """
    if len(detections) != len(image_ids):
        raise ValueError(f"expected an id for each image, got {len(image_ids)} ids for {len(detections)} images")
    rows = []
    for detection, image_id in zip(detections, image_ids, strict=True):
        boxes = np.asarray(detection["boxes"], np.float64)
        boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
        for box, score, label in zip(boxes.tolist(), detection["scores"], detection["labels"], strict=True):
            category = int(label) if category_ids is None else category_ids.get(int(label))
            if category is not None:
                key = image_id if isinstance(image_id, str) else int(image_id)
                row = {"image_id": key, "category_id": int(category), "bbox": box, "score": float(score)}
                rows.append(row)
    return rows


def detect_dataset(
    model: Detector, variables: Any, dataset: Dataset, *, batch_size: int = 1, workers: int = 2, progress: bool = False
) -> list[ImageDetections]:
    """Detects objects in every image of a data set: ``predict`` for thousands of images.

    Threads read images ahead of the device, few at a time. Images run in few buckets, each image on a separate canvas:
    the detections of an image are the detections of the image alone, up to rounding. BatchNorm is folded, as in
    ``predict``, except in variables divided over several devices.

    Args:
        model: from a builder or ``flaxdet.load``.
        variables: variables of the model, as for ``evaluate``.
        dataset: from ``flaxdet.data.read_coco``.
        batch_size: images per call of the model.
        workers: threads that read images.
        progress: shows a bar.

    Returns:
        For each image, in the order of the data set, {"boxes": [N, 4] xyxy in pixels of the original image,
        "scores": [N] in [0, 1], "labels": [N] int32}, best first.

    Raises:
        ValueError: for an empty data set, or an image that can't be read or is too elongated; the message names the
            image.
        MemoryError: if the device has too little memory for a batch; names the bucket.
    """
    from tqdm import tqdm

    for name, value in (("batch_size", batch_size), ("workers", workers)):
        if value < 1:
            raise ValueError(f"{name} should be at least 1, got {value}")
    if not len(dataset):
        raise ValueError("expected a data set with at least one image, got an empty one")
    config, records = model.transform, [dataset[i] for i in range(len(dataset))]
    sizes = [record.size for record in records]
    image_canvases = canvases(sizes, config, names=[record.path for record in records])
    # canvases of sizes that are no multiples of 32 can't be smaller than their bucket: every canvas gets a bucket
    buckets = choose_buckets(sizes, config, len(image_canvases) if config.size_divisible % 32 else _BUCKETS)
    assigned = assign(image_canvases, buckets)
    order = np.argsort(assigned, kind="stable").tolist()  # bucket by bucket, so that few images wait for a full batch
    smaller = (image_canvases != np.asarray(buckets)[assigned]).any(axis=1)
    masked = {buckets[number] for number in np.unique(assigned[smaller])}
    model, variables = folded(model, on_one_device(variables))
    count = min(batch_size, len(order))
    programs = JittedPrograms(model, variables, batch_size=count, masked=masked)

    def load(numbered: tuple[int, int]) -> Sample:
        number, index = numbered
        return place(number, dataset.read_image(index), str(records[index].path), config, buckets)

    results: list[Any] = [None] * len(order)
    with (
        contextlib.closing(
            stream(load, enumerate(order), programs, ahead=batch_size + workers, workers=workers, patience=count)
        ) as detections,
        tqdm(total=len(order), unit="image", disable=not progress) as bar,
    ):
        for index, detection in zip(order, detections, strict=True):
            results[index] = detection
            bar.update()
    return results


def on_one_device(variables: Any) -> Any:
    """Moves variables to one device, so that no call has to transfer them and a process can compute alone.

    Args:
        variables: a pytree of numpy or jax arrays. A replicated array is taken from one of its devices.

    Returns:
        The variables on one device; the argument itself if arrays are divided over several devices.
    """
    leaves = [leaf for leaf in jax.tree.leaves(variables) if isinstance(leaf, jax.Array)]
    divided = any(not leaf.is_fully_replicated for leaf in leaves)
    if divided:  # jit computes on the devices that hold the parts
        return variables

    def move(x: Any) -> jax.Array:
        if not isinstance(x, jax.Array):
            return jnp.asarray(x)
        return x if len(x.sharding.device_set) == 1 else x.addressable_data(0)

    return jax.tree.map(move, variables)
