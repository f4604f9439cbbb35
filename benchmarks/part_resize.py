"""Resize and normalisation of a photo; run by ``python benchmarks/parts.py --only resize``."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from common import measure_short, photo, show, wait
from contenders import geometry
from part_common import jitted, ready, tensors, with_ratio

from flaxdet.images.resize import resize_image
from flaxdet.images.transform import transform
from flaxdet.structures import TransformConfig


def resize_benchmark(options: Any) -> dict[str, Any]:
    """From uint8 to a normalised, padded batch of one."""
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    config = TransformConfig(**geometry(options.min_size))
    image = photo()
    batch = transform([image], config)
    raw = np.zeros((1, 640, 640, 3), np.uint8)
    raw[0, :480] = image
    resize = functools.partial(
        resize_image,
        bucket=batch.pixels.shape[1:3],
        mean=config.image_mean,
        std=config.image_std,
        dtype=jnp.float32,
    )
    ours = ready(jitted(jax.vmap(resize)), jax.device_put(raw), batch.original_size, batch.size)
    prepare = GeneralizedRCNNTransform(
        **geometry(options.min_size),
        image_mean=list(config.image_mean or ()),
        image_std=list(config.image_std or ()),
    ).eval()
    tensor = tensors(image).permute(2, 0, 1).contiguous()

    def theirs() -> torch.Tensor:
        with torch.no_grad():
            return wait(prepare([tensor.float() / 255])[0].tensors)

    rows, columns = (int(side) for side in batch.size[0])
    title = f"resize and normalise, 480x640 to {rows}x{columns}"
    seconds = measure_short({"flaxdet": ours, "torchvision": theirs}, options.repeats)
    result = with_ratio(show(title, seconds, "ms"))
    result["largest_difference"] = float(np.abs(np.moveaxis(np.asarray(ours()), -1, 1) - theirs().cpu().numpy()).max())
    print(f"  largest difference {result['largest_difference']:.1e}\n")
    return {title: result}
