"""NMS as the detectors call it; run by ``python benchmarks/parts.py --only nms``."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import torch
from common import measure_short, show, wait
from part_common import COLUMNS, ROWS, Run, grouped_boxes, jitted, ready, tensors, with_ratio

from flaxdet.ops import batched_nms

SCORE = 0.05  # Faster R-CNN's threshold
NMS_IMAGES = (1, 16)


def distinct_scores(rng: np.random.Generator, low: float, count: int) -> np.ndarray:
    """[count] from low to 1 in any order; no two alike, as torchvision does not say which of them goes first."""
    return rng.permutation(np.linspace(low, 1, count, dtype=np.float32))


def rpn_case(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes, scores and levels of the RPN's 5 x 1000 candidates."""
    sides = [(32 * 2**level / 1.5, 32 * 2**level * 1.5) for level in range(5)]
    boxes = np.concatenate([grouped_boxes(rng, 1000, 120, *side) for side in sides])
    return boxes, distinct_scores(rng, 0.3, 5000), np.repeat(np.arange(5), 1000)


def fcos_case(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes, scores and labels of FCOS's 5 x 1000 candidates, all above its threshold."""
    boxes = np.concatenate([grouped_boxes(rng, 1000, 60, 16 * 2**level, 32 * 2**level) for level in range(5)])
    return boxes, distinct_scores(rng, 0.201, 5000), rng.integers(0, 20, 5000)


def faster_rcnn_case(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes, scores and labels of 1000 proposals x 90 classes; one in two proposals is of some class."""
    proposals = grouped_boxes(rng, 1000, 60, 24, 500)
    shifts = rng.normal(0, 2, (1000, 90, 4))
    boxes = (proposals[:, None] + shifts).reshape(-1, 4).clip(0, (COLUMNS, ROWS, COLUMNS, ROWS)).astype(np.float32)
    scores = rng.uniform(0, SCORE / 2, (1000, 90))
    scores[np.arange(500), rng.integers(0, 20, 500)] = distinct_scores(rng, SCORE + 0.001, 500)
    return boxes, scores.reshape(-1).astype(np.float32), np.tile(np.arange(1, 91), 1000)


# name: (candidates, IoU, kept, lowest score)
NMS = {
    "RPN, 5 x 1000 -> 1000, iou .7": (rpn_case, 0.7, 1000, 0.0),
    "FCOS, 5000 -> 100, iou .6": (fcos_case, 0.6, 100, 0.2),
    "Faster R-CNN, 90,000 -> 100, iou .5": (faster_rcnn_case, 0.5, 100, SCORE),
}


def our_nms(threshold: float, kept: int, lowest: float, *arrays: Any) -> Any:
    """Indices kept, of boxes, scores and labels [B, N, ...]."""

    def one(boxes: Any, scores: Any, labels: Any) -> Any:
        return batched_nms(boxes, scores, labels, threshold, max_output=kept, valid=scores > lowest)

    return jax.vmap(one)(*arrays)


def their_nms(threshold: float, kept: int, lowest: float, images: Any) -> list[torch.Tensor]:
    """Indices kept, of boxes, scores and labels of each image."""
    from torchvision.ops import boxes as torch_boxes

    found = []
    for boxes, scores, labels in images:
        (candidates,) = torch.where(scores > lowest)
        keep = torch_boxes.batched_nms(boxes[candidates], scores[candidates], labels[candidates], threshold)
        found.append(candidates[keep[:kept]])
    return found


def with_threads(count: int, function: Run) -> Run:
    """A torch function run with a number of threads."""

    def run() -> Any:
        torch.set_num_threads(count)
        return wait(function())

    return run


def nms_benchmark(options: Any) -> dict[str, Any]:
    """All cases, for one image and several."""
    default_threads = torch.get_num_threads()
    results: dict[str, Any] = {}
    for case, (make, *numbers) in NMS.items():
        for count in NMS_IMAGES:
            title = f"{case}, {count} image{'s' * (count > 1)}"
            images = [make(np.random.default_rng(i)) for i in range(count)]
            boxes, scores, labels = (np.stack(arrays) for arrays in zip(*images, strict=True))
            arrays = jax.device_put((boxes, scores, labels.astype(np.int32)))
            ours = ready(jitted(functools.partial(our_nms, *numbers)), *arrays)
            theirs = functools.partial(their_nms, *numbers, tensors(images))
            functions = {"flaxdet": ours}
            for threads in sorted({1, default_threads}):
                functions[f"torchvision, {threads} thread{'s' * (threads > 1)}"] = with_threads(threads, theirs)
            result = with_ratio(show(f"NMS, {title}", measure_short(functions, options.repeats), "ms"))
            torch.set_num_threads(default_threads)
            pairs = zip(np.asarray(ours()), theirs(), strict=True)
            result["images_that_agree"] = sum(np.array_equal(a[a >= 0], b.cpu().numpy()) for a, b in pairs)
            print(f"  the same boxes kept, in the same order, in {result['images_that_agree']} of {count}\n")
            results[title] = result
    return results
