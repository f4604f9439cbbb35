"""The kernel of RoIAlign: means of bilinear samples over the bins of boxes, and their gradient.

Letters: ``N`` boxes, ``C`` channels, ``h, w`` rows and columns of bins, ``S`` samples per bin along one side, ``P``
pixels of all levels together.

Each sample is the weighted sum of its four neighbouring pixels. In the forward pass, XLA fuses the gathers, the
weights and the sum into one loop over the output, without temporary buffers as large as the output.

In the backward pass, autodiff would turn each of the 4 * S * S gathers into a separate scatter, whose updates are as
large as the output and whose result is as large as the gradient. Here a loop over chunks of boxes adds each chunk's
contribution to a single gradient, in place, by one scatter. For 1000 boxes, 7x7 bins of 2x2 samples and 256 channels
on the four levels of 800x1088 (a gradient of 74 MB), in float32 on two CPU cores:

    torchvision's C++       735 ms
    autodiff                509 ms, 1421 MB of temporary buffers
    chunks of 32 boxes       98 ms,   74 MB of temporary buffers

Chunks of 1, 8, 64, 128, 512 boxes take 0.9, 1, 1.5, 2.1, 3 times as long as chunks of 32, and 74, 74, 74, 175, 476 MB.

On a GPU the index arithmetic of the forward pass takes longer than the memory traffic. So two bfloat16 channels are
gathered as one number of 32 bits: the same sums, with half of the index arithmetic.

A TPU reads and writes tiles of up to 8 rows of 128 numbers, and writes the result of every gather to memory. A gather
of single pixels from [P, C] reads a whole tile for each row of it. So there a pixel and the next one on its row (most
samples need both) are a tile of their own, [P, 2 * C / 128, 128]; and the boxes are on the axis before that, not the
w = 7 columns of bins, which a TPU would pad to 8. By its own compiler's count, for 1000 boxes in bfloat16 on the levels
of 800x1088, eight images at once: 1.9 GB of traffic an image, 4.7 with gathers of single pixels, 8.4 with the columns
of bins last too.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from flaxdet.xla.routes import by_platform

UNROLLED_SAMPLES = 4  # samples per bin up to which they are unrolled; above, a loop keeps the program small
# Boxes in one scatter of the gradient. For a CPU it is the largest number that does not slow it down. A GPU adds all
# updates of a scatter at once, and makes each where it is added.
CHUNK, GPU_CHUNK = 32, 256


def compute_dtype(dtype: Any) -> Any:
    """The dtype of coordinates, weights and sums: float64 for float64, else float32."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


class Samples(NamedTuple):
    """Each box's samples along one axis: the two neighbouring pixels of every sample, and their weights.

    Attributes:
        low: [N, bins, S] index of the pixel before the sample.
        high: [N, bins, S] index of the pixel after the sample.
        low_weight: [N, bins, S] weight of the pixel before the sample, 0 for a sample outside the map.
        high_weight: [N, bins, S] weight of the pixel after the sample, 0 there too.
    """

    low: Int[Array, "N bins S"]
    high: Int[Array, "N bins S"]
    low_weight: Float[Array, "N bins S"]
    high_weight: Float[Array, "N bins S"]


def samples_along(
    start: Float[Array, " N"],
    end: Float[Array, " N"],
    bins: int,
    samples: int,
    extent: Int[Array, " N"],
    *,
    aligned: bool,
    dtype: Any,
) -> Samples:
    """Samples of boxes along one axis, with the arithmetic of torchvision's C++ RoIAlign.

    Args:
        start: the lower coordinate of each box, in pixels of the box's level.
        end: the upper coordinate of each box, in the same pixels.
        bins: number of bins.
        samples: S, samples per bin.
        extent: length of each box's level in pixels.
        aligned: if False, a box is at least one pixel long.
        dtype: of the weights.

    Returns:
        The samples. A sample more than a pixel outside [0, extent - 1], or at NaN, has index 0 and weights 0.
    """
    length = end - start
    if not aligned:
        length = jnp.maximum(length, 1)
    # XLA turns a division by a constant into a product with the reciprocal, an ulp off torchvision's quotient. The
    # `where` hides from XLA that the divisor is a constant.
    bin_length = length / jnp.where(jnp.isnan(length), 1, jnp.asarray(bins, length.dtype))
    bin_index = jnp.arange(bins, dtype=length.dtype)[None, :, None]
    offset = jnp.arange(samples, dtype=length.dtype)[None, None, :] + 0.5
    bin_length = bin_length[:, None, None]
    position = start[:, None, None] + bin_index * bin_length + offset * bin_length / samples
    extent = extent[:, None, None]
    inside = (position >= -1) & (position <= extent.astype(position.dtype))  # False for NaN
    last = jnp.maximum(extent - 1, 0)
    position = jnp.where(inside, jnp.clip(position, 0, last.astype(position.dtype)), 0)
    low = position.astype(jnp.int32)
    fraction = (position - low.astype(position.dtype)).astype(dtype)
    zero = jnp.zeros((), dtype)
    return Samples(
        low,
        jnp.minimum(low + 1, last),
        jnp.where(inside, 1 - fraction, zero),
        jnp.where(inside, fraction, zero),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def mean_of_samples(count: int, pixels: Float[Array, "P C"], y: Samples, x: Samples) -> Float[Array, "N h w C"]:
    """The mean of each bin's S * S bilinear samples.

    Works under ``jit``, ``vmap`` and reverse-mode ``grad``; the gradient flows to ``pixels`` only. A GPU sums the
    gradient in no fixed order, so the last bits vary from run to run unless XLA is told to be deterministic
    (``XLA_FLAGS=--xla_gpu_deterministic_ops=true``).

    Args:
        count: P, as a static number for the backward pass, which doesn't get ``pixels``.
        pixels: all levels' pixels end to end.
        y: samples along the rows; ``low`` and ``high`` point at the first pixel of a row.
        x: samples along the columns, from the first pixel of a row.

    Returns:
        [N, h, w, C] in the dtype of ``pixels``; sums are computed in the dtype of the weights.
    """
    del count
    gpu = _mean_in_pairs if pixels.dtype == jnp.bfloat16 and pixels.shape[1] % 2 == 0 else _mean
    return by_platform(pixels, y, x, gpu=gpu, tpu=_mean_of_tiles, default=_mean)


def _mean(pixels: Array, y: Samples, x: Samples) -> Array:
    def take(index: Array) -> tuple[Array, ...]:
        return (pixels.at[index].get(mode="promise_in_bounds"),)

    (mean,) = _weighted_means(lambda low, high: (take(low), take(high)), y, x)
    return mean.astype(pixels.dtype)


def _mean_of_tiles(pixels: Array, y: Samples, x: Samples) -> Array:
    """``_mean`` by gathers of two neighbours, with the axes [h, w, N, C / 128, 128] inside: see this file's head."""
    channels = pixels.shape[1]
    width = 128 if channels % 128 == 0 else channels
    tiles = jnp.concatenate([pixels, jnp.roll(pixels, -1, axis=0)], axis=1).reshape(len(pixels), -1, width)

    def take(low: Array, high: Array) -> tuple[tuple[Array], tuple[Array]]:
        first, second = jnp.split(tiles.at[low].get(mode="promise_in_bounds"), 2, axis=-2)
        # a sample at the border has one pixel twice, and the next one in memory is another row's
        return (first,), (jnp.where((high == low)[..., None, None], first, second),)

    y, x = (Samples(*(part.swapaxes(0, 1) for part in axis)) for axis in (y, x))
    (mean,) = _weighted_means(take, y, x, bins_first=True)
    mean = mean.astype(pixels.dtype)
    return mean.reshape(*mean.shape[:3], channels).transpose(2, 0, 1, 3)


def _mean_in_pairs(pixels: Array, y: Samples, x: Samples) -> Array:
    """``_mean`` of bfloat16 pixels; a bfloat16 number is the upper half of a float32 number."""
    pairs = lax.bitcast_convert_type(pixels.reshape(len(pixels), -1, 2), jnp.uint32)

    def take(index: Array) -> tuple[Array, ...]:
        pair = pairs.at[index].get(mode="promise_in_bounds")
        halves = pair << 16, pair & jnp.uint32(0xFFFF0000)
        return tuple(lax.bitcast_convert_type(half, jnp.float32) for half in halves)

    means = _weighted_means(lambda low, high: (take(low), take(high)), y, x)
    means = (mean.astype(jnp.bfloat16) for mean in means)
    first, second = (lax.bitcast_convert_type(mean, jnp.uint16).astype(jnp.uint32) for mean in means)
    mean = lax.bitcast_convert_type(first | second << 16, jnp.bfloat16)
    return mean.reshape(*mean.shape[:-2], -1)


def _weighted_means(
    take: Callable[[Array, Array], tuple[tuple[Array, ...], tuple[Array, ...]]],
    y: Samples,
    x: Samples,
    *,
    bins_first: bool = False,
) -> tuple[Array, ...]:
    """``mean_of_samples`` of each array of values that ``take`` returns.

    Args:
        take: returns values of the pixels with the indices of its first argument, [N, h, w], and of its second, the
            pixels after those on the same row. An array of values has the axes of the indices, and others behind.
        y: as in ``mean_of_samples``.
        x: the same.
        bins_first: whether the parts of ``y`` and ``x`` have the axes [bins, N, S], and the indices [h, w, N].
    """
    samples, dtype = y.low.shape[2], y.low_weight.dtype

    def outer(row: Array, column: Array) -> tuple[Array, Array]:
        return (row[:, None], column[None]) if bins_first else (row[:, :, None], column[:, None, :])

    def weighted(weight: Array, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(jnp.expand_dims(weight, range(3, x.ndim)) * x.astype(dtype) for x in arrays)

    def neighbours(row: Array, weight: Array, columns: Samples) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        low, high = (operator.add(*outer(row, column)) for column in (columns.low, columns.high))
        weights = (operator.mul(*outer(weight, column)) for column in (columns.low_weight, columns.high_weight))
        first, second = map(weighted, weights, take(low, high))
        return first, second

    def add(*terms: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(functools.reduce(jnp.add, arrays) for arrays in zip(*terms, strict=True))

    def sample(i: Any, j: Any) -> tuple[Array, ...]:
        rows, columns = (Samples(*(part[:, :, k] for part in axis)) for axis, k in ((y, i), (x, j)))
        return add(*neighbours(rows.low, rows.low_weight, columns), *neighbours(rows.high, rows.high_weight, columns))

    per_bin = samples * samples
    if per_bin <= UNROLLED_SAMPLES:
        total = add(*(sample(k // samples, k % samples) for k in range(per_bin)))
    else:
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(sample, 0, 0))
        total = lax.fori_loop(0, per_bin, lambda k, total: add(total, sample(k // samples, k % samples)), zero)
    return tuple(values / per_bin for values in total)


def _forward(count: int, pixels: Array, y: Samples, x: Samples) -> tuple[Array, tuple[Samples, Samples]]:
    return mean_of_samples(count, pixels, y, x), (y, x)


def _backward(count: int, residuals: tuple[Samples, Samples], cotangent: Array) -> tuple[Array, None, None]:
    route = functools.partial(_gradient, count)
    gpu, other = (functools.partial(route, chunk=chunk) for chunk in (GPU_CHUNK, CHUNK))
    return by_platform(*residuals, cotangent, gpu=gpu, default=other), None, None


def _gradient(count: int, *arrays: Any, chunk: int) -> Array:
    *residuals, cotangent = arrays
    boxes, channels = cotangent.shape[0], cotangent.shape[-1]
    chunks = -(-boxes // chunk)
    size = -(-boxes // max(chunks, 1))  # chunks as even as possible
    dtype, per_bin = residuals[0].low_weight.dtype, residuals[0].low.shape[2] ** 2

    def outer(y: Array, x: Array) -> tuple[Array, Array]:
        """``y`` and ``x`` on the axes [box, row, column, sample in y, sample in x, neighbour in y, neighbour in x]."""
        return y[:, :, None, :, None, :, None], x[:, None, :, None, :, None, :]

    def add_chunk(k: Any, total: Array) -> Array:
        first = jnp.asarray(k, jnp.int32) * size
        # The last chunk ends with the last box, so it may overlap the chunk before; boxes in the overlap get weight 0.
        start = jnp.minimum(first, boxes - size)
        new = start + jnp.arange(size, dtype=jnp.int32) >= first
        y, x, g = jax.tree.map(lambda part: lax.dynamic_slice_in_dim(part, start, size), (*residuals, cotangent))
        rows, columns = outer(jnp.stack([y.low, y.high], axis=-1), jnp.stack([x.low, x.high], axis=-1))
        weight = jnp.stack([y.low_weight, y.high_weight], axis=-1)
        weight = jnp.where(new[:, None, None, None], weight, 0)
        down, across = outer(weight, jnp.stack([x.low_weight, x.high_weight], axis=-1))
        g = (g.astype(dtype) / per_bin)[:, :, :, None, None, None, None]
        updates = ((down * across)[..., None] * g).reshape(-1, channels)
        return total.at[(rows + columns).ravel()].add(updates, mode="promise_in_bounds")

    total = lax.fori_loop(0, chunks, add_chunk, jnp.zeros((count, channels), dtype))
    return total.astype(cotangent.dtype)


mean_of_samples.defvjp(_forward, _backward)
