"""BatchNorm (live and frozen) and GroupNorm with torch's arithmetic, and with statistics masked to the canvas."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jax.nn.initializers import ones, zeros
from jaxtyping import Bool, Float

from flaxdet.nn.layers import Array, Dtype, TypedModule, at_least_float32

# Scale and shift of a norm x * scale + shift: [C] each, or [B, 1, 1, C] if the images have different values. In float32
# at least, since the gradients of scale and shift are sums over whole maps, which are inaccurate in bfloat16.
ScaleShift = tuple[Array, Array]


def scaled_and_shifted(x: Array, by: ScaleShift, dtype: Dtype) -> Array:
    """x * scale + shift, computed in the dtype of scale and shift, and returned in ``dtype``."""
    scale, shift = (each.reshape((1,) * (x.ndim - each.ndim) + each.shape) for each in by)
    return (x.astype(scale.dtype) * scale + shift).astype(dtype)


class Norm(TypedModule):
    """Base of the norms, which scale and shift each channel.

    A subclass declares the fields ``dtype`` and ``param_dtype`` and defines ``scale_and_shift``. ``flaxdet.nn.chain``
    applies scale and shift where the next layer reads the map.
    """

    def __call__(
        self, x: Float[Array, "... C"], *, train: bool = False, mask: Bool[Array, "..."] | None = None
    ) -> Float[Array, "... C"]:
        """Normalises ``x``.

        Args:
            x: [..., C]; for GroupNorm [B, h, w, C].
            train: BatchNorm normalises with the statistics of the batch instead of the running statistics, and updates
                the running statistics. The other norms ignore it.
            mask: [...], True for the cells that count for the statistics; default all cells.

        Returns:
            [..., C] in ``dtype``.
        """
        x = x.astype(at_least_float32(self.dtype))
        return scaled_and_shifted(x, self.scale_and_shift(x, train=train, mask=mask), self.dtype)

    def scale_and_shift(
        self, x: Float[Array, "... C"], *, train: bool = False, mask: Bool[Array, "..."] | None = None
    ) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """The norm of ``x`` as x * scale + shift, not yet applied.

        Args:
            x: [..., C]; for GroupNorm [B, h, w, C].
            train: as for ``__call__``.
            mask: [...], as for ``__call__``.

        Returns:
            scale and shift in float32 (float64 if ``dtype`` is), [C] each; GroupNorm's are [B, 1, 1, C].

        Raises:
            NotImplementedError: in this base class.
        """
        raise NotImplementedError(f"{type(self).__name__} should define scale_and_shift")


class BatchNorm(Norm):
    """``torch.nn.BatchNorm2d`` on channels-last arrays.

    In training it normalises with the biased variance of the batch. The running variance is updated with the *unbiased*
    variance, as in torch and unlike in Flax. Statistics are over all axes but the last, and over the cells that
    ``mask`` admits. Under ``jit`` with a sharded batch they are the statistics of the global batch.

    Attributes:
        eps: added to the variance.
        momentum: weight of the new batch in the running statistics (torch's momentum, which is 1 - Flax's momentum).
        dtype: dtype of the computation.
        param_dtype: dtype of the parameters and of the running statistics; default float64 if ``dtype`` is float64,
            else float32.
    """

    eps: float = 1e-5
    momentum: float = 0.1
    dtype: Dtype = jnp.float32
    param_dtype: Dtype | None = None

    @nn.compact
    def scale_and_shift(self, x: Array, *, train: bool = False, mask: Array | None = None) -> ScaleShift:
        """The norm of ``x`` as x * scale + shift, not yet applied.

        Args:
            x: [..., C].
            train: normalises with the statistics of the batch instead of the running statistics, and updates the
                running statistics.
            mask: [...], True for the cells that count for the statistics; default all cells. If no cell counts, the
                running statistics are not updated.

        Returns:
            scale and shift, [C] each in float32 (float64 if ``dtype`` is).

        Raises:
            ValueError: in training with a single value per channel, as in torch.
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
                    updated = (1 - self.momentum) * running.value.astype(wide) + self.momentum * new
                    # like torch, no update without cells, as without a sampled RoI
                    updated = jnp.where(count > 0, updated.astype(running.value.dtype), running.value)
                    running.value = lax.stop_gradient(updated)
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


class FrozenBatchNorm(Norm):
    """``torchvision.ops.FrozenBatchNorm2d``: a fixed scale and shift from four stored vectors.

    The vectors (scale, bias, mean, var) are in ``batch_stats`` and are never written, so that neither an optimiser nor
    a parameter count includes them.

    Attributes:
        eps: added to the variance.
        dtype: dtype of the computation.
        param_dtype: dtype of the stored vectors; default float64 if ``dtype`` is float64, else float32.
    """

    eps: float = 1e-5
    dtype: Dtype = jnp.float32
    param_dtype: Dtype | None = None

    @nn.compact
    def scale_and_shift(self, x: Array, *, train: bool = False, mask: Array | None = None) -> ScaleShift:
        """The norm as x * scale + shift, not yet applied.

        Args:
            x: [..., C].
            train: ignored; for the same signature as ``BatchNorm``.
            mask: [...], ignored too.

        Returns:
            scale and shift, [C] each in float32 (float64 if ``dtype`` is).
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


class GroupNorm(Norm):
    """``torch.nn.GroupNorm`` on NHWC arrays, with statistics over the cells that ``mask`` admits.

    Attributes:
        num_groups: number of groups, each of the same number of neighbouring channels.
        eps: added to the variance.
        dtype: dtype of the computation.
        param_dtype: dtype of the parameters; default float64 if ``dtype`` is float64, else float32.
    """

    num_groups: int = 32
    eps: float = 1e-5
    dtype: Dtype = jnp.float32
    param_dtype: Dtype | None = None

    @nn.compact
    def scale_and_shift(self, x: Array, *, train: bool = False, mask: Array | None = None) -> ScaleShift:
        """The norm of ``x`` as x * scale + shift, not yet applied.

        Args:
            x: [B, h, w, C].
            train: ignored; for the same signature as ``BatchNorm``.
            mask: [B, h, w], True for the cells that count for the statistics; default all cells.

        Returns:
            scale and shift, [B, 1, 1, C] each in float32 (float64 if ``dtype`` is).

        Raises:
            ValueError: if the groups don't divide the channels.
        """
        del train
        batch, height, width, channels = x.shape
        if channels % self.num_groups:
            raise ValueError(f"num_groups={self.num_groups} should divide the {channels} channels")
        scale = self.param("scale", ones, (channels,), self.param_dtype)
        bias = self.param("bias", zeros, (channels,), self.param_dtype)

        wide = x.astype(at_least_float32(self.dtype))
        size = channels // self.num_groups
        if mask is None:
            count = jnp.full((batch, 1), height * width * size, wide.dtype)
        else:
            count = (jnp.sum(mask, (1, 2), dtype=jnp.int32)[:, None] * size).astype(wide.dtype)

        def group_mean(values: Array) -> Array:  # [B, h, w, C] -> [B, C], equal within a group
            if mask is not None:
                values = jnp.where(mask[..., None], values, 0)
            sums = jnp.sum(values, (1, 2)).reshape(batch, self.num_groups, size).sum(-1) / count
            return jnp.repeat(sums, size, axis=1)

        mean = group_mean(wide)
        var = group_mean(jnp.square(wide - mean[:, None, None]))
        factor = scale.astype(wide.dtype)[None] * lax.rsqrt(var + self.eps)
        shift = bias.astype(wide.dtype)[None] - mean * factor
        return factor[:, None, None], shift[:, None, None]
