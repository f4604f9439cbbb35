"""The feature pyramid network, and a backbone with a feature pyramid."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from flaxdet.nn.backbone import ConvNorm, Path, Stage, is_foldable, stages_of, trainable_groups_of
from flaxdet.nn.canvas import level_extent
from flaxdet.nn.chain import chain
from flaxdet.nn.initializers import kaiming_uniform_a1
from flaxdet.nn.layers import Array, Conv, Dtype, Precision, TypedModule
from flaxdet.nn.names import TorchName, inside, names_of
from flaxdet.nn.norm import BatchNorm
from flaxdet.nn.options import check_counts

Features = dict[str, Float[Array, "B h w C"]]


def _nearest(size: int, out: int) -> np.ndarray:
    """Source index of each output cell in torch's ``interpolate(mode="nearest")``, which floors in float32."""
    scale = np.float32(size) / np.float32(out)
    return np.minimum(np.floor(np.arange(out, dtype=np.float32) * scale).astype(np.int32), size - 1)


def upsample_nearest(x: Float[Array, "B h w C"], shape: tuple[int, ...]) -> Float[Array, "B H W C"]:
    """``torch.nn.functional.interpolate(x, size=shape, mode="nearest")`` on an NHWC array."""
    batch, height, width, channels = x.shape
    if shape == (2 * height, 2 * width):
        x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
        return x.reshape(batch, *shape, channels)
    return x[:, _nearest(height, shape[0])][:, :, _nearest(width, shape[1])]


class FeaturePyramidNetwork(TypedModule):
    """``torchvision.ops.FeaturePyramidNetwork`` on NHWC maps, finest first.

    Attributes:
        out_channels: channels of every output level.
        extra_blocks: module that adds levels, e.g. ``LastLevelMaxPool()`` or ``LastLevelP6P7()``.
        use_norm: live BatchNorm after each convolution, which then has no bias (torchvision's
            ``norm_layer=nn.BatchNorm2d``).
        freeze_bn: as in ``ResNet``.
        dtype: dtype of the computation.
        param_dtype: dtype of the parameters; default float64 if ``dtype`` is float64, else float32.
        precision: ``jax.lax.Precision`` of every convolution and matrix product.

    Raises:
        ValueError: for an option out of range.
        TypeError: for an option of another kind.
    """

    out_channels: int = 256
    extra_blocks: nn.Module | None = None
    use_norm: bool = False
    freeze_bn: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype | None = None
    precision: Precision = None

    def __post_init__(self) -> None:
        check_counts(self, 1, "out_channels")
        super().__post_init__()

    def torch_names(self, stages: int) -> Iterator[TorchName]:
        """Names of the modules in torchvision's FeaturePyramidNetwork, in the order of its state_dict.

        Args:
            stages: number of stages that the pyramid reads.

        Yields:
            The names.
        """
        for blocks in ("inner_blocks", "layer_blocks"):
            for i in range(stages):
                yield TorchName(f"{blocks}_{i}/conv", f"{blocks}.{i}.0")
                yield TorchName(f"{blocks}_{i}/norm", f"{blocks}.{i}.1")
        yield from inside(names_of(self.extra_blocks), "extra_blocks", "extra_blocks")

    def level_pairs(self, levels: int) -> tuple[ConvNorm, ...]:
        """Every convolution with its norm; none without ``use_norm``.

        Args:
            levels: number of stages that the pyramid reads.

        Returns:
            The pairs, with paths from the root of the pyramid's variables.
        """
        blocks = [f"{kind}_{i}" for i in range(levels) for kind in ("inner_blocks", "layer_blocks")]
        return tuple(ConvNorm(("conv",), ("norm",)).below(block) for block in blocks if self.use_norm)

    def without_norms(self) -> FeaturePyramidNetwork:
        """The pyramid for folded variables: a bias in each convolution, no norms.

        Returns:
            The same pyramid with ``use_norm=False``.
        """
        return self.clone(use_norm=False, freeze_bn=False, parent=None)

    @nn.compact
    def __call__(
        self,
        stages: Features,
        *,
        canvas: Int[Array, "B 2"] | None = None,
        bucket: tuple[int, ...],
        train: bool = False,
    ) -> Features:
        """Builds the pyramid.

        Args:
            stages: feature maps by name, finest first; c3 becomes p3 and so on, other names stay.
            canvas: [B, 2] int32 (rows, columns) inside the bucket; ``None`` for the whole bucket.
            bucket: (H, W) of the pixels.
            train: whether BatchNorm is in training mode.

        Returns:
            Levels by name, finest first; values beyond the canvas are undefined.

        Raises:
            ValueError: if two levels would have the same name.
        """

        def block(x: Array, kernel_size: int, name: str) -> Array:
            dtypes = self.dtype, self.param_dtype, self.precision
            layer = _ConvNorm(self.out_channels, kernel_size, self.use_norm, *dtypes, name=name)
            return layer(x, level_extent(canvas, bucket, x.shape[1:3]), train and not self.freeze_bn)

        names = list(stages)
        levels = [level_name(name) for name in names]
        if len(set(levels)) < len(levels):
            raise ValueError(f"stages {names} would make levels {levels}: each needs a name of its own")
        pyramid: Features = {}
        inner = None
        for i in reversed(range(len(names))):
            lateral = block(stages[names[i]], 1, f"inner_blocks_{i}")
            inner = lateral if inner is None else lateral + upsample_nearest(inner, lateral.shape[1:3])
            pyramid[levels[i]] = block(inner, 3, f"layer_blocks_{i}")
        pyramid = dict(reversed(pyramid.items()))
        if self.extra_blocks is not None:
            extra = self.extra_blocks(pyramid, stages, canvas=canvas, bucket=bucket)
            if not pyramid.keys().isdisjoint(extra):
                raise ValueError(f"extra_blocks makes levels {list(extra)}, and the stages make {levels} already")
            pyramid |= extra
        return pyramid


def level_name(stage: str) -> str:
    """The name of the pyramid level of a backbone stage: p4 for c4; other names stay."""
    return f"p{stage[1:]}" if stage[:1] == "c" and stage[1:].isdigit() else stage


class _ConvNorm(TypedModule):
    features: int
    kernel_size: int
    use_norm: bool
    dtype: Dtype
    param_dtype: Dtype | None
    precision: Precision

    @nn.compact
    def __call__(self, x: Array, extent: Array | None, train: bool) -> Array:
        options: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        layers = [
            Conv(
                self.features,
                self.kernel_size,
                use_bias=not self.use_norm,
                kernel_init=kaiming_uniform_a1,
                precision=self.precision,
                name="conv",
                **options,
            ),
            BatchNorm(name="norm", **options) if self.use_norm else None,
        ]
        return chain(layers, x, extent, train=train).value


class BackboneWithFPN(nn.Module):
    """A body that returns named stages, and a pyramid on ``returned_stages`` (torchvision's BackboneWithFPN).

    Attributes:
        body: module ``(pixels, *, canvas, train) -> {name: [B, h, w, C]}``, e.g. ``ResNet()``.
        fpn: the ``FeaturePyramidNetwork``.
        returned_stages: names of the stages that the pyramid reads, finest first.
    """

    body: nn.Module
    fpn: FeaturePyramidNetwork
    returned_stages: tuple[str, ...] = ("c2", "c3", "c4", "c5")

    @property
    def out_channels(self) -> int:
        """Channels of every level."""
        return self.fpn.out_channels

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The levels of the stages that the body declares."""
        strides = {stage.name: stage.stride for stage in stages_of(self.body)}
        return tuple(
            Stage(level_name(name), self.out_channels, strides[name])
            for name in self.returned_stages
            if name in strides
        )

    @property
    def level_strides(self) -> dict[str, int]:
        """Pixels between neighbouring cells, for each of the ``stages``."""
        return {stage.name: stage.stride for stage in self.stages}

    @property
    def trainable_groups(self) -> tuple[tuple[Path, ...], ...]:
        """The groups that the body declares. The pyramid is in no group and always trains."""
        return tuple(tuple(("body", *path) for path in group) for group in trainable_groups_of(self.body))

    @property
    def conv_norm_pairs(self) -> tuple[ConvNorm, ...]:
        """The pairs of the body and of the pyramid."""
        body = self.body.conv_norm_pairs if is_foldable(self.body) else ()
        pyramid = self.fpn.level_pairs(len(self.returned_stages))
        return (*(pair.below("body") for pair in body), *(pair.below("fpn") for pair in pyramid))

    def without_norms(self) -> BackboneWithFPN:
        """The backbone for folded variables: a bias in each convolution, no norms.

        Returns:
            The same backbone without the norms of ``conv_norm_pairs``.
        """
        body = self.body.without_norms() if is_foldable(self.body) else self.body
        return self.clone(body=body, fpn=self.fpn.without_norms(), parent=None)

    def torch_names(self) -> Iterator[TorchName]:
        """Names of the modules in torchvision's BackboneWithFPN, in the order of its state_dict."""
        yield from inside(names_of(self.body), "body", "body")
        yield from inside(self.fpn.torch_names(len(self.returned_stages)), "fpn", "fpn")

    def stages_and_levels(
        self, pixels: Array, *, canvas: Array | None = None, train: bool = False
    ) -> tuple[Features, Features]:
        """Computes the body's stages and the pyramid's levels.

        Args:
            pixels: [B, H, W, 3], as for ``__call__``.
            canvas: [B, 2], as for ``__call__``.
            train: as for ``__call__``.

        Returns:
            The stages and the levels, each {name: [B, h, w, C]}, finest first.

        Raises:
            TypeError: if the body returns no mapping.
            ValueError: if the body lacks one of ``returned_stages``.
        """
        returned = self.body(pixels, canvas=canvas, train=train)
        body = f"body {type(self.body).__name__}"
        if not isinstance(returned, Mapping):
            raise TypeError(f"{body} should return a mapping of names to maps, it returned {type(returned).__name__}")
        stages = dict(returned)
        missing = [name for name in self.returned_stages if name not in stages]
        if missing:
            raise ValueError(f"returned_stages asks for {missing}, and {body} returned {list(stages)}")
        read = {name: stages[name] for name in self.returned_stages}
        return stages, self.fpn(read, canvas=canvas, bucket=pixels.shape[1:3], train=train)

    def __call__(
        self,
        pixels: Float[Array, "B H W 3"],
        *,
        canvas: Int[Array, "B 2"] | None = None,
        train: bool = False,
    ) -> Features:
        """Computes the levels.

        Args:
            pixels: [B, H, W, 3], normalised, zero beyond each canvas.
            canvas: [B, 2] int32 (rows, columns) inside the bucket, multiples of 32; ``None`` for the whole bucket.
            train: whether BatchNorm is in training mode.

        Returns:
            The levels by name, [B, h, w, out_channels] each, finest first, such as "p3".
        """
        return self.stages_and_levels(pixels, canvas=canvas, train=train)[1]
