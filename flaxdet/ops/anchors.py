"""Anchors of one image, on feature levels that may be padded to a bucket."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from numpy.typing import ArrayLike

LevelNumbers = Sequence[Sequence[float]] | Sequence[float] | np.ndarray  # as AnchorGenerator's constructor takes them
LevelExtents = Sequence[ArrayLike] | Array | np.ndarray  # for each level [2], rows and columns


def _rows(name: str, values: Any) -> tuple[Any, ...]:
    """The numbers, or sequences of numbers, as tuples; raises TypeError for anything else."""

    def as_tuple(value: Any) -> Any:
        value = value.tolist() if isinstance(value, np.ndarray) else value
        return tuple(as_tuple(item) for item in value) if isinstance(value, (list, tuple)) else value

    rows = as_tuple(values)
    kinds = {type(row) is tuple for row in rows} if isinstance(rows, tuple) else {True, False}
    flat = [number for row in rows for number in (row if type(row) is tuple else (row,))] if len(kinds) < 2 else [None]
    if not all(isinstance(number, (int, float, np.number)) for number in flat):
        raise TypeError(f"AnchorGenerator: {name} should be numbers, or numbers for every level, got {values!r}")
    return rows


@dataclass(frozen=True)
class AnchorGenerator:
    """Boxes of fixed sizes and shapes around the locations of each feature level.

    Reproduces ``torchvision.models.detection.anchor_utils.AnchorGenerator``, with one difference: the
    image's canvas and each level's extent are arguments, so that an image padded to a larger bucket gets
    the anchors that it would have alone. Frozen and hashable; lists are accepted and kept as tuples.

    Attributes:
        sizes: for each level, the anchors' sizes (square roots of their areas) in pixels. A flat sequence
            means one size a level.
        aspect_ratios: for each level, height / width. A flat sequence means the same ratios on every level.

    Raises:
        ValueError: if there is not one sequence of aspect ratios for each level, or one is empty or has a
            number that is not above 0.
        TypeError: for anything but numbers, or a sequence of numbers for each level.
    """

    sizes: tuple[tuple[float, ...], ...] = ((128, 256, 512),)
    aspect_ratios: tuple[tuple[float, ...], ...] = ((0.5, 1.0, 2.0),)

    if TYPE_CHECKING:  # the constructor takes more than the fields hold: lists, and flat sequences

        def __init__(self, sizes: LevelNumbers = ..., aspect_ratios: LevelNumbers = ...) -> None: ...

    def __post_init__(self):
        sizes, ratios = _rows("sizes", self.sizes), _rows("aspect_ratios", self.aspect_ratios)
        if sizes and not isinstance(sizes[0], tuple):
            sizes = tuple((size,) for size in sizes)
        if ratios and not isinstance(ratios[0], tuple):
            ratios = (ratios,) * len(sizes)
        for name, levels in (("sizes", sizes), ("aspect_ratios", ratios)):
            if not levels or not all(level and min(level) > 0 for level in levels):
                raise ValueError(f"{name} must hold numbers above 0 for every level, found {levels!r}")
        if len(sizes) != len(ratios):
            raise ValueError(f"sizes and aspect_ratios must name the same levels, found {len(sizes)} and {len(ratios)}")
        object.__setattr__(self, "sizes", tuple(tuple(level) for level in sizes))
        object.__setattr__(self, "aspect_ratios", tuple(tuple(level) for level in ratios))

    def num_anchors_per_location(self) -> list[int]:
        """Number of anchors at each location of each level."""
        return [len(base) for base in self.base_anchors()]

    def base_anchors(self) -> list[np.ndarray]:
        """The anchors of each level, around the origin.

        Sizes vary fastest. Computed and rounded (half to even) in float32 whatever the model's dtype, as
        torchvision does.

        Returns:
            For each level [A, 4] float32 xyxy, whole pixels.
        """
        levels = []
        for sizes, ratios in zip(self.sizes, self.aspect_ratios, strict=True):
            h_ratios = np.sqrt(np.asarray(ratios, np.float32))
            w_ratios = np.float32(1) / h_ratios
            w, h = ((r[:, None] * np.asarray(sizes, np.float32)[None]).ravel() for r in (w_ratios, h_ratios))
            levels.append(np.round(np.stack((-w, -h, w, h), axis=1) / np.float32(2)))
        return levels

    def __call__(
        self,
        canvas: ArrayLike,
        extents: LevelExtents,
        shapes: Sequence[tuple[int, int]],
        dtype: Any = jnp.float32,
    ) -> tuple[Float[Array, "hwA 4"], ...]:
        """The anchors of one image, level by level.

        Args:
            canvas: [2] int32, (rows, columns) of the padded image; may be traced.
            extents: for each level [2] int32, the (rows, columns) of the feature map that the canvas fills; may
                be traced. Anchors lie ``canvas // extent`` pixels apart, computed for rows and columns separately
                (61 and 64 pixels, not 64 and 64, on FCOS's P6 at 800x1088).
            shapes: for each level the static (h, w) of the feature map, at least the extent.
            dtype: of the anchors; at least float32.

        Returns:
            For each level [h*w*A, 4] xyxy in pixels of the canvas, by row, then column, then anchor; not
            clipped. Anchors beyond the extent (see ``valid``) continue the same grid.

        Raises:
            ValueError: if ``extents`` or ``shapes`` have another number of levels than ``sizes``.
        """
        self.check_levels(extents, shapes)
        levels = []
        for base, extent, (h, w) in zip(self.base_anchors(), extents, shapes, strict=True):
            y = jnp.broadcast_to(jnp.arange(h, dtype=jnp.int32)[:, None], (h, w))
            x = jnp.broadcast_to(jnp.arange(w, dtype=jnp.int32)[None, :], (h, w))
            centres = _centres(y, x, canvas, extent, dtype)
            anchors = centres[:, :, None, :] + jnp.asarray(base, centres.dtype)[None, None]
            levels.append(anchors.reshape(-1, 4))
        return tuple(levels)

    def at(
        self,
        level: int,
        index: Int[Array, " k"],
        canvas: ArrayLike,
        extent: ArrayLike,
        shape: tuple[int, int],
        dtype: Any = jnp.float32,
    ) -> Float[Array, "k 4"]:
        """Some anchors of one level: ``generator(...)[level][index]`` without the other anchors in memory.

        Args:
            level: which level.
            index: the k anchors, numbered by row, then column, then anchor.
            canvas: as for ``__call__``.
            extent: [2] int32, the (rows, columns) of the level's map that the canvas fills.
            shape: the static (h, w) of the level's map.
            dtype: of the anchors; at least float32.

        Returns:
            [k, 4] xyxy in pixels of the canvas, not clipped.
        """
        base = self.base_anchors()[level]
        cell, anchor = jnp.divmod(index, len(base))
        centres = _centres(*jnp.divmod(cell, shape[1]), canvas, extent, dtype)
        return centres + select_anchor(jnp.asarray(base, centres.dtype)[None], anchor)

    def valid(self, extents: LevelExtents, shapes: Sequence[tuple[int, int]]) -> tuple[Bool[Array, " hwA"], ...]:
        """Which anchors belong to the image's own canvas.

        Args:
            extents: as for ``__call__``.
            shapes: as for ``__call__``.

        Returns:
            For each level [h*w*A] in the anchors' order, True where the location lies within the extent.

        Raises:
            ValueError: if ``extents`` or ``shapes`` have another number of levels than ``sizes``.
        """
        self.check_levels(extents, shapes)
        levels = []
        for count, extent, (h, w) in zip(self.num_anchors_per_location(), extents, shapes, strict=True):
            extent = jnp.asarray(extent, jnp.int32)
            rows = jnp.arange(h, dtype=jnp.int32) < extent[0]
            columns = jnp.arange(w, dtype=jnp.int32) < extent[1]
            inside = rows[:, None, None] & columns[None, :, None]
            levels.append(jnp.broadcast_to(inside, (h, w, count)).reshape(-1))
        return tuple(levels)

    def check_levels(self, extents: LevelExtents, shapes: Sequence[tuple[int, int]]) -> None:
        """Checks the numbers of levels.

        Args:
            extents: as for ``__call__``.
            shapes: as for ``__call__``.

        Raises:
            ValueError: if ``extents`` or ``shapes`` have another number of levels than ``sizes``.
        """
        if not len(self.sizes) == len(extents) == len(shapes):
            raise ValueError(
                f"the anchor generator has sizes for {len(self.sizes)} levels, "
                f"found {len(extents)} extents and {len(shapes)} shapes: one of each is needed a level"
            )


def _centres(row: Array, column: Array, canvas: ArrayLike, extent: ArrayLike, dtype: Any) -> Float[Array, "*cells 4"]:
    """(x, y, x, y) of a level's cells, in pixels of the canvas. The anchors of a cell lie around this point."""
    # an empty padding slot of a batch has extent 0; any finite anchor will do there
    stride = jnp.asarray(canvas, jnp.int32) // jnp.maximum(jnp.asarray(extent, jnp.int32), 1)
    y, x = row * stride[0], column * stride[1]
    return jnp.stack((x, y, x, y), axis=-1).astype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def select_anchor(values: Float[Array, "#k A C"], anchor: Int[Array, " k"]) -> Float[Array, "k C"]:
    """``values[i, anchor[i]]``, by a select for each of the A anchors: TPUs gather single rows slowly."""
    chosen = values[:, 0]
    for number in range(1, values.shape[1]):
        chosen = jnp.where((anchor == number)[:, None], values[:, number], chosen)
    return jnp.broadcast_to(chosen, (len(anchor), chosen.shape[1]))
