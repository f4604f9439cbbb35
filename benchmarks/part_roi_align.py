"""RoIAlign over four levels, forward and backward; run by ``python benchmarks/parts.py --only roi_align``."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import torch
from common import measure_short, show, wait
from part_common import COLUMNS, ROWS, grouped_boxes, jitted, ready, tensors, with_ratio

from flaxdet.ops import multiscale_roi_align


def roi_align_benchmark(options: Any) -> dict[str, Any]:
    """Forward, and backward to the features."""
    from torchvision.ops import MultiScaleRoIAlign

    rng = np.random.default_rng(0)
    rows, columns = options.min_size, round(options.min_size * 1088 / 800)
    maps = [rng.standard_normal((rows // s, columns // s, 256), np.float32) for s in (4, 8, 16, 32)]
    boxes = grouped_boxes(rng, 1000, 120, 16, 600) * np.float32(rows / ROWS)
    cotangent = rng.standard_normal((1000, 7, 7, 256), np.float32)

    align = functools.partial(
        multiscale_roi_align, output_size=7, scales=[1 / 4, 1 / 8, 1 / 16, 1 / 32], sampling_ratio=2
    )
    ours_maps, ours_boxes, ours_cotangent = jax.device_put((maps, boxes, cotangent))
    forward = ready(jitted(lambda maps, boxes: align(maps, boxes)), ours_maps, ours_boxes)

    def gradient(maps: Any, boxes: Any, cotangent: Any) -> Any:
        return jax.vjp(lambda maps: align(maps, boxes), maps)[1](cotangent)  # what the forward computed is not needed

    backward = ready(jitted(gradient), ours_maps, ours_boxes, ours_cotangent)

    torch_maps = {str(i): x.permute(2, 0, 1)[None].contiguous().requires_grad_() for i, x in enumerate(tensors(maps))}
    torch_boxes = [tensors(boxes)]
    torch_cotangent = tensors(cotangent).permute(0, 3, 1, 2).contiguous()
    pool = MultiScaleRoIAlign(list(torch_maps), 7, 2)
    size = [(rows, round(rows * COLUMNS / ROWS))]

    def their_forward() -> torch.Tensor:
        with torch.no_grad():
            return wait(pool(torch_maps, torch_boxes, size))

    pooled = pool(torch_maps, torch_boxes, size)

    def their_backward() -> Any:
        return wait(torch.autograd.grad(pooled, list(torch_maps.values()), torch_cotangent, retain_graph=True))

    results = {}
    title = f"RoIAlign, 1000 boxes, 256 channels, four levels of {rows}x{columns}"
    for direction, ours, theirs in (("forward", forward, their_forward), ("backward", backward, their_backward)):
        functions = {"flaxdet": ours, "torchvision": theirs}
        result = with_ratio(show(f"{title}, {direction}", measure_short(functions, options.repeats), "ms"))
        pairs = [(ours(), theirs())] if direction == "forward" else zip(ours()[0], theirs(), strict=True)
        result["largest_difference"] = max(
            float(np.abs(np.moveaxis(np.asarray(a), -1, -3) - b.detach().cpu().numpy()).max()) for a, b in pairs
        )
        print(f"  largest difference {result['largest_difference']:.1e}\n")
        results[direction] = result
    return results
