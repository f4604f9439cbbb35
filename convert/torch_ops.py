"""torchvision's C++ operators of detection in plain torch, for use if they cannot be loaded (see `reference`)."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional


def nms(dets: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Greedy non-maximum suppression; reproduces the C++ ``torchvision::nms``.

    The IoU is computed in the boxes' dtype and compared with the threshold in double precision. A NaN IoU (two
    boxes without area, infinite boxes) suppresses nothing. Equal scores keep their order.

    Args:
        dets: boxes [N, 4], xyxy, float32 or float64.
        scores: [N].
        iou_threshold: a box is dropped if its IoU with a kept box is larger than this.

    Returns:
        Indices of the kept boxes, int64, best first.
    """
    if dets.dtype not in (torch.float32, torch.float64):
        raise RuntimeError(f"nms takes float32 or float64 boxes, found {dets.dtype}")
    if dets.dim() != 2 or dets.shape[1] != 4 or scores.shape != dets.shape[:1]:
        raise RuntimeError(
            f"nms takes boxes [N, 4] and scores [N], found {tuple(dets.shape)} and {tuple(scores.shape)}"
        )
    order = torch.sort(scores.detach(), stable=True, descending=True).indices.numpy()
    boxes = dets.detach().numpy()[order]
    kept: list[int] = []
    zero = boxes.dtype.type(0)
    with np.errstate(all="ignore"):
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        while len(order):
            kept.append(int(order[0]))
            one, one_area, order, boxes, area = boxes[0], area[0], order[1:], boxes[1:], area[1:]
            # `where` and not `maximum`: C++'s max(0, NaN) is 0.
            width = np.minimum(one[2], boxes[:, 2]) - np.maximum(one[0], boxes[:, 0])
            height = np.minimum(one[3], boxes[:, 3]) - np.maximum(one[1], boxes[:, 1])
            overlap = np.where(width > 0, width, zero) * np.where(height > 0, height, zero)
            iou = overlap / (one_area + area - overlap)
            alive = ~(iou.astype(np.float64) > iou_threshold)
            order, boxes, area = order[alive], boxes[alive], area[alive]
    return torch.tensor(kept, dtype=torch.int64)


def roi_align(
    features: torch.Tensor,
    rois: torch.Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> torch.Tensor:
    """RoIAlign; reproduces the C++ ``torchvision::roi_align``, including adaptive sampling.

    Every output bin is a weighted sum over the corners of the bin's samples. torch's ``embedding_bag`` computes
    it quickly, without large temporary buffers, and differentiably. As in C++ no gradient flows to the boxes.

    Args:
        features: [N, C, H, W].
        rois: [K, 5]: index of the image, then xyxy in pixels of the image.
        spatial_scale: size of the features over size of the image.
        pooled_height: rows of the output.
        pooled_width: columns of the output.
        sampling_ratio: samples per bin along each axis. If not positive, adaptive: as many as the bin has pixels.
        aligned: shifts the boxes by half a pixel, and does not widen boxes smaller than one pixel.

    Returns:
        [K, C, pooled_height, pooled_width].
    """
    n, channels, height, width = features.shape
    rows = features.permute(0, 2, 3, 1).reshape(n * height * width, channels)
    bins = pooled_height * pooled_width
    with torch.no_grad():
        image = rois[:, 0].long()
        start, end = (rois[:, i : i + 2] * spatial_scale - (0.5 if aligned else 0.0) for i in (1, 3))
        size = end - start if aligned else (end - start).clamp(min=1.0)
        bin_size = size / size.new_tensor([pooled_width, pooled_height])
        grid = torch.ceil(bin_size).long().clamp(min=0)
        if sampling_ratio > 0:
            grid = torch.full_like(grid, sampling_ratio)

    # RoIs with the same sampling grid are pooled together; without adaptive sampling, these are all RoIs.
    output = features.new_zeros(len(rois), bins, channels) + rows[:0].sum()  # + 0: differentiable even without RoIs
    for columns, lines in torch.unique(grid, dim=0).tolist():
        if columns * lines == 0:
            continue
        chosen = torch.where((grid == grid.new_tensor([columns, lines])).all(dim=1))[0]
        with torch.no_grad():
            x = _corners(start[chosen, 0], bin_size[chosen, 0], pooled_width, columns, width)
            y = _corners(start[chosen, 1], bin_size[chosen, 1], pooled_height, lines, height)
            # [K, rows, columns, y corners, x corners]
            index = y[0][:, :, None, :, None] * width + x[0][:, None, :, None, :]
            index = index + (image[chosen] * height * width)[:, None, None, None, None]
            weight = y[1][:, :, None, :, None] * x[1][:, None, :, None, :] / (columns * lines)
            corners = 4 * columns * lines
            index, weight = index.reshape(-1, corners), weight.reshape(-1, corners)
        pooled = functional.embedding_bag(index, rows, mode="sum", per_sample_weights=weight)
        output = output.index_copy(0, chosen, pooled.reshape(-1, bins, channels))
    return output.permute(0, 2, 1).reshape(-1, channels, pooled_height, pooled_width)


def _corners(
    start: torch.Tensor, bin_size: torch.Tensor, bins: int, samples: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two neighbouring pixels of every sample along one axis: indices and weights, [K, bins, 2 x samples]."""
    steps = torch.arange(bins, dtype=start.dtype)
    inner = torch.arange(samples, dtype=start.dtype) + 0.5
    at = (start[:, None] + steps * bin_size[:, None])[..., None] + (inner * bin_size[:, None] / samples)[:, None]
    inside = (at >= -1.0) & (at <= length)  # False for NaN
    at = torch.where(inside, at, 0.0).clamp(min=0.0)
    low = at.long().clamp(max=length - 1)
    fraction = torch.where(low >= length - 1, 0.0, at - low)
    index = torch.cat([low, (low + 1).clamp(max=length - 1)], dim=-1)
    weight = torch.cat([torch.where(inside, 1.0 - fraction, 0.0), torch.where(inside, fraction, 0.0)], dim=-1)
    return index, weight
