"""Pooling of boxes from a pyramid, after torchvision.ops.MultiScaleRoIAlign."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from flaxdet.models.levels import feature_extents
from flaxdet.nn.fpn import Features
from flaxdet.nn.layers import Array
from flaxdet.nn.options import check_counts, check_sizes
from flaxdet.ops.roi_align import multiscale_roi_align
from flaxdet.structures import ImageBatch
from flaxdet.xla.barriers import materialise
from flaxdet.xla.mesh import per_image


@dataclass(frozen=True)
class MultiScaleRoIAlign:
    """Pools each box from the level that suits the size of the box (torchvision.ops.MultiScaleRoIAlign).

    Attributes:
        featmap_names: names of the levels to pool from. The default has torchvision's names ("0".."3") and
            flaxdet's ("p2".."p5").
        output_size: (rows, columns) of a pooled map, or one number for both.
        sampling_ratio: samples per bin along each side, at least 1.
        canonical_scale: side in pixels of a square box that is pooled from ``canonical_level``.
        canonical_level: log2 of that level's stride.

    Raises:
        ValueError: for an option out of range.
        TypeError: for an option of another kind.
    """

    featmap_names: tuple[str, ...] = ("0", "1", "2", "3", "p2", "p3", "p4", "p5")
    output_size: int | tuple[int, int] = 7
    sampling_ratio: int = 2
    canonical_scale: int = 224
    canonical_level: int = 4

    def __post_init__(self) -> None:
        if isinstance(self.featmap_names, str) or not all(isinstance(name, str) for name in self.featmap_names):
            raise TypeError(f"MultiScaleRoIAlign: featmap_names should be names of maps, got {self.featmap_names!r}")
        size: Any = self.output_size  # one number or two, checked below
        if np.shape(size) == ():
            size = (size, size)
        object.__setattr__(self, "featmap_names", tuple(self.featmap_names))
        object.__setattr__(self, "output_size", tuple(size))
        check_sizes(self, "output_size", 2)
        check_counts(self, 1, "sampling_ratio", "canonical_scale")
        check_counts(self, 0, "canonical_level")

    def __call__(
        self,
        features: Features,
        boxes: Float[Array, "B R 4"],
        batch: ImageBatch,
        *,
        strides: Mapping[str, int] | None = None,
    ) -> Float[Array, "B R h w C"]:
        """Pools boxes.

        The scale of a level is 1 / stride. torchvision infers the scale from the height of the first image that a model
        sees, 2**round(log2(map height / image height)), and keeps it. For ordinary photos this is the same number; if
        the first image is very elongated, torchvision keeps a wrong scale.

        Args:
            features: {name: [B, h, w, C]}, finest first.
            boxes: [B, R, 4] xyxy in the pixels of the resized images.
            batch: the images, of which the canvases are used.
            strides: pixels between neighbouring cells of each level, by name. The default for a level without a name
                is the power of two nearest to the longer side of the pixels divided by the longer side of the level.

        Returns:
            [B, R, h, w, C] in the features' dtype.

        Raises:
            ValueError: if no feature map has one of ``featmap_names``.
        """
        levels = {name: x for name, x in features.items() if name in self.featmap_names}
        if not levels:
            raise ValueError(
                f"none of featmap_names {list(self.featmap_names)} is among the backbone's feature maps "
                f"{list(features)}"
            )
        extents = feature_extents(levels, batch)
        strides, longest = strides or {}, max(batch.pixels.shape[1:3])
        scales = tuple(
            1 / strides[name] if name in strides else 2.0 ** round(math.log2(max(x.shape[1:3]) / longest))
            for name, x in levels.items()
        )

        align = functools.partial(
            multiscale_roi_align,
            output_size=self.output_size,
            sampling_ratio=self.sampling_ratio,
            canonical_scale=self.canonical_scale,
            canonical_level=self.canonical_level,
        )

        def pool(maps: tuple[Array, ...], boxes: Array, extents: Any) -> Array:
            return align(maps, boxes, scales=scales, extents=extents)

        pooled = per_image(pool)(tuple(levels.values()), boxes, None if extents is None else tuple(extents.values()))
        # Without the barrier, XLA:CPU computes all samples again, cell by cell, where the gradient reads the result
        # transposed.
        return materialise(pooled)


def pooled_channels(out_channels: int, output_size: int | tuple[int, int]) -> int:
    """Number of inputs of a dense layer on pooled maps: C * h * w."""
    return out_channels * (output_size**2 if isinstance(output_size, int) else math.prod(output_size))
