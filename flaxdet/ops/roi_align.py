"""RoIAlign on one feature map or a pyramid: the answers of torchvision's C++ op, NHWC, inside ``jit``.

Letters: ``N`` boxes, ``H, W`` rows and columns of a feature map, ``C`` channels, ``L`` levels, ``h, w`` rows
and columns of the output, ``S`` samples per bin along one side.

How it works. The pixels of all levels lie end to end in one array, so that a level is only an offset and a row
length. ``flaxdet.ops.bilinear`` computes the samples and their gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int
from numpy.typing import ArrayLike

from flaxdet.ops.bilinear import compute_dtype, mean_of_samples, samples_along


def roi_align(
    features: Float[ArrayLike, "H W C"],
    boxes: Float[ArrayLike, "N 4"],
    output_size: int | Sequence[int],
    *,
    spatial_scale: float | Float[Array, ""] = 1.0,
    sampling_ratio: int | None = None,
    aligned: bool = False,
    extent: Sequence[int] | Int[Array, "2"] | None = None,
) -> Float[Array, "N h w C"]:
    """Averages bilinear samples of ``features`` over a grid of bins inside each box.

    Reproduces ``torchvision.ops.roi_align`` for one image. A sample more than one pixel outside the feature
    map counts as 0; a sample at most one pixel outside takes the border's value. A box with a NaN coordinate gives
    0 (torchvision reads arbitrary memory). Works under ``jit`` and ``vmap``; the gradient flows to ``features`` only.

    Args:
        features: [H, W, C] of one image.
        boxes: [N, 4] xyxy in absolute pixels of the image. Coordinates are computed in the dtype of ``boxes``,
            in float32 at least.
        output_size: (h, w), or one int for both.
        spatial_scale: pixels of ``features`` per pixel of the image. May be traced.
        sampling_ratio: S, samples per bin along each side, 1 or more. Must be given.
        aligned: if True, shifts boxes by half a pixel, so that a box of exactly one feature pixel samples the
            centre of that pixel; boxes may then be smaller than one feature pixel (``aligned`` of torchvision
            and Detectron2).
        extent: (rows, columns) of ``features`` to use, default (H, W): the result is the same as if the map were
            cropped to them. May be traced.

    Returns:
        [N, h, w, C] in the dtype of ``features``; sums are computed in float32 at least.

    Raises:
        ValueError: if a shape does not fit, or ``sampling_ratio`` is not positive (torchvision then
            computes the number of samples from the size of each box, which has no static shape).
        TypeError: if ``sampling_ratio`` is not given, or ``features`` or ``boxes`` are not floating point.
    """
    maps, boxes = _checked("roi_align", (features,), boxes)
    size = _output_size("roi_align", output_size, sampling_ratio)
    scale = jnp.asarray(spatial_scale, boxes.dtype)[None]
    extents = None if extent is None else jnp.asarray(extent)[None]
    if extents is not None and extents.shape != (1, 2):
        raise ValueError(f"roi_align: extent must be (rows, columns), got shape {list(extents.shape[1:])}")
    level = jnp.zeros(boxes.shape[0], jnp.int32)
    return _align(maps, boxes, level, scale, extents, size=size, samples=sampling_ratio, aligned=aligned)


def multiscale_roi_align(
    features: Sequence[Float[ArrayLike, "H W C"]],
    boxes: Float[ArrayLike, "N 4"],
    output_size: int | Sequence[int],
    *,
    scales: Sequence[float] | Float[Array, " L"],
    sampling_ratio: int | None = None,
    canonical_scale: int = 224,
    canonical_level: int = 4,
    extents: Sequence[Sequence[int]] | Int[Array, "L 2"] | None = None,
) -> Float[Array, "N h w C"]:
    """RoIAlign of each box on the pyramid level that suits the size of the box.

    Reproduces ``torchvision.ops.MultiScaleRoIAlign`` for one image, given the levels' scales (torchvision
    infers the scales from the first images it sees); ``assign_levels`` chooses the level of a box. With more
    than one level, a box whose area is negative or NaN belongs to no level and gives 0, as in torchvision.

    Args:
        features: L feature maps [H_l, W_l, C], finest first.
        boxes: [N, 4] xyxy in absolute pixels of the image.
        output_size: (h, w), or one int for both.
        scales: [L] pixels of each level per pixel of the image: 1/4, 1/8, ... May be traced, per image.
        sampling_ratio: S, samples per bin along each side, 1 or more. Must be given.
        canonical_scale: side in pixels of a square box that is pooled from ``canonical_level``.
        canonical_level: -log2 of the scale of that level.
        extents: [L, 2] (rows, columns) of each level to use, default all. May be traced.

    Returns:
        [N, h, w, C] in the dtype of ``features``.

    Raises:
        ValueError: if there is no level, a shape does not fit, or ``sampling_ratio`` is not positive.
        TypeError: if ``sampling_ratio`` is not given, ``features`` or ``boxes`` are not floating point, or the levels'
            dtypes differ.
    """
    maps, boxes = _checked("multiscale_roi_align", tuple(features), boxes)
    size = _output_size("multiscale_roi_align", output_size, sampling_ratio)
    scale = jnp.asarray(scales, boxes.dtype)
    if scale.shape != (len(maps),):
        raise ValueError(
            f"multiscale_roi_align: scales must have one number for each of the {len(maps)} levels, "
            f"got shape {list(scale.shape)}"
        )
    extent = None if extents is None else jnp.asarray(extents)
    if extent is not None and extent.shape != (len(maps), 2):
        raise ValueError(f"multiscale_roi_align: extents must have shape [{len(maps)}, 2], got {list(extent.shape)}")
    if len(maps) == 1:
        level = jnp.zeros(boxes.shape[0], jnp.int32)
        return _align(maps, boxes, level, scale, extent, size=size, samples=sampling_ratio, aligned=False)
    canonical = canonical_scale, canonical_level
    return _align_on_levels(maps, boxes, scale, extent, size=size, samples=sampling_ratio, canonical=canonical)


def assign_levels(
    boxes: Float[Array, "N 4"],
    scales: Sequence[float] | Float[Array, " L"],
    *,
    canonical_scale: int = 224,
    canonical_level: int = 4,
) -> Int[Array, " N"]:
    """The pyramid level that each box is pooled from.

    Reproduces torchvision's ``LevelMapper``: ``floor(canonical_level + log2(sqrt(area) / canonical_scale) +
    1e-6)``, clipped to the levels of the pyramid, whose scales must be a factor of 2 apart. Logarithms in float32
    differ between backends, so in float32 ``sqrt(area)`` is compared with the exact values at which torchvision's
    rounded formula steps. In float64 the formula itself is computed.

    Args:
        boxes: [N, 4] xyxy in absolute pixels of the image.
        scales: [L] pixels of each level per pixel of the image, finest first. May be traced.
        canonical_scale: side in pixels of a square box that is pooled from ``canonical_level``.
        canonical_level: -log2 of the scale of that level.

    Returns:
        [N] int32 in [0, L - 1]; 0 for a box whose area is negative or NaN.
    """
    boxes = lax.stop_gradient(jnp.asarray(boxes))
    boxes = boxes.astype(compute_dtype(boxes.dtype))
    scale = lax.stop_gradient(jnp.asarray(scales, boxes.dtype))
    # Truncated as in torchvision, except that the logarithm of a power of two, which may be an ulp off, is rounded.
    exponents = -jnp.log2(scale[jnp.array([0, -1])])
    nearest = jnp.round(exponents)
    exponents = jnp.where(jnp.abs(exponents - nearest) < 1e-4, nearest, jnp.trunc(exponents))
    lowest, highest = exponents.astype(jnp.int32)
    side = jnp.sqrt(_area(boxes))
    if boxes.dtype == jnp.float64:
        level = jnp.floor(canonical_level + jnp.log2(side / canonical_scale) + 1e-6)
        level = jnp.clip(level, lowest.astype(side.dtype), highest.astype(side.dtype))
        level = jnp.where(jnp.isnan(side), 0, level).astype(jnp.int32)
    else:
        first, thresholds = _level_thresholds(canonical_scale, canonical_level)
        level = first - 1 + jnp.sum(side[:, None] >= thresholds[None], axis=1, dtype=jnp.int32)
        level = jnp.clip(level, lowest, highest)
    return jnp.clip(level - lowest, 0, scale.shape[0] - 1)


@functools.cache
def _level_thresholds(canonical_scale: float, canonical_level: int, reach: int = 16):
    """The float32 sides at which torchvision's float32 formula steps to the next level.

    Returns:
        The number of the lowest level, ``canonical_level - reach``, and the [2 * reach + 1] ascending sides at which
        the levels from ``canonical_level - reach`` to ``canonical_level + reach`` begin.
    """
    numbers = np.arange(canonical_level - reach, canonical_level + reach + 1)

    def level(side):  # every step is rounded to float32, as in torch; the logarithm is correctly rounded
        ratio = (side / np.float32(canonical_scale)).astype(np.float64)
        return np.floor(np.float32(canonical_level) + np.log2(ratio).astype(np.float32) + np.float32(1e-6))

    # Bisection on the bits: positive floats and their bits as integers have the same order.
    middle = (canonical_scale * 2.0 ** (numbers - canonical_level)).astype(np.float32)
    low, high = ((middle * np.float32(factor)).view(np.int32) for factor in (0.75, 1.25))
    while np.any(high - low > 1):
        half = low + (high - low) // 2
        reached = level(half.view(np.float32)) >= numbers
        low, high = np.where(reached, low, half), np.where(reached, half, high)
    return int(numbers[0]), high.view(np.float32)


def _area(boxes):
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _checked(name, features, boxes):
    if not features:
        raise ValueError(f"{name}: features must have at least one level, got none")
    features, boxes = tuple(jnp.asarray(level) for level in features), jnp.asarray(boxes)
    for level in features:
        if level.ndim != 3 or 0 in level.shape[:2] or level.shape[2] != features[0].shape[2]:
            shapes = [list(level.shape) for level in features]
            raise ValueError(f"{name}: features must have shape [H, W, C], none empty, the same C; got {shapes}")
        if not jnp.issubdtype(level.dtype, jnp.floating) or level.dtype != features[0].dtype:
            dtypes = ", ".join(str(level.dtype) for level in features)
            raise TypeError(f"{name}: features must be floating, all of one dtype; got {dtypes}")
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{name}: boxes must have shape [N, 4], got {list(boxes.shape)}")
    if not jnp.issubdtype(boxes.dtype, jnp.floating):
        raise TypeError(f"{name}: boxes must be floating, got {boxes.dtype}")
    boxes = lax.stop_gradient(boxes)
    return features, boxes.astype(compute_dtype(boxes.dtype))


def _output_size(name, output_size, sampling_ratio) -> tuple[int, int]:
    if sampling_ratio is None:
        raise TypeError(
            f"{name}: sampling_ratio must be given: torchvision's default samples by the size of each box, which has "
            "no static shape, so a default here would give other numbers for the same call (its detectors take 2)"
        )
    if sampling_ratio <= 0:
        raise ValueError(
            f"{name}: sampling_ratio must be 1 or more, got {sampling_ratio} (torchvision then samples by "
            "the size of each box, which has no static shape)"
        )
    if np.shape(output_size) not in ((), (2,)):
        raise ValueError(f"{name}: output_size must be one number or two, got {output_size}")
    height, width = (int(side) for side in np.broadcast_to(output_size, 2))
    if height < 1 or width < 1:
        raise ValueError(f"{name}: output_size must be positive, got {output_size}")
    return height, width


@functools.partial(jax.jit, static_argnames=("size", "samples", "canonical"))
def _align_on_levels(features, boxes, scales, extents, *, size, samples, canonical):
    levels = assign_levels(boxes, scales, canonical_scale=canonical[0], canonical_level=canonical[1])
    # Samples at NaN have no weight, so a box without a level gives 0.
    boxes = jnp.where(_area(boxes)[:, None] >= 0, boxes, jnp.nan)
    return _align(features, boxes, levels, scales, extents, size=size, samples=samples, aligned=False)


@functools.partial(jax.jit, static_argnames=("size", "samples", "aligned"))
def _align(features, boxes, levels, scales, extents, *, size, samples, aligned):
    shapes = np.array([level.shape[:2] for level in features], np.int32)
    offsets = jnp.asarray(np.cumsum([0, *shapes[:-1].prod(1)]), jnp.int32)
    extents = jnp.asarray(shapes) if extents is None else extents.astype(jnp.int32)
    channels, dtype = features[0].shape[2], compute_dtype(features[0].dtype)
    pixels = jnp.concatenate([level.reshape(-1, channels) for level in features])

    edges = boxes * lax.stop_gradient(scales)[levels][:, None]
    x1, y1, x2, y2 = (edges - 0.5 if aligned else edges).T
    extents = extents[levels]
    y = samples_along(y1, y2, size[0], samples, extents[:, 0], aligned=aligned, dtype=dtype)
    x = samples_along(x1, x2, size[1], samples, extents[:, 1], aligned=aligned, dtype=dtype)
    row_length = jnp.asarray(shapes[:, 1])[levels][:, None, None]
    first = offsets[levels][:, None, None]
    y = y._replace(low=first + y.low * row_length, high=first + y.high * row_length)
    return mean_of_samples(len(pixels), pixels, y, x)
