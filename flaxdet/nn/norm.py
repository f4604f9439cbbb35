"""BatchNorm (live and frozen) and GroupNorm with torch's arithmetic, their statistics masked to the canvas."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jax.nn.initializers import ones, zeros
from jaxtyping import Bool, Float, Int

from flaxdet.nn.layers import Array, Dtype, TypedModule, at_least_float32, inside, mask_beyond

# What a norm does to its input, a factor and a shift for each channel (GroupNorm: and image); None for no norm. Both
# are float32 at least: their gradients are sums over whole maps, which bfloat16 can't hold.
Affine = tuple[Array, Array] | None


def apply_affine(x: Array, affine: Affine, dtype: Dtype) -> Array:
    """x * factor + shift, computed in the dtype of the two and returned in ``dtype``."""
    if affine is None:
        return x
    factor, shift = (each.reshape((1,) * (x.ndim - each.ndim) + each.shape) for each in affine)
    return (x.astype(factor.dtype) * factor + shift).astype(dtype)


class BatchNorm(TypedModule):
    """``torch.nn.BatchNorm2d`` on channels-last arrays.

    In training it normalises with the biased variance of the batch and, as torch, moves the running
    variance by the *unbiased* one (Flax's own does not). Statistics are taken over all axes but the last,
    over the cells that ``mask`` admits; under ``jit`` with a sharded batch they are the global batch's.

    Attributes:
        eps: added to the variance.
        momentum: share of the new batch in the running statistics (torch's convention, 1 - Flax's).
        dtype: computes.
        param_dtype: stores; default float64 if ``dtype`` is, else float32.
    """

    eps: float = 1e-5
    momentum: float = 0.1
    dtype: Dtype = jnp.float32
    param_dtype: Dtype | None = None

    def __call__(
        self,
        x: Float[Array, "... C"],
        *,
        train: bool = False,
        mask: Bool[Array, "..."] | None = None,
    ) -> Float[Array, "... C"]:
        """Normalises ``x``.

        Args:
            x: [..., C].
            train: use and update the batch's statistics instead of the running ones.
            mask: [...], True where a cell counts for the statistics; default everywhere. Where it is True nowhere, the
                running statistics stay.

        Returns:
            [..., C] in ``dtype``.

        Raises:
            ValueError: in training with a single value a channel, as torch.
        """
        x = x.astype(at_least_float32(self.dtype))
        return apply_affine(x, self.affine(x, train=train, mask=mask), self.dtype)

    @nn.compact
    def affine(
        self,
        x: Float[Array, "... C"],
        *,
        train: bool = False,
        mask: Bool[Array, "..."] | None = None,
    ) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
        """What ``__call__`` does to ``x``, which is x * factor + shift, without doing it.

        Args:
            x: [..., C].
            train: use and update the batch's statistics instead of the running ones.
            mask: [...], True where a cell counts for the statistics; default everywhere.

        Returns:
            factor and shift, [C] each in float32 (float64 if ``dtype`` is).

        Raises:
            ValueError: in training with a single value a channel, as torch.
        """
        features = (x.shape[-1],)
        wide = at_least_float32(self.dtype)
        scale = self.param("scale", ones, features, self.param_dtype)
        bias = self.param("bias", zeros, features, self.param_dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, features, self.param_dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, features, self.param_dtype)
        if not train:
            mean, var = running_mean.value.astype(wide), running_var.value.astype(wide)
        else:
            if x.size == x.shape[-1]:
                raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
            mean, var, count = _batch_statistics(x.astype(wide), mask)
            if not self.is_initializing() and self.is_mutable_collection("batch_stats"):
                unbiased = var * (count / jnp.maximum(count - 1, 1))
                for running, new in ((running_mean, mean), (running_var, unbiased)):
                    moved = (1 - self.momentum) * running.value.astype(wide) + self.momentum * new
                    # torch leaves its statistics alone where it sees no cell, as without a sampled RoI
                    moved = jnp.where(count > 0, moved.astype(running.value.dtype), running.value)
                    running.value = lax.stop_gradient(moved)
        factor = scale.astype(wide) * lax.rsqrt(var + self.eps)
        return factor, bias.astype(wide) - mean * factor


def _batch_statistics(x: Array, mask: Array | None) -> tuple[Array, Array, Array]:
    """Mean and biased variance of each channel, and the number of cells; zeros where the mask admits no cell."""
    axes = tuple(range(x.ndim - 1))
    if mask is None:
        count = jnp.asarray(x.size // x.shape[-1], x.dtype)
        mean = jnp.mean(x, axes)
        centred = x - mean.reshape((1,) * len(axes) + mean.shape)
    else:
        weight = mask[..., None].astype(x.dtype)
        count = jnp.sum(weight)
        mean = jnp.sum(jnp.where(mask[..., None], x, 0), axes) / jnp.maximum(count, 1)
        centred = jnp.where(mask[..., None], x - mean.reshape((1,) * len(axes) + mean.shape), 0)
    return mean, jnp.sum(centred * centred, axes) / jnp.maximum(count, 1), count


class FrozenBatchNorm(TypedModule):
    """``torchvision.ops.FrozenBatchNorm2d``: a fixed affine map from four stored vectors.

    All four (scale, bias, mean, var) live in ``batch_stats`` and are never written, so that neither an
    optimiser nor a parameter count sees them.

    Attributes:
        eps: added to the variance.
        dtype: computes.
        param_dtype: stores; default float64 if ``dtype`` is, else float32.
    """

    eps: float = 1e-5
    dtype: Dtype = jnp.float32
    param_dtype: Dtype | None = None

    def __call__(
        self,
        x: Float[Array, "... C"],
        *,
        train: bool = False,
        mask: Bool[Array, "..."] | None = None,
    ) -> Float[Array, "... C"]:
        """Applies the map.

        Args:
            x: [..., C].
            train: makes no difference; taken as ``BatchNorm`` takes it.
            mask: the same.

        Returns:
            [..., C] in ``dtype``.
        """
        x = x.astype(at_least_float32(self.dtype))
        return apply_affine(x, self.affine(x, train=train, mask=mask), self.dtype)

    @nn.compact
    def affine(
        self,
        x: Float[Array, "... C"],
        *,
        train: bool = False,
        mask: Bool[Array, "..."] | None = None,
    ) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
        """The map, which is x * factor + shift, without applying it.

        Args:
            x: [..., C].
            train: makes no difference; taken as ``BatchNorm`` takes it.
            mask: the same.

        Returns:
            factor and shift, [C] each in float32 (float64 if ``dtype`` is).
        """
        del train, mask
        features = (x.shape[-1],)
        wide = at_least_float32(self.dtype)
        scale, bias, mean, var = (
            lax.stop_gradient(self.variable("batch_stats", name, init, features, self.param_dtype).value.astype(wide))
            for name, init in (
                ("scale", jnp.ones),
                ("bias", jnp.zeros),
                ("mean", jnp.zeros),
                ("var", jnp.ones),
            )
        )
        factor = scale * lax.rsqrt(var + self.eps)
        return factor, bias - mean * factor


class GroupNorm(TypedModule):
    """``torch.nn.GroupNorm`` on NHWC arrays, its statistics over each image's extent alone.

    Attributes:
        num_groups: of neighbouring channels, all of one size.
        eps: added to the variance.
        dtype: computes.
        param_dtype: stores; default float64 if ``dtype`` is, else float32.
    """

    num_groups: int = 32
    eps: float = 1e-5
    dtype: Dtype = jnp.float32
    param_dtype: Dtype | None = None

    def __call__(self, x: Float[Array, "B h w C"], extent: Int[Array, "B 2"] | None = None) -> Float[Array, "B h w C"]:
        """Normalises each image's groups of channels.

        Args:
            x: [B, h, w, C].
            extent: [B, 2] int32 (rows, columns) that count for the statistics; default all.

        Returns:
            [B, h, w, C] in ``dtype``.

        Raises:
            ValueError: if the groups don't divide the channels.
        """
        x = x.astype(at_least_float32(self.dtype))
        return apply_affine(x, self.affine(x, extent), self.dtype)

    @nn.compact
    def affine(
        self, x: Float[Array, "B h w C"], extent: Int[Array, "B 2"] | None = None
    ) -> tuple[Float[Array, "B 1 1 C"], Float[Array, "B 1 1 C"]]:
        """What ``__call__`` does to ``x``, which is x * factor + shift, without doing it.

        Args:
            x: [B, h, w, C].
            extent: [B, 2] int32 (rows, columns) that count for the statistics; default all.

        Returns:
            factor and shift, [B, 1, 1, C] each in float32 (float64 if ``dtype`` is).

        Raises:
            ValueError: if the groups don't divide the channels.
        """
        batch, height, width, channels = x.shape
        if channels % self.num_groups:
            raise ValueError(f"num_groups={self.num_groups} should divide the {channels} channels")
        scale = self.param("scale", ones, (channels,), self.param_dtype)
        bias = self.param("bias", zeros, (channels,), self.param_dtype)

        wide = x.astype(at_least_float32(self.dtype))
        size = channels // self.num_groups
        if extent is None:
            count = jnp.full((batch, 1), height * width * size, wide.dtype)
        else:
            count = (extent[:, :1] * extent[:, 1:] * size).astype(wide.dtype)

        def group_mean(values: Array) -> Array:  # [B, h, w, C] -> [B, C], equal within a group
            if extent is not None:
                values = jnp.where(inside(extent, (height, width))[..., None], values, 0)
            sums = jnp.sum(values, (1, 2)).reshape(batch, self.num_groups, size).sum(-1) / count
            return jnp.repeat(sums, size, axis=1)

        mean = group_mean(wide)
        var = group_mean(jnp.square(wide - mean[:, None, None]))
        factor = scale.astype(wide.dtype)[None] * lax.rsqrt(var + self.eps)
        shift = bias.astype(wide.dtype)[None] - mean * factor
        return factor[:, None, None], shift[:, None, None]


def apply_norm(norm: nn.Module | None, x: Array, extent: Array | None, *, train: bool) -> Array:
    """Applies any norm above to a map [B, h, w, C] inside its extent; ``None`` is the identity."""
    return apply_affine(*norm_affine(norm, x, extent, train=train), x.dtype)


def norm_affine(norm: Any, x: Array, extent: Array | None, *, train: bool) -> tuple[Array, Affine]:
    """What any norm above does to a map [B, h, w, C] inside its extent, for ``apply_affine``.

    Returns:
        The map cast to float32 (float64 stays), and its factor and shift. Apply them to this map, not to ``x``: its
        gradient through the statistics and its direct gradient are then added in float32, and rounded once.
    """
    if norm is None:
        return x, None
    x = x.astype(at_least_float32(norm.dtype))
    if isinstance(norm, GroupNorm):
        return x, norm.affine(x, extent)
    mask = None
    if train and extent is not None:
        mask = inside(extent, x.shape[1:3])
    return x, norm.affine(x, train=train, mask=mask)


def masked_conv(layer: Any, x: Array, extent: Array | None) -> Array:
    """A convolution (``Conv``) of a map [B, h, w, C], zero beyond its extent for kernels that see neighbours."""
    return layer(x if layer.kernel_size == (1, 1) else mask_beyond(x, extent))


def activated_conv(layer: Any, x: Array, affine: Affine, extent: Array | None) -> Array:
    """The same of ReLU(norm(x)), the norm given by what it does; for ``recomputed``."""
    return masked_conv(layer, nn.relu(apply_affine(x, affine, layer.dtype)), extent)
