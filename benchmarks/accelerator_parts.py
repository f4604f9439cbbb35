"""The parts of both detectors on the device, for accelerator.py: timed against torchvision's, and compared with them.

Sizes are those of a batch of 16 images of 800x1088 (``--small``: of 2 smaller ones).
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from accelerator_common import SIZE, Notes, sizes, timed
from common import wait
from contenders import allow_tf32, geometry, torch_device
from part_common import ROWS, grouped_boxes, jitted, tensors
from part_nms import distinct_scores, fcos_case, our_nms, rpn_case, their_nms
from photos import photos

from flaxdet.convert import reference
from flaxdet.models.fcos_head import FCOSHead
from flaxdet.nn import BatchNorm
from flaxdet.ops import multiscale_roi_align
from flaxdet.resize import resize_image
from flaxdet.structures import TransformConfig
from flaxdet.transform import canvas_size, resized_size

Run = Callable[[], Any]


class Part(NamedTuple):
    """Both sides of a part, and how far they agree, computed when asked for."""

    ours: Run
    theirs: Run
    agreement: Callable[[], dict[str, Any]] = dict


def parts(options: dict[str, Any], notes: Notes) -> str:
    """Every part, most telling first."""
    reference.torchvision()
    torch.backends.cudnn.benchmark = True
    allow_tf32("float32")
    found = []
    for name, make in PARTS.items():
        part = None  # the one before, and its memory
        gc.collect()
        torch.cuda.empty_cache()
        with notes.attempt(part=name):
            part = make(options)
            ours = timed(part.ours, jax.block_until_ready, options)
            notes.add("part", part=name, side="flaxdet", **ours)
            theirs = timed(part.theirs, wait, options)
            notes.add("part", part=name, side="torchvision", **theirs)
            notes.add("agreement", part=name, **part.agreement())
            found.append(f"{name} {ours['median'] * 1e3:.2f} ms ({theirs['median'] * 1e3:.2f})")
    return "; ".join(found)[:200] or "nothing measured"


def _images(options: dict[str, Any]) -> int:
    return 2 if options["small"] else 16


def _shape(options: dict[str, Any], stride: int) -> tuple[int, int]:
    """(rows, columns) of a level's map."""
    rows, columns = (sizes(options)[key] for key in ("rows", "columns"))
    return -(-rows // stride), -(-columns // stride)


def _top_k(options: dict[str, Any]) -> Part:
    """FCOS's finest level: 1000 of 91 scores a cell."""
    rows, columns = _shape(options, 8)
    count = 91 * rows * columns
    scores = np.stack([distinct_scores(np.random.default_rng(i), -1, count) for i in range(_images(options))])
    k = min(1000, count)
    ours, theirs = jax.device_put(scores), tensors(scores)
    run = jitted(functools.partial(jax.lax.top_k, k=k))

    def agreement() -> dict[str, Any]:
        same = np.array_equal(np.asarray(run(ours)[1]), theirs.topk(k)[1].cpu().numpy())
        return {"same": same}

    return Part(lambda: run(ours), lambda: theirs.topk(k), agreement)


def _nms(make: Callable[..., Any], numbers: tuple[float, int, float], options: dict[str, Any]) -> Part:
    """As part_nms has it: boxes, scores and labels of each image."""
    images = [make(np.random.default_rng(i)) for i in range(_images(options))]
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


def _roi_align(backward: bool, dtype: Any, options: dict[str, Any]) -> Part:
    """1000 boxes an image on four levels of 256 channels; backward to the maps. torchvision's computes in float32."""
    count, images, channels = (8, 2, 8) if options["small"] else (1000, 16, 256)
    rng = np.random.default_rng(0)
    rows, columns = (sizes(options)[key] for key in ("rows", "columns"))
    # one image's maps, which all share, since drawing those of all takes the host seconds
    maps = [rng.standard_normal((1, *_shape(options, s), channels), np.float32) for s in (4, 8, 16, 32)]
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
    pooled = pool(torch_maps, torch_boxes, size) if backward else None

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
        return _relative(pairs)

    return Part(ours, theirs, agreement)


def _relative(pairs: Any) -> dict[str, Any]:
    """The largest difference over the largest value, of (ours, theirs) in torch's layout."""
    gaps = []
    for ours, theirs in pairs:
        expected = theirs.detach().float().cpu().numpy()
        gaps.append(float(np.abs(ours - expected).max() / np.abs(expected).max()))
    return {"relative_difference": max(gaps)}


def _group_norm_tower(options: dict[str, Any]) -> Part:
    """FCOS's head on its finest level in bfloat16: two towers of four convolutions with GroupNorm, and outputs."""
    rows, columns = _shape(options, 8)
    images = _images(options)
    head: Any = FCOSHead(256, 1, 91, dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (images, rows, columns, 256), jnp.bfloat16)
    variables = jax.jit(head.init)(jax.random.key(0), {"p3": x[:1, :8, :8]})
    run = jitted(lambda variables, x: head.apply(variables, {"p3": x}))
    theirs = reference.torchvision().models.detection.fcos.FCOSHead(256, 1, 91).to(torch_device())
    theirs = theirs.to(memory_format=torch.channels_last)
    map_ = torch.randn(images, 256, rows, columns, device=torch_device()).to(memory_format=torch.channels_last)
    return Part(lambda: run(variables, x), _autocast(lambda: theirs([map_])))


def _autocast(function: Run, *, grad: bool = False) -> Run:
    def run() -> Any:
        with torch.set_grad_enabled(grad), torch.autocast(torch_device(), dtype=torch.bfloat16):
            return function()

    return run


def _batch_norm_block(options: dict[str, Any]) -> Part:
    """Convolution, BatchNorm in training and ReLU on ResNet's stage of stride 4 in bfloat16, with the gradients."""
    import flax.linen as nn

    from flaxdet.nn.layers import conv

    rows, columns = _shape(options, 4)
    images, channels = _images(options), 64

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = conv(channels, 3, use_bias=False, dtype=jnp.bfloat16, name="conv")(x)
            return nn.relu(BatchNorm(dtype=jnp.bfloat16, name="norm")(x, train=True))

    block = Block()
    x = jax.random.normal(jax.random.key(0), (images, rows, columns, channels), jnp.bfloat16)
    variables = jax.jit(block.init)(jax.random.key(0), x)

    def loss(params: Any, x: Any, stats: Any) -> Any:
        y, updates = block.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        return jnp.mean(jnp.square(y.astype(jnp.float32))), updates

    run = jitted(jax.grad(loss, argnums=(0, 1), has_aux=True))
    layers: Any = torch.nn.Sequential(
        torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(channels),
        torch.nn.ReLU(inplace=True),
    )
    layers = layers.to(torch_device()).to(memory_format=torch.channels_last)
    map_ = torch.randn(images, channels, rows, columns, device=torch_device(), dtype=torch.bfloat16)
    map_ = map_.to(memory_format=torch.channels_last).requires_grad_()

    def theirs() -> Any:
        loss = layers(map_).float().square().mean()
        return torch.autograd.grad(loss, [map_, *layers.parameters()])

    return Part(
        lambda: run(variables["params"], x, variables["batch_stats"]),
        _autocast(theirs, grad=True),
    )


def _resize(options: dict[str, Any]) -> Part:
    """Resize and normalisation of a batch of 8-bit photos that lie on the device."""
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    config = TransformConfig(**geometry(sizes(options)["min_size"]))
    size = resized_size(SIZE, config)
    images = photos(_images(options), *SIZE)
    raw = np.zeros((len(images), 640, 640, 3), np.uint8)
    raw[:, : SIZE[0]] = images
    mean: Any = config.image_mean
    std: Any = config.image_std
    run = jitted(
        jax.vmap(
            functools.partial(resize_image, bucket=canvas_size(size, config), mean=mean, std=std, dtype=jnp.float32)
        )
    )
    given = jax.device_put((raw, np.array([SIZE] * len(images), np.int32), np.array([size] * len(images), np.int32)))
    prepare = GeneralizedRCNNTransform(
        config.min_size, config.max_size, image_mean=list(mean), image_std=list(std)
    ).eval()
    on_device = [tensors(x).permute(2, 0, 1).contiguous() for x in images]

    def theirs() -> Any:
        with torch.no_grad():
            return prepare([x.float() / 255 for x in on_device])[0].tensors

    def agreement() -> dict[str, Any]:
        return _relative([(np.moveaxis(np.asarray(run(*given)), -1, 1), theirs())])

    return Part(lambda: run(*given), theirs, agreement)


def _rpn_training_case(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes, scores and levels of the RPN's 5 x 2000 candidates in training."""
    sides = [(32 * 2**level / 1.5, 32 * 2**level * 1.5) for level in range(5)]
    boxes = np.concatenate([grouped_boxes(rng, 2000, 240, *side) for side in sides])
    return boxes, distinct_scores(rng, 0.3, 10_000), np.repeat(np.arange(5), 2000)


PARTS: dict[str, Callable[[dict[str, Any]], Part]] = {
    "top-k of FCOS's P3": _top_k,
    "NMS, RPN, 5 x 1000": functools.partial(_nms, rpn_case, (0.7, 1000, 0.0)),
    "NMS, RPN training, 5 x 2000": functools.partial(_nms, _rpn_training_case, (0.7, 2000, 0.0)),
    "NMS, FCOS, 5000": functools.partial(_nms, fcos_case, (0.6, 100, 0.2)),
    "RoIAlign, bfloat16": functools.partial(_roi_align, False, jnp.bfloat16),
    "RoIAlign backward, bfloat16": functools.partial(_roi_align, True, jnp.bfloat16),
    "GroupNorm towers on P3, bfloat16": _group_norm_tower,
    "BatchNorm block in training, bfloat16": _batch_norm_block,
    "resize": _resize,
    "RoIAlign, float32": functools.partial(_roi_align, False, jnp.float32),
    "RoIAlign backward, float32": functools.partial(_roi_align, True, jnp.float32),
}
