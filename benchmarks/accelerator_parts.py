"""The parts of both detectors on the device, for accelerator.py: timed against torchvision's, and compared with them.

Sizes are those of a batch of 16 images of 800x1088 (``--small``: of 2 smaller ones).
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from accelerator_common import SIZE, Notes, sizes, timed
from accelerator_operators import OPERATORS, Part, batch_size, level_shape, relative_difference
from common import wait
from contenders import allow_tf32, geometry, torch_device
from part_common import jitted, tensors
from photos import photos

from flaxdet.convert import reference
from flaxdet.images.resize import resize_image
from flaxdet.images.transform import canvas_size, resized_size
from flaxdet.models.fcos_head import FCOSHead
from flaxdet.nn import BatchNorm
from flaxdet.structures import TransformConfig

Run = Callable[[], Any]


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


def _group_norm_tower(options: dict[str, Any]) -> Part:
    """FCOS's head on its finest level in bfloat16: two towers of four convolutions with GroupNorm, and outputs."""
    rows, columns = level_shape(options, 8)
    images = batch_size(options)
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

    from flaxdet.nn.layers import Conv

    rows, columns = level_shape(options, 4)
    images, channels = batch_size(options), 64

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = Conv(channels, 3, use_bias=False, dtype=jnp.bfloat16, name="conv")(x)
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

    sides = geometry(sizes(options)["min_size"])
    config = TransformConfig(**sides)
    size = resized_size(SIZE, config)
    images = photos(batch_size(options), *SIZE)
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
    prepare = GeneralizedRCNNTransform(**sides, image_mean=list(mean), image_std=list(std)).eval()
    on_device = [tensors(x).permute(2, 0, 1).contiguous() for x in images]

    def theirs() -> Any:
        with torch.no_grad():
            return prepare([x.float() / 255 for x in on_device])[0].tensors

    def agreement() -> dict[str, Any]:
        return relative_difference([(np.moveaxis(np.asarray(run(*given)), -1, 1), theirs())])

    return Part(lambda: run(*given), theirs, agreement)


PARTS: dict[str, Callable[[dict[str, Any]], Part]] = {
    **OPERATORS,
    "GroupNorm towers on P3, bfloat16": _group_norm_tower,
    "BatchNorm block in training, bfloat16": _batch_norm_block,
    "resize": _resize,
}
