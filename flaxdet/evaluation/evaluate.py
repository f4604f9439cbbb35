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
from flaxdet.inference.engine import stream
from flaxdet.inference.folded import folded
from flaxdet.inference.programs import JittedPrograms
from flaxdet.inference.samples import Sample, place
from flaxdet.models.detector import Detector

__all__ = ["ClassResult", "CocoResult", "coco_results", "detect_dataset", "evaluate", "evaluate_results"]

_BUCKETS = 6  # programs to compile at most: a few seconds each, against what is computed beyond the canvases


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

    The annotations count as their file has them, so that the figures are those of torchvision's own evaluation, crowds
    and boxes without an area included. Detections of labels that are none of the data set's categories are dropped.

    Args:
        model: from a builder or ``flaxdet.load``.
        variables: its ``{"params": ..., "batch_stats": ...}``. Those replicated over several devices are used on the
            first device of this process; nothing is communicated, so that one process may evaluate alone.
        dataset: from ``flaxdet.data.read_coco``.
        batch_size: images a call of the model; the answer does not depend on it.
        workers: threads that read images ahead of the device.
        progress: shows a bar.

    Returns:
        The figures: ``print(result.table())``, ``result.to_json()``.

    Raises:
        ValueError: for an empty data set, annotations that are not COCO's, or an image that can't be read
            (``ImageError``), naming it.
        MemoryError: if the device has too little memory for a batch; names the bucket.
        ImportError: without pycocotools.
    """
    require_pycocotools()
    truth = read_annotations(dataset.annotations)  # faults show before the first image is computed
    found = detect_dataset(model, variables, dataset, batch_size=batch_size, workers=workers, progress=progress)
    image_ids = [dataset[i].image_id for i in range(len(dataset))]
    rows = coco_results(found, image_ids, dataset.category_ids)
    return evaluate_results(rows, truth, image_ids=image_ids)


def coco_results(
    detections: Sequence[Mapping[str, Any]],
    image_ids: Sequence[int],
    category_ids: Mapping[int, int] | None = None,
) -> list[dict[str, Any]]:
    """What ``predict`` returns, as rows of COCO's format of results, ready for JSON.

    Args:
        detections: for each image {"boxes": [N, 4] xyxy in its pixels, "scores": [N], "labels": [N]}.
        image_ids: COCO's id of each image.
        category_ids: COCO's id of each label; detections of other labels are left out. Default: labels are the ids.

    Returns:
        Rows {"image_id", "category_id", "bbox": [x, y, width, height], "score"}, in the order given.

    Raises:
        ValueError: if the two lists differ in length.
    """
    if len(detections) != len(image_ids):
        raise ValueError(f"expected an id for each image, got {len(image_ids)} ids for {len(detections)} images")
    rows = []
    for found, image_id in zip(detections, image_ids, strict=True):
        boxes = np.asarray(found["boxes"], np.float64)
        boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
        for box, score, label in zip(boxes.tolist(), found["scores"], found["labels"], strict=True):
            category = int(label) if category_ids is None else category_ids.get(int(label))
            if category is not None:
                row = {"image_id": int(image_id), "category_id": int(category), "bbox": box, "score": float(score)}
                rows.append(row)
    return rows


def detect_dataset(
    model: Detector,
    variables: Any,
    dataset: Dataset,
    *,
    batch_size: int = 1,
    workers: int = 2,
    progress: bool = False,
) -> list[dict[str, np.ndarray]]:
    """Detects objects in every image of a data set: ``predict`` for thousands of images.

    Images are read by threads ahead of the device, few at a time, and run in few buckets, each on its own canvas, so
    that the answer for an image is the one that it gets alone, up to rounding. BatchNorm is folded, as in ``predict``;
    variables divided over several devices are used as they are.

    Args:
        model: from a builder or ``flaxdet.load``.
        variables: its variables, as ``evaluate`` takes them.
        dataset: from ``flaxdet.data.read_coco``.
        batch_size: images a call of the model.
        workers: threads that read images.
        progress: shows a bar.

    Returns:
        In the order of the data set {"boxes": [N, 4] xyxy in pixels of the original image, "scores": [N] in [0, 1],
        "labels": [N] int32}, best first.

    Raises:
        ValueError: for an empty data set, or an image that can't be read or is too elongated, naming it.
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
    own = canvases(sizes, config, names=[record.path for record in records])
    # canvases that 32 doesn't divide can't be smaller than their bucket
    buckets = choose_buckets(sizes, config, len(own) if config.size_divisible % 32 else _BUCKETS)
    assigned = assign(own, buckets)
    order = np.argsort(assigned, kind="stable").tolist()  # bucket by bucket, so that few images wait for others
    smaller = (own != np.asarray(buckets)[assigned]).any(axis=1)
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
        ) as found,
        tqdm(total=len(order), unit="image", disable=not progress) as bar,
    ):
        for index, detections in zip(order, found, strict=True):
            results[index] = detections
            bar.update()
    return results


def on_one_device(variables: Any) -> Any:
    """Variables on one device, so that no call has to carry them there and a process can compute alone.

    Args:
        variables: a pytree of numpy or jax arrays; replicated ones are taken from one of their devices.

    Returns:
        The same on one device; unchanged if tensors are divided over several.
    """
    leaves = [leaf for leaf in jax.tree.leaves(variables) if isinstance(leaf, jax.Array)]
    spread = any(not leaf.is_fully_replicated for leaf in leaves)
    if spread:  # parts of tensors on several devices: jit computes where they are
        return variables

    def one(x: Any) -> jax.Array:
        if not isinstance(x, jax.Array):
            return jnp.asarray(x)
        return x if len(x.sharding.device_set) == 1 else x.addressable_data(0)

    return jax.tree.map(one, variables)
