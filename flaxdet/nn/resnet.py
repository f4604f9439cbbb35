"""ResNet 18 to 152 as torchvision builds them, without the classifier, returning every stage by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

from flaxdet.nn.layers import (
    Array,
    Dtype,
    Precision,
    TypedModule,
    conv,
    kaiming_normal_fan_out,
    level_extent,
    max_pool_3x3,
    recomputed,
)
from flaxdet.nn.norm import (
    BatchNorm,
    FrozenBatchNorm,
    activated_conv,
    apply_affine,
    apply_norm,
    masked_conv,
    norm_affine,
)

STAGE_SIZES = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


class _Block(nn.Module):
    """What the two residual blocks share: convolutions as (kernel size, stride, channel factor) rows."""

    features: int
    strides: int
    convs: tuple[tuple[int, int, int], ...]
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module | None]
    recompute: Callable[[Callable[..., Any]], Callable[..., Any]]

    @nn.compact
    def __call__(self, x: Array, extent: Array | None, out_extent: Array | None, train: bool) -> Array:
        residual = x
        seen = extent
        affine = None  # of the last norm, which the next convolution applies
        for i, (kernel_size, strides, factor) in enumerate(self.convs, start=1):
            layer = self.conv(self.features * factor, kernel_size, strides=strides, name=f"conv{i}")
            x = masked_conv(layer, x, seen) if i == 1 else self.recompute(activated_conv)(layer, x, affine, seen)
            if strides > 1:
                seen = out_extent
            x, affine = norm_affine(self.norm(name=f"bn{i}"), x, seen, train=train)
        x = apply_affine(x, affine, residual.dtype)
        if residual.shape[-1] != x.shape[-1] or self.strides > 1:
            residual = self.conv(x.shape[-1], 1, strides=self.strides, name="downsample_conv")(residual)
            residual = apply_norm(self.norm(name="downsample_bn"), residual, out_extent, train=train)
        # without a barrier XLA:CPU adds up all earlier blocks again in each, and keeps their maps for it
        return lax.optimization_barrier(nn.relu(x + residual))


def _no_norm(*, name: str) -> None:
    """In place of a norm, which a bias already stands for."""
    del name


class ResNet(TypedModule):
    """torchvision's ResNet body (v1.5: the stride sits in a bottleneck's 3x3 convolution).

    Attributes:
        depth: 18, 34, 50, 101 or 152.
        width: channels of the stem. Stage i, from 0, has width * 2**i, four times as many for bottlenecks.
        frozen_bn: ``FrozenBatchNorm`` instead of live ``BatchNorm``.
        freeze_bn: in training, live BatchNorm normalises with its running statistics and leaves them alone
            (an addition to torchvision).
        remat: for the gradient, keeps the input of each residual block alone and computes the block again: less
            memory, more time. XLA:CPU undoes it unless ``jax.jit`` is given ``flaxdet.compiler_options()``.
        folded: no BatchNorm; its convolutions have a bias instead. ``flaxdet.fold_batch_norm`` makes such a body.
        dtype: computes.
        param_dtype: stores; default float64 if ``dtype`` is, else float32.
        precision: of every convolution and product.
    """

    depth: int = 50
    width: int = 64
    frozen_bn: bool = False
    freeze_bn: bool = False
    remat: bool = False
    folded: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype | None = None
    precision: Precision = None

    @property
    def stage_channels(self) -> dict[str, int]:
        """Channels of each returned stage."""
        expansion = 1 if self.depth < 50 else 4
        return {f"c{i}": self.width * 2 ** (i - 2) * expansion for i in range(2, 6)}

    @property
    def stage_strides(self) -> dict[str, int]:
        """Pixels from cell to cell of each returned stage."""
        return {f"c{i}": 2**i for i in range(2, 6)}

    @nn.compact
    def __call__(
        self,
        pixels: Float[Array, "B H W 3"],
        *,
        canvas: Int[Array, "B 2"] | None = None,
        train: bool = False,
    ) -> dict[str, Float[Array, "B h w C"]]:
        """Computes the stages c2, c3, c4, c5 at strides 4, 8, 16, 32.

        Args:
            pixels: [B, H, W, 3], zero beyond each canvas.
            canvas: [B, 2] int32 (rows, columns) inside the bucket, multiples of 32; ``None`` for all.
            train: BatchNorm's mode.

        Returns:
            Feature maps by name; beyond the canvas they hold rubbish.

        Raises:
            ValueError: for an unknown depth.
        """
        if self.depth not in STAGE_SIZES:
            raise ValueError(f"depth should be one of {sorted(STAGE_SIZES)}, got {self.depth}")
        options: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv_ = functools.partial(
            conv,
            use_bias=self.folded,
            kernel_init=kaiming_normal_fan_out,
            precision=self.precision,
            **options,
        )
        norm = functools.partial(FrozenBatchNorm if self.frozen_bn else BatchNorm, **options)
        if self.folded:
            norm = _no_norm
        norm_train = train and not self.freeze_bn
        # the blocks are named below, so their variables have the same paths either way
        block, recompute = _Block, recomputed
        if self.remat:  # then not its parts once more
            block, recompute = nn.remat(_Block, static_argnums=(4,)), lambda function: function  # pyright: ignore[reportArgumentType]
        bucket = pixels.shape[1:3]

        def extent(x: Array) -> Array | None:
            return level_extent(canvas, bucket, x.shape[1:3])

        x = conv_(self.width, 7, strides=2, name="conv1")(pixels.astype(self.dtype))
        x, affine = norm_affine(norm(name="bn1"), x, extent(x), train=norm_train)
        pooled = recomputed(
            lambda x, affine: max_pool_3x3(nn.relu(apply_affine(x, affine, self.dtype))), jax.checkpoint
        )
        x = pooled(x, affine)

        stages = {}
        for stage, blocks in enumerate(STAGE_SIZES[self.depth], start=1):
            features = self.width * 2 ** (stage - 1)
            for i in range(blocks):
                strides = 2 if stage > 1 and i == 0 else 1
                convs = ((3, strides, 1), (3, 1, 1)) if self.depth < 50 else ((1, 1, 1), (3, strides, 1), (1, 1, 4))
                before = extent(x)
                after = before if strides == 1 or before is None else -(-before // 2)
                layer = block(features, strides, convs, conv_, norm, recompute, name=f"layer{stage}_{i}")
                x = layer(x, before, after, norm_train)
            stages[f"c{stage + 1}"] = x
        return stages
