"""The operators of both detectors on the device, for accelerator.py: top-k, NMS and RoIAlign on both sides."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from accelerator_common import sizes
from part_common import ROWS, grouped_boxes, jitted, tensors
from part_nms import distinct_scores, fcos_case, our_nms, rpn_case, their_nms

from flaxdet.convert import reference
from flaxdet.ops import multiscale_roi_align, nms

Run = Callable[[], Any]


class Part(NamedTuple):
    """Both sides of a part, and how far they agree, computed when asked for."""

    ours: Run
    theirs: Run
    agreement: Callable[[], dict[str, Any]] = dict


def batch_size(options: dict[str, Any]) -> int:
    """Images of a part."""
    return 2 if options["small"] else 16


def level_shape(options: dict[str, Any], stride: int) -> tuple[int, int]:
    """(rows, columns) of a level's map."""
    rows, columns = (sizes(options)[key] for key in ("rows", "columns"))
    return -(-rows // stride), -(-columns // stride)


def _top_k(options: dict[str, Any]) -> Part:
    """FCOS's finest level: 1000 of 91 scores a cell."""
    rows, columns = level_shape(options, 8)
    count = 91 * rows * columns
    scores = np.stack([distinct_scores(np.random.default_rng(i), -1, count) for i in range(batch_size(options))])
    k = min(1000, count)
    ours, theirs = jax.device_put(scores), tensors(scores)
    run = jitted(functools.partial(jax.lax.top_k, k=k))

    def agreement() -> dict[str, Any]:
        same = np.array_equal(np.asarray(run(ours)[1]), theirs.topk(k)[1].cpu().numpy())
        return {"same": same}

    return Part(lambda: run(ours), lambda: theirs.topk(k), agreement)


def _nms(make: Callable[..., Any], numbers: tuple[float, int, float], options: dict[str, Any]) -> Part:
    """As part_nms has it: boxes, scores and labels of each image."""
    images = [make(np.random.default_rng(i)) for i in range(batch_size(options))]
    boxes, scores, labels = (np.stack(arrays) for arrays in zip(*images, strict=True))
    arrays = jax.device_put((boxes, scores, labels.astype(np.int32)))
    run, on_device = jitted(functools.partial(our_nms, *numbers)), tensors(images)

    def theirs() -> Any:
        return their_nms(*numbers, on_device)

    def agreement() -> dict[str, Any]:
        with reference.exact_nms():
            pairs = zip(np.asarray(run(*arrays)), theirs(), strict=True)
            equal = [np.array_equal(a[a >= 0], b.cpu().numpy()) for a, b in pairs]
        return {"same": all(equal), "images_that_agree": sum(equal), "images": len(equal)}

    return Part(lambda: run(*arrays), theirs, agreement)


def _plain_nms(options: dict[str, Any]) -> Part:
    """One image's 5000 boxes, without classes."""
    from torchvision.ops import nms as torch_nms

    boxes, scores, _ = rpn_case(np.random.default_rng(0))
    own, on_device = jax.device_put((boxes, scores)), tensors((boxes, scores))
    run = jitted(lambda boxes, scores: nms(boxes, scores, 0.7))

    def theirs() -> Any:
        return torch_nms(on_device[0], on_device[1], 0.7)

    def agreement() -> dict[str, Any]:
        kept = np.asarray(run(*own))
        return {"same": np.array_equal(kept[kept >= 0], theirs().cpu().numpy())}

    return Part(lambda: run(*own), theirs, agreement)


def _roi_align(backward: bool, dtype: Any, options: dict[str, Any]) -> Part:
    """1000 boxes an image on four levels of 256 channels; backward to the maps. torchvision's computes in float32."""
    count, images, channels = (8, 2, 8) if options["small"] else (1000, 16, 256)
    rng = np.random.default_rng(0)
    rows, columns = (sizes(options)[key] for key in ("rows", "columns"))
    # one image's maps, which all share, since drawing those of all takes the host seconds
    maps = [rng.standard_normal((1, *level_shape(options, s), channels), np.float32) for s in (4, 8, 16, 32)]
    large = np.float32(rows / ROWS)
    boxes = np.stack([grouped_boxes(rng, count, 120, 16, 600) * large for _ in range(images)])
    boxes[..., 2:] = np.maximum(boxes[..., 2:], boxes[..., :2] + 1)
    cotangent = rng.standard_normal((1, count, 7, 7, channels), np.float32)
    align = functools.partial(
        multiscale_roi_align, output_size=7, scales=[1 / 4, 1 / 8, 1 / 16, 1 / 32], sampling_ratio=2
    )
    own_maps, own_cotangent = jax.tree.map(
        lambda x: jnp.tile(jnp.asarray(x, dtype), (images, *[1] * (x.ndim - 1))), (maps, cotangent)
    )
    own_boxes = jax.device_put(boxes)

    def gradient(maps: Any, boxes: Any, cotangent: Any) -> Any:
        return jax.vjp(lambda maps: jax.vmap(align)(maps, boxes), maps)[1](cotangent)[0]

    forward, back = jitted(lambda maps, boxes: jax.vmap(align)(maps, boxes)), jitted(gradient)

    from torchvision.ops import MultiScaleRoIAlign

    torch_maps = {
        str(i): x.permute(0, 3, 1, 2).repeat(images, 1, 1, 1).requires_grad_(backward)
        for i, x in enumerate(tensors(maps))
    }
    torch_boxes = list(tensors(boxes))
    torch_cotangent = tensors(cotangent)[0].permute(0, 3, 1, 2).repeat(images, 1, 1, 1)
    pool = MultiScaleRoIAlign(list(torch_maps), 7, 2)
    size = [(rows, columns)] * images
    pooled: Any = pool(torch_maps, torch_boxes, size) if backward else None

    def ours() -> Any:
        return back(own_maps, own_boxes, own_cotangent) if backward else forward(own_maps, own_boxes)

    def theirs() -> Any:
        if backward:
            return torch.autograd.grad(pooled, list(torch_maps.values()), torch_cotangent, retain_graph=True)
        with torch.no_grad():
            return pool(torch_maps, torch_boxes, size)

    def agreement() -> dict[str, Any]:
        if backward:
            pairs = [(np.moveaxis(np.asarray(a, np.float32), -1, 1), b) for a, b in zip(ours(), theirs(), strict=True)]
        else:
            pairs = [(np.moveaxis(np.asarray(ours(), np.float32), -1, 2).reshape(-1, channels, 7, 7), theirs())]
        return relative_difference(pairs)

    return Part(ours, theirs, agreement)


def relative_difference(pairs: Any) -> dict[str, Any]:
    """The largest difference over the largest value, of pairs (ours, theirs) in torch's layout."""
    expected = [theirs.detach().float().cpu().numpy() for _, theirs in pairs]
    gaps = [np.abs(ours - theirs).max() for (ours, _), theirs in zip(pairs, expected, strict=True)]
    return {"relative_difference": float(np.max(gaps) / np.max([np.abs(theirs).max() for theirs in expected]))}


def _rpn_training_case(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes, scores and levels of the RPN's 5 x 2000 candidates in training."""
    sides = [(32 * 2**level / 1.5, 32 * 2**level * 1.5) for level in range(5)]
    boxes = np.concatenate([grouped_boxes(rng, 2000, 240, *side) for side in sides])
    return boxes, distinct_scores(rng, 0.3, 10_000), np.repeat(np.arange(5), 2000)


OPERATORS: dict[str, Callable[[dict[str, Any]], Part]] = {
    "top-k of FCOS's P3": _top_k,
    "NMS, RPN, 5 x 1000": functools.partial(_nms, rpn_case, (0.7, 1000, 0.0)),
    "NMS, RPN training, 5 x 2000": functools.partial(_nms, _rpn_training_case, (0.7, 2000, 0.0)),
    "NMS, FCOS, 5000": functools.partial(_nms, fcos_case, (0.6, 100, 0.2)),
    "NMS, 5000 boxes of one image": _plain_nms,
    "RoIAlign, bfloat16": functools.partial(_roi_align, False, jnp.bfloat16),
    "RoIAlign backward, bfloat16": functools.partial(_roi_align, True, jnp.bfloat16),
    "RoIAlign, float32": functools.partial(_roi_align, False, jnp.float32),
    "RoIAlign backward, float32": functools.partial(_roi_align, True, jnp.float32),
}
