"""BatchNorm (live and frozen) and GroupNorm with torch's arithmetic, and with statistics masked to the canvas."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.nn.initializers import ones, zeros
from jaxtyping import Bool, Float

from flaxdet.nn.layers import Array, Dtype, TypedModule, at_least_float32
from flaxdet.xla.routes import by_platform

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
            count = jnp.asarray(x.size // x.shape[-1], wide) if mask is None else jnp.sum(mask, dtype=wide)
            mean, var = mean_and_variance(None, x, mask, count)
            if not self.is_initializing() and self.is_mutable_collection("batch_stats"):
                unbiased = var * (count / jnp.maximum(count - 1, 1))
                for running, new in ((running_mean, mean), (running_var, unbiased)):
                    updated = (1 - self.momentum) * running.value.astype(wide) + self.momentum * new
                    # like torch, no update without cells, as without a sampled RoI
                    updated = jnp.where(count > 0, updated.astype(running.value.dtype), running.value)
                    running.value = lax.stop_gradient(updated)
        factor = scale.astype(wide) * lax.rsqrt(var + self.eps)
        return factor, bias.astype(wide) - mean * factor


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

        wide = at_least_float32(self.dtype)
        size = channels // self.num_groups
        if mask is None:
            count = jnp.full((batch, 1), height * width * size, wide)
        else:
            count = (jnp.sum(mask, (1, 2), dtype=jnp.int32)[:, None] * size).astype(wide)
        mean, var = mean_and_variance(self.num_groups, x, mask, count)
        factor = scale.astype(wide)[None] * lax.rsqrt(var + self.eps)
        shift = bias.astype(wide)[None] - mean * factor
        return factor[:, None, None], shift[:, None, None]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def mean_and_variance(groups: int | None, x: Array, mask: Array | None, count: Array) -> tuple[Array, Array]:
    """Mean and biased variance of the cells that count; zeros where no cell counts.

    CPUs and TPUs read the map twice, for the mean and then for the mean square of x - mean. GPUs read the map once. On
    a TPU, one pass would move 2% more memory in a training step of FCOS, by the count of the TPU's compiler.

    The derivative of the variance leaves out that the mean changes: the sum of x - mean is 0. jax's own derivative
    would read the map once more to compute that 0.

    Args:
        groups: None for a mean of each channel over all other axes; a number of groups of neighbouring channels for a
            mean of each image and group.
        x: [..., C]; with groups [B, h, w, C].
        mask: [...], True for the cells that count; None for all.
        count: number of the values of each mean, [] or [B, 1], in the dtype of the results.

    Returns:
        [C] each; with groups [B, C] each, equal within a group.
    """
    two, one = (functools.partial(route, groups) for route in (_in_two_passes, _in_one_pass))
    return by_platform(x, mask, count, gpu=one if x.ndim == 4 else two, default=two)


def _in_two_passes(groups: int | None, x: Array, mask: Array | None, count: Array) -> tuple[Array, Array]:
    x = x.astype(count.dtype)
    mean = _mean(groups, x, mask, count)
    return mean, _mean(groups, jnp.square(x - _over_cells(mean, x)), mask, count)


def _in_one_pass(groups: int | None, x: Array, mask: Array | None, count: Array) -> tuple[Array, Array]:
    """Sums x - first and its square for each image and channel, in one kernel, and combines these sums.

    The variance is a difference of two sums. It would lose digits if the mean were many standard deviations from 0.
    ``first`` is the first cell of each image, which is seldom many standard deviations from the mean. In a canvas, the
    first cell counts if any cell counts.
    """
    first = x[:, :1, :1].astype(count.dtype)
    cells = jnp.full((x.shape[0], 1), x.shape[1] * x.shape[2], count.dtype)
    if mask is not None:  # beyond the canvas the map is undefined
        first = jnp.where(mask[:, :1, :1, None], first, 0)
        cells = jnp.sum(mask, (1, 2), dtype=jnp.int32)[:, None].astype(count.dtype)
    shifted = x.astype(count.dtype) - first
    if mask is not None:
        shifted = jnp.where(mask[..., None], shifted, 0)
    total, squares = jnp.sum(shifted, (1, 2)), jnp.sum(jnp.square(shifted), (1, 2))  # [B, C]
    offset = total / jnp.maximum(cells, 1)
    means = first[:, 0, 0] + offset
    deviations = jnp.maximum(squares - offset * total, 0)  # sum of (x - mean)^2 for each image and channel

    def over_all(values: Array) -> Array:  # the sum over images, or over the channels of a group, divided by the count
        if groups is None:
            return jnp.sum(values, 0, keepdims=True) / jnp.maximum(count, 1)
        size = values.shape[1] // groups
        return jnp.repeat(values.reshape(-1, groups, size).sum(-1) / jnp.maximum(count, 1), size, axis=1)

    mean = over_all(cells * means)
    var = over_all(deviations + cells * jnp.square(means - mean))
    return (mean, var) if groups else (mean[0], var[0])


@mean_and_variance.defjvp
def _mean_and_variance_jvp(groups: int | None, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    x, mask, count = primals
    mean, var = mean_and_variance(groups, x, mask, count)
    tangent = tangents[0].astype(count.dtype)
    of_mean = _mean(groups, tangent, mask, count)
    of_var = _mean(groups, 2 * (x.astype(count.dtype) - _over_cells(mean, x)) * tangent, mask, count)
    return (mean, var), (of_mean, of_var)


def _mean(groups: int | None, values: Array, mask: Array | None, count: Array) -> Array:
    if mask is not None:
        values = jnp.where(mask[..., None], values, 0)
    count = jnp.maximum(count, 1)
    if groups is None:
        return jnp.sum(values, tuple(range(values.ndim - 1))) / count
    size = values.shape[-1] // groups
    sums = jnp.sum(values, (1, 2)).reshape(-1, groups, size).sum(-1) / count
    return jnp.repeat(sums, size, axis=1)


def _over_cells(vector: Array, x: Array) -> Array:
    """[C] or [B, C], with the axes of ``x``."""
    return vector.reshape(*vector.shape[:-1], *(1,) * (x.ndim - vector.ndim), vector.shape[-1])
