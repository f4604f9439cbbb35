"""Detectors small enough to train in a test, and a COCO data set of coloured rectangles to train them on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from flaxdet import registry
from flaxdet.models import FCOS, FasterRCNN, RPNHead, TwoMLPHead
from flaxdet.models.fcos_head import FCOSHead
from flaxdet.models.initial import initial_variables
from flaxdet.nn import BackboneWithFPN, BatchNorm
from flaxdet.nn.canvas import level_extent, mask_beyond
from flaxdet.nn.layers import Conv, TypedModule
from flaxdet.ops import AnchorGenerator

FCOS_NAME, V2_NAME = "fcos_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2"
CATEGORIES = {2: "red", 5: "green", 9: "blue"}  # ids with gaps, as real files have them
NAMES = ["__background__", *CATEGORIES.values()]


class TinyBackbone(TypedModule):
    """Four 3x3 convolutions of stride 2, each with BatchNorm; maps at strides 8 and 16."""

    out_channels: int = 32
    dtype: Any = jnp.float32
    param_dtype: Any = None

    @nn.compact
    def __call__(self, pixels, *, canvas=None, train: bool = False):
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x, bucket, maps = pixels, pixels.shape[1:3], {}
        for i, channels in enumerate((16, 32, 32, 32)):
            extent = level_extent(canvas, bucket, x.shape[1:3])
            x = Conv(channels, 3, strides=2, name=f"conv{i}", **options)(mask_beyond(x, extent))
            mask = None
            extent = level_extent(canvas, bucket, x.shape[1:3])
            if extent is not None:
                rows, columns = (jnp.arange(n, dtype=jnp.int32) for n in x.shape[1:3])
                mask = (rows[None, :, None] < extent[:, :1, None]) & (columns[None, None] < extent[:, None, 1:])
            x = nn.relu(BatchNorm(name=f"bn{i}", **options)(x, train=train, mask=mask))
            if i >= 2:
                maps[str(i - 2)] = x
        return maps


def tiny_model(name: str, num_classes: int = 4, dtype: Any = np.float32, **options: Any) -> FCOS | FasterRCNN:
    """A whole detector of some 100,000 parameters for images of about 64 px."""
    backbone = TinyBackbone(dtype=dtype)
    geometry: dict[str, Any] = {"min_size": 64, "max_size": 96, "dtype": dtype, **options}
    if name == FCOS_NAME:
        anchors = AnchorGenerator(((8,), (16,)), ((1.0,),) * 2)
        head = FCOSHead(32, 1, num_classes, 2, dtype=dtype, param_dtype=options.get("param_dtype"))
        return FCOS(backbone, num_classes, **{"anchor_generator": anchors, "head": head, **geometry})
    anchors = AnchorGenerator(((16,), (32,)), ((0.5, 1.0, 2.0),) * 2)
    sampling = {"rpn_pre_nms_top_n_train": 100, "rpn_post_nms_top_n_train": 50, "rpn_post_nms_top_n_test": 50}
    return FasterRCNN(
        backbone,
        num_classes,
        rpn_anchor_generator=anchors,
        rpn_head=RPNHead(32, 3, dtype=dtype),
        box_head=TwoMLPHead(32 * 49, 64, dtype=dtype),
        **{"box_batch_size_per_image": 32, "rpn_batch_size_per_image": 64, **sampling, **geometry},
    )


def tiny_variables(model: FCOS | FasterRCNN, seed: int = 0) -> dict[str, Any]:
    """Its variables as torchvision initialises them."""
    return initial_variables(model, jax.random.key(seed))


_make_model = registry.make_model


def small_model(builder: str, /, **options: Any) -> FCOS | FasterRCNN:
    """What ``make_model`` makes, on a ResNet-10 and two levels of 32 channels: it compiles in a fifth of the time."""
    model = _make_model(builder, **options)
    backbone: Any = model.backbone
    fpn = backbone.fpn.clone(out_channels=32, extra_blocks=None)
    backbone = BackboneWithFPN(backbone.body.clone(depth=10), fpn, ("c3", "c4"))
    if isinstance(model, FCOS):
        dtypes = {name: getattr(model, name) for name in ("dtype", "param_dtype", "precision")}
        return model.clone(
            backbone=backbone,
            anchor_generator=AnchorGenerator(((8,), (16,)), ((1.0,),) * 2),
            head=FCOSHead(32, 1, model.num_classes, 1, **dtypes),
        )
    return model.clone(
        backbone=backbone,
        rpn_anchor_generator=AnchorGenerator(((16,), (32,)), ((0.5, 1.0, 2.0),) * 2),
        rpn_head=model.rpn_head.clone(in_channels=32),
        box_head=None  # made anew for 32 channels
        if isinstance(model.box_head, TwoMLPHead)
        else model.box_head.clone(input_size=(32, 7, 7), conv_layers=(32,), fc_layers=(64,)),
    )


def build_small_models(monkeypatch: pytest.MonkeyPatch, **defaults: Any) -> None:
    """Lets the builders, ``load`` and ``save`` make ``small_model`` in place of a ResNet-50, until the test's end.

    Args:
        monkeypatch: of the test.
        **defaults: options of every model, where the caller gives no others.
    """

    def make_model(builder: str, /, **options: Any) -> FCOS | FasterRCNN:
        if registry.get(builder).private:  # small by itself
            return _make_model(builder, **options)
        return small_model(builder, **{**defaults, **options})

    monkeypatch.setattr(registry, "make_model", make_model)
    # files are recognised by keys of the ResNet-50 and its pyramid, which small models lack
    for architecture in registry.architectures():
        keys: Any = architecture.keys
        keys = dataclasses.replace(keys, present=frozenset({keys.class_key}), absent=frozenset())
        monkeypatch.setitem(registry._table, architecture.name, dataclasses.replace(architecture, keys=keys))


def write_coco(folder: Path, count: int = 8, seed: int = 0, size: tuple[int, int] = (64, 80)) -> tuple[Path, Path]:
    """Writes ``count`` PNGs of one to three coloured rectangles on noise, and their annotations.

    Returns:
        The folder of images, and the COCO JSON.
    """
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    rows, columns = size
    content: dict[str, list[Any]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": key, "name": name} for key, name in CATEGORIES.items()],
    }
    for i in range(count):
        pixels = rng.integers(90, 166, (rows, columns, 3), dtype=np.uint8)
        free = np.ones((rows, columns), bool)
        for _ in range(int(rng.integers(1, 4))):
            h, w = (int(n) for n in rng.integers(12, 29, 2))
            y, x = int(rng.integers(0, rows - h + 1)), int(rng.integers(0, columns - w + 1))
            if not free[y : y + h, x : x + w].all():
                continue  # rectangles don't hide each other
            free[y : y + h, x : x + w] = False
            channel = int(rng.integers(3))
            pixels[y : y + h, x : x + w] = 30
            pixels[y : y + h, x : x + w, channel] = 230
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": 10 + 3 * i,
                    "category_id": list(CATEGORIES)[channel],
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
        name = f"{i:03}.png"
        Image.fromarray(pixels).save(images / name)
        content["images"].append({"id": 10 + 3 * i, "file_name": name, "width": columns, "height": rows})
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    return images, path
