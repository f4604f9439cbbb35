"""Small detectors on backbones of one convolution a level, noise for them, and functions that run them under jit."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdet.models import FCOS, FasterRCNN, FastRCNNConvFCHead, FastRCNNPredictor
from flaxdet.models.detector import example_batch
from flaxdet.models.fcos_head import FCOSHead
from flaxdet.nn.canvas import level_extent, mask_beyond
from flaxdet.ops import AnchorGenerator
from flaxdet.structures import ImageBatch
from tests.drawn import drawn

WIDTH = 32
CLASSES = 5
# Three levels; every score passes, so that there is something to compare.
FCOS_OPTIONS: dict[str, Any] = {
    "anchor_generator": AnchorGenerator((8, 16, 32), (1.0,)),
    "score_thresh": 0.0,
    "detections_per_img": 20,
}
RCNN_OPTIONS: dict[str, Any] = {
    "rpn_anchor_generator": AnchorGenerator((16, 32, 64), (0.5, 1.0, 2.0)),
    "rpn_post_nms_top_n_test": 12,
    "box_head": FastRCNNConvFCHead((WIDTH, 7, 7), (8,), (16,), use_norm=True),
    "box_predictor": FastRCNNPredictor(16, CLASSES),
    "box_score_thresh": 0.0,
    "box_detections_per_img": 20,
}


def levels(module: nn.Module, x, canvas=None):
    """Three maps at strides 8, 16 and 32, each a convolution of the one before."""
    bucket = x.shape[1:3]
    x = nn.Conv(WIDTH, (8, 8), strides=8, padding=0, name="stem")(x)
    maps = {"0": x}
    for i in (1, 2):
        x = mask_beyond(nn.relu(x), level_extent(canvas, bucket, x.shape[1:3]))
        x = nn.Conv(WIDTH, (3, 3), strides=2, padding=1, name=f"conv{i}")(x)
        maps[str(i)] = x
    return maps


class Plain(nn.Module):
    out_channels: int = WIDTH

    @nn.compact
    def __call__(self, x):
        return levels(self, x)


class WithBoth(nn.Module):
    out_channels: int = WIDTH

    @nn.compact
    def __call__(self, x, *, canvas=None, train=False):
        return {name: -y if train else y for name, y in levels(self, x, canvas).items()}


class TwoConvHead(nn.Module):
    """An FCOS head of one's own, which neither normalises nor knows of canvases."""

    @nn.compact
    def __call__(self, features):
        outputs = {"cls_logits": CLASSES, "bbox_regression": 4, "bbox_ctrness": 1}
        layers = {name: nn.Conv(width, (1, 1), name=name) for name, width in outputs.items()}
        return {
            name: jnp.concatenate(
                [nn.relu(layer(x)).reshape(len(x), -1, outputs[name]) for x in features.values()], axis=1
            )
            for name, layer in layers.items()
        }


class OwnRPNHead(nn.Module):
    @nn.compact
    def __call__(self, features):
        logits, deltas = nn.Conv(3, (1, 1), name="logits"), nn.Conv(12, (1, 1), name="deltas")
        maps = features.values()
        return [logits(x).reshape(len(x), -1) for x in maps], [deltas(x).reshape(len(x), -1, 4) for x in maps]


class OwnPredictor(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(CLASSES, name="logits")(x), nn.Dense(CLASSES * 4, name="deltas")(x)


def fcos(backbone, **options):
    dtypes = {name: options[name] for name in ("dtype", "param_dtype", "precision") if name in options}
    head = FCOSHead(WIDTH, 1, CLASSES, 1, **dtypes)  # one convolution a branch in place of four
    return FCOS(backbone, CLASSES, **{"head": head, **FCOS_OPTIONS, **options})


def faster_rcnn(backbone, **options):
    return FasterRCNN(backbone, **{**RCNN_OPTIONS, **options})


# Tests of one group run in one worker and share what `run` has compiled.
FCOS_GROUP, RCNN_GROUP = pytest.mark.xdist_group("api_fcos"), pytest.mark.xdist_group("api_rcnn")
DETECTORS = pytest.mark.parametrize(
    "detector", [pytest.param(fcos, marks=FCOS_GROUP), pytest.param(faster_rcnn, marks=RCNN_GROUP)]
)


def batch_of(size=(64, 96), bucket=None, count: int = 2) -> ImageBatch:
    """Noise of one size; in a bucket, everything beyond the image's own canvas is rubbish that must not be seen."""
    pixels = np.random.default_rng(0).normal(size=(count, *size, 3)).astype(np.float32)
    sizes = jnp.broadcast_to(jnp.asarray(size, jnp.int32)[None], (count, 2))
    if bucket is None:
        return ImageBatch(jnp.asarray(pixels), sizes, sizes, None)
    wide = np.zeros((count, *bucket, 3), np.float32)
    wide[:, : size[0], : size[1]] = pixels
    return ImageBatch(jnp.asarray(wide), sizes, sizes, sizes)


def variables_of(model, seed: int = 0):
    return drawn(jax.eval_shape(model.init, jax.random.key(0), example_batch()), seed)


@functools.partial(jax.jit, static_argnums=0)  # equal models of different tests share one compile
def run(model, variables, batch):
    """Detections, and every stage by name."""
    detections, state = model.apply(variables, batch, mutable=["intermediates"])
    return detections, {name: value for name, (value,) in state["intermediates"].items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def part(model, method, variables, *args):
    return model.apply(variables, *args, method=method)
