"""COCO's average precision of a model on a data set."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxdet.data.batches import Batch, EvalPlan
from flaxdet.data.coco import CocoDataset
from flaxdet.data.samples import Dataset
from flaxdet.evaluation.coco_metrics import (
    ClassResult,
    CocoResult,
    evaluate_results,
    read_annotations,
    require_pycocotools,
)
from flaxdet.images.ahead import read_ahead
from flaxdet.images.buckets import Size, canvases, choose_buckets
from flaxdet.images.transform import transform
from flaxdet.inference.predict import jitted_detect, unpad
from flaxdet.models.detector import Detector
from flaxdet.structures import Detections, TransformConfig

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
    that the answer for an image is the one that it gets alone, up to rounding.

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
    """
    from tqdm import tqdm

    for name, value in (("batch_size", batch_size), ("workers", workers)):
        if value < 1:
            raise ValueError(f"{name} should be at least 1, got {value}")
    if not len(dataset):
        raise ValueError("expected a data set with at least one image, got an empty one")
    plan, masked = _plan(dataset, model.transform, min(batch_size, len(dataset)))
    variables = on_one_device(variables)
    results: list[dict[str, np.ndarray]] = [{}] * len(dataset)
    order = [index for batch in plan for index in batch.indices[batch.real].tolist()]
    with (
        contextlib.closing(
            read_ahead(dataset.read_image, order, ahead=batch_size + workers, workers=workers)
        ) as images,
        tqdm(total=len(dataset), unit="image", disable=not progress) as bar,
    ):
        running: deque[tuple[list[int], Detections]] = deque()

        def settle() -> None:
            indices, detections = running.popleft()
            host = jax.device_get(detections)
            for row, index in enumerate(indices):
                own = jax.tree.map(lambda x, row=row: x[row : row + 1], host)
                (results[index],) = unpad(own)
            bar.update(len(indices))

        for batch in plan:
            indices, size = batch.indices[batch.real].tolist(), len(batch.indices)
            arrays = list(itertools.islice(images, len(indices)))
            arrays += arrays[:1] * (size - len(arrays))  # the last batch of a bucket keeps its shape
            inputs = transform(arrays, model.transform, bucket=batch.bucket, dtype=model.box_dtype)
            if batch.bucket in masked and inputs.canvas is None:  # without canvases it would compile once more
                canvas = jnp.tile(jnp.asarray(batch.bucket, jnp.int32)[None], (size, 1))
                inputs = inputs.replace(canvas=canvas)  # pyright: ignore[reportAttributeAccessIssue]
            running.append((indices, jitted_detect(model, variables, inputs)))
            if len(running) > 1:  # the device has its next work before the host waits for the last
                settle()
        settle()
    return results


def _plan(dataset: Dataset, config: TransformConfig, batch_size: int) -> tuple[list[Batch], set[Size]]:
    """Which images run together, and the buckets in which some canvas is smaller."""
    records = [dataset[i] for i in range(len(dataset))]
    sizes = [record.size for record in records]
    own = canvases(sizes, config, names=[record.path for record in records])
    # canvases that 32 doesn't divide can't be smaller than their bucket
    buckets = choose_buckets(sizes, config, len(own) if config.size_divisible % 32 else _BUCKETS)
    plan = EvalPlan(own, buckets, batch_size)
    batches = [plan[i] for i in range(plan.steps_per_epoch)]
    masked = {batch.bucket for batch in batches if (own[batch.indices] != np.asarray(batch.bucket)).any()}
    return batches, masked


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
    return jax.tree.map(lambda x: x.addressable_data(0) if isinstance(x, jax.Array) else jnp.asarray(x), variables)
