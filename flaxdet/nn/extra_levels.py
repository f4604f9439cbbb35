"""The levels that torchvision adds to a feature pyramid: a max pool, or two strided convolutions."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from flaxdet.nn.canvas import level_extent, mask_beyond
from flaxdet.nn.initializers import kaiming_uniform_a1
from flaxdet.nn.layers import Array, Conv, Dtype, Precision, TypedModule
from flaxdet.nn.names import TorchName

Features = dict[str, Float[Array, "B h w C"]]


class LastLevelMaxPool(nn.Module):
    """The extra level "pool": every second cell of the coarsest map (torchvision's LastLevelMaxPool)."""

    @nn.compact
    def __call__(
        self, pyramid: Features, stages: Features, *, canvas: Array | None, bucket: tuple[int, ...]
    ) -> Features:
        """Computes the new level.

        Args:
            pyramid: levels by name, [B, h, w, C] each, finest first.
            stages: the backbone's maps by name, [B, h, w, C] each, finest first; not used.
            canvas: [B, 2] int32 (rows, columns) inside the bucket; not used.
            bucket: (H, W) of the pixels; not used.

        Returns:
            {"pool": [B, h, w, C]}.
        """
        del stages, canvas, bucket
        return {"pool": list(pyramid.values())[-1][:, ::2, ::2]}


class LastLevelP6P7(TypedModule):
    """The extra levels p6 = conv(P5 or C5) and p7 = conv(relu(p6)), stride 2 (torchvision's LastLevelP6P7).

    As in torchvision, p6 reads P5 if ``in_channels == out_channels``, otherwise C5.

    Attributes:
        in_channels: channels of the map that p6 reads.
        out_channels: channels of p6 and of p7.
        dtype: dtype of the computation.
        param_dtype: dtype of the parameters; default float64 if ``dtype`` is float64, else float32.
        precision: ``jax.lax.Precision`` of every convolution and matrix product.
    """

    in_channels: int = 256
    out_channels: int = 256
    dtype: Dtype = jnp.float32
    param_dtype: Dtype | None = None
    precision: Precision = None

    def torch_names(self) -> Iterator[TorchName]:
        """Names of the modules in torchvision's LastLevelP6P7."""
        for level in ("p6", "p7"):
            yield TorchName(level, level)

    @nn.compact
    def __call__(
        self, pyramid: Features, stages: Features, *, canvas: Array | None, bucket: tuple[int, ...]
    ) -> Features:
        """Computes the two new levels.

        Args:
            pyramid: levels by name, [B, h, w, C] each, finest first.
            stages: the backbone's maps by name, [B, h, w, C] each, finest first.
            canvas: [B, 2] int32 (rows, columns) inside the bucket; ``None`` for the whole bucket.
            bucket: (H, W) of the pixels.

        Returns:
            {"p6": [B, h, w, out_channels], "p7": the same}; values beyond the canvas are undefined.
        """
        source = pyramid if self.in_channels == self.out_channels else stages
        conv = functools.partial(
            Conv,
            self.out_channels,
            3,
            strides=2,
            kernel_init=kaiming_uniform_a1,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
        )
        x = list(source.values())[-1]
        p6 = conv(name="p6")(mask_beyond(x, level_extent(canvas, bucket, x.shape[1:3])))
        p7 = conv(name="p7")(mask_beyond(nn.relu(p6), level_extent(canvas, bucket, p6.shape[1:3])))
        return {"p6": p6, "p7": p7}
