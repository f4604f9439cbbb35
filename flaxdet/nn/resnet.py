"""ResNet 10 to 152 as torchvision builds them, without the classifier, returning every stage by name."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float, Int

from flaxdet.nn.backbone import ConvNorm, Path, Stage
from flaxdet.nn.canvas import level_extent
from flaxdet.nn.chain import chain
from flaxdet.nn.initializers import kaiming_normal_fan_out
from flaxdet.nn.layers import Array, Conv, Dtype, Precision, TypedModule
from flaxdet.nn.names import TorchName
from flaxdet.nn.norm import BatchNorm, FrozenBatchNorm, Norm
from flaxdet.nn.options import check_counts, check_numbers
from flaxdet.nn.pooling import max_pool_3x3
from flaxdet.nn.relu import relu
from flaxdet.xla.barriers import materialise

STAGE_SIZES = {
    10: (1, 1, 1, 1),  # torchvision has no builder, but makes it: ``ResNet(BasicBlock, [1, 1, 1, 1])``
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


class _Block(nn.Module):
    """A residual block: the basic one of two 3x3 convolutions, or the bottleneck."""

    features: int
    strides: int
    bottleneck: bool
    conv: Callable[..., Conv]
    norm: Callable[..., Norm | None]
    remat: bool  # rematerialises norms, ReLUs and masks

    @nn.compact
    def __call__(self, x: Array, extent: Array | None, train: bool) -> Array:
        conv, norm = self.conv, self.norm
        if self.bottleneck:
            layers = [
                conv(self.features, 1, name="conv1"),
                norm(name="bn1"),
                nn.relu,
                conv(self.features, 3, strides=self.strides, name="conv2"),
                norm(name="bn2"),
                nn.relu,
                conv(4 * self.features, 1, name="conv3"),
                norm(name="bn3"),
            ]
        else:
            layers = [
                conv(self.features, 3, strides=self.strides, name="conv1"),
                norm(name="bn1"),
                nn.relu,
                conv(self.features, 3, name="conv2"),
                norm(name="bn2"),
            ]
        y = chain(layers, x, extent, train=train, remat=self.remat).value
        if self.strides > 1 or x.shape[-1] != y.shape[-1]:
            shortcut = [
                conv(y.shape[-1], 1, strides=self.strides, name="downsample_conv"),
                norm(name="downsample_bn"),
            ]
            x = chain(shortcut, x, extent, train=train).value
        # Without the barrier, XLA:CPU repeats the sums of all earlier blocks in each block, and saves the maps of the
        # earlier blocks for these sums.
        return materialise(relu(x + y))


def _no_norm(*, name: str) -> None:
    """Stands in for a norm that is folded into the convolution's bias."""
    del name


class ResNet(TypedModule):
    """torchvision's ResNet body (v1.5: in a bottleneck, the 3x3 convolution has the stride).

    Attributes:
        depth: 10, 18, 34, 50, 101 or 152.
        frozen_bn: ``FrozenBatchNorm`` instead of live ``BatchNorm``.
        freeze_bn: in training, live BatchNorm normalises with the running statistics and does not update them (an
            addition to torchvision).
        remat: rematerialises each residual block in the backward pass, and saves only the input of the block: less
            memory, more time. XLA:CPU undoes this unless ``jax.jit`` is given ``flaxdet.compiler_options()``.
        folded: no BatchNorm; the convolutions have biases instead. ``flaxdet.fold_batch_norm`` makes such a body.
        width: channels of the stem. Stage i, from 0 to 3, has width * 2**i channels, or 4 * width * 2**i from depth 50
            on.
        norm_eps: added to the variance by each BatchNorm, live or frozen.
        dtype: dtype of the computation.
        param_dtype: dtype of the parameters; default float64 if ``dtype`` is float64, else float32.
        precision: ``jax.lax.Precision`` of every convolution and matrix product.

    Raises:
        ValueError: for an unknown depth, or a width or norm_eps out of range.
        TypeError: for a width that is no whole number, or a norm_eps that is no number.
    """

    depth: int = 50
    frozen_bn: bool = False
    freeze_bn: bool = False
    remat: bool = False
    folded: bool = False
    width: int = 64
    norm_eps: float = 1e-5
    dtype: Dtype = jnp.float32
    param_dtype: Dtype | None = None
    precision: Precision = None

    def __post_init__(self) -> None:
        if self.depth not in STAGE_SIZES:
            raise ValueError(f"depth should be one of {sorted(STAGE_SIZES)}, got {self.depth}")
        check_counts(self, 1, "width")
        check_numbers(self, "norm_eps", low=0)
        super().__post_init__()

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The returned maps, finest first."""
        expansion = 4 if self._bottleneck else 1
        return tuple(Stage(f"c{i + 2}", self.width * 2**i * expansion, 2 ** (i + 2)) for i in range(4))

    @property
    def trainable_groups(self) -> tuple[tuple[Path, ...], ...]:
        """Path prefixes of layer4, layer3, layer2, layer1 and the stem, as ``trainable_backbone_layers`` counts."""
        layers = [tuple((name,) for name in names) for names in self._block_names()]
        return (*reversed(layers), (("conv1",), ("bn1",)))

    @property
    def conv_norm_pairs(self) -> tuple[ConvNorm, ...]:
        """Every convolution with its norm; none in a folded body."""
        if self.folded:
            return ()
        pairs = [ConvNorm(("conv1",), ("bn1",), self.norm_eps)]
        for stage, names in enumerate(self._block_names()):
            for name in names:
                layers = [(f"conv{i}", f"bn{i}") for i in range(1, 4 if self._bottleneck else 3)]
                if name == names[0] and (stage > 0 or self._bottleneck):
                    layers.append(("downsample_conv", "downsample_bn"))
                pairs += [ConvNorm((name, conv), (name, norm), self.norm_eps) for conv, norm in layers]
        return tuple(pairs)

    def without_norms(self) -> ResNet:
        """The body for folded variables: a bias in each convolution, no norms.

        Returns:
            The same ResNet with ``folded=True``.

        Raises:
            ValueError: if the body is folded already.
        """
        if self.folded:
            raise ValueError("the model's BatchNorm is folded already")
        return self.clone(folded=True, frozen_bn=False, freeze_bn=False, parent=None)

    @property
    def _bottleneck(self) -> bool:
        return self.depth >= 50

    def _block_names(self) -> list[list[str]]:
        return [[f"layer{i}_{j}" for j in range(blocks)] for i, blocks in enumerate(STAGE_SIZES[self.depth], start=1)]

    def torch_names(self) -> Iterator[TorchName]:
        """Names of the modules in torchvision's ResNet, in the order of its state_dict."""
        yield TorchName("conv1", "conv1")
        yield TorchName("bn1", "bn1")
        for block in itertools.chain(*self._block_names()):
            torch = block.replace("_", ".")
            for j in range(1, 4 if self._bottleneck else 3):
                yield TorchName(f"{block}/conv{j}", f"{torch}.conv{j}")
                yield TorchName(f"{block}/bn{j}", f"{torch}.bn{j}")
            yield TorchName(f"{block}/downsample_conv", f"{torch}.downsample.0")
            yield TorchName(f"{block}/downsample_bn", f"{torch}.downsample.1")

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
            canvas: [B, 2] int32 (rows, columns) inside the bucket, multiples of 32; ``None`` for the whole bucket.
            train: whether BatchNorm is in training mode.

        Returns:
            Feature maps by name; values beyond the canvas are undefined.
        """
        options: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = functools.partial(
            Conv, use_bias=self.folded, kernel_init=kaiming_normal_fan_out, precision=self.precision, **options
        )
        norm = functools.partial(FrozenBatchNorm if self.frozen_bn else BatchNorm, eps=self.norm_eps, **options)
        if self.folded:
            norm = _no_norm
        norm_train = train and not self.freeze_bn
        # the blocks are named below, so that the paths of the variables do not depend on remat
        block = nn.remat(_Block, static_argnums=(3,)) if self.remat else _Block
        bucket = pixels.shape[1:3]

        def extent(x: Array) -> Array | None:
            return level_extent(canvas, bucket, x.shape[1:3])

        stem = [conv(self.width, 7, strides=2, name="conv1"), norm(name="bn1"), nn.relu, max_pool_3x3]
        x = pixels.astype(self.dtype)
        x = chain(stem, x, extent(x), train=norm_train).value

        stages = {}
        for i, names in enumerate(self._block_names()):
            for name in names:
                strides = 2 if i > 0 and name == names[0] else 1
                # a block that is rematerialised as a whole should not rematerialise parts again
                layer = block(self.width * 2**i, strides, self._bottleneck, conv, norm, not self.remat, name=name)
                x = layer(x, extent(x), norm_train)
            stages[f"c{i + 2}"] = x
        return stages
