"""Detections in the formats of other libraries. A library is imported only by the function that needs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import supervision

_WANTED = ("boxes", "scores", "labels")


def to_supervision(found: Mapping[str, Any], categories: Sequence[str] | None = None) -> supervision.Detections:
    """One image's detections as ``supervision.Detections``, for its annotators, trackers and counters.

    Args:
        found: the result of ``predict`` for an image: {"boxes": [N, 4] xyxy in pixels of the image, "scores": [N] in
            [0, 1], "labels": [N]}.
        categories: name of each label, label 0 first, for ``data["class_name"]``.

    Returns:
        ``supervision.Detections`` with ``xyxy`` [N, 4] and ``confidence`` [N] float32, ``class_id`` [N] int64 and,
        with ``categories``, ``data["class_name"]`` [N]; in the order of ``found``.

    Raises:
        ImportError: if supervision is not installed.
        ValueError: if ``found`` lacks one of the three arrays, lengths differ, or a label has no name.
    """
    try:
        import supervision
    except ImportError as error:
        raise ImportError("supervision.Detections need supervision: pip install 'flaxdet[bridges]'") from error
    missing = [name for name in _WANTED if name not in found]
    if missing:
        raise ValueError(
            f"found should hold boxes, scores and labels as predict gives them, it lacks {', '.join(missing)}"
        )
    boxes, scores = (np.array(found[name], np.float32) for name in _WANTED[:2])
    labels = np.array(found["labels"], np.int64)
    if boxes.shape[1:] != (4,) or scores.shape != boxes.shape[:1] or labels.shape != scores.shape:
        raise ValueError(
            "found should hold boxes [N, 4], scores [N] and labels [N], got "
            f"{list(boxes.shape)}, {list(scores.shape)} and {list(labels.shape)}"
        )
    data = {}
    if categories is not None:
        unnamed = np.unique(labels[(labels < 0) | (labels >= len(categories))]).tolist()
        if unnamed:
            raise ValueError(f"categories should name every label, got {len(categories)} names and labels {unnamed}")
        data["class_name"] = np.array([categories[label] for label in labels], np.str_)
    return supervision.Detections(xyxy=boxes, confidence=scores, class_id=labels, data=data)
