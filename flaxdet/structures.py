"""Padded arrays with validity masks, as pytrees: the inputs and outputs of the models.

Letters used throughout the library:

- ``B`` images in a batch, ``H, W`` rows and columns of the bucket (the static array), ``C`` channels
- ``L`` feature levels, ``h, w`` rows and columns of one level, ``A`` anchors per location
- ``N`` boxes or anchors of one image, ``R`` proposal slots, ``K`` detection slots, ``G`` ground-truth slots
- ``k`` classes (label 0 is torchvision's background, or "N/A")

Boxes are xyxy in absolute pixels. Which image they refer to, the resized one or the original, is said
where they appear; sizes and extents are (rows, columns).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import InitVar, dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.export
import numpy as np
from flax import struct
from jaxtyping import Bool, Float, Int

Array = jax.Array
Class = TypeVar("Class", bound=type)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of red, green and blue in [0, 1]


def exportable(cls: Class, *, dropped: Sequence[str] = ()) -> Class:
    """Registers a pytree class with jax.export, so that functions which take or return it can be serialised.

    The file holds the names of the fields. A field that the file lacks is ``None`` when it is read, so that fields may
    be added to the class later, anywhere. Fields may not change places: jax tells their arrays apart by the order.

    Args:
        cls: a ``flax.struct.dataclass`` of arrays and pytrees, without static fields.
        dropped: fields that the class once had. Functions in older files return the class of today, without them.
            Functions that take the class with such a field can be read, but jax can't call them: they expect its array.

    Returns:
        The class.

    Raises:
        ValueError: when a file is read that has a field which the class lacks, unless it is ``None`` there or dropped,
            or that has the fields in another order.
    """
    names = [field.name for field in fields(cls)]
    title = f"flaxdet.{cls.__name__}"

    def build(aux_data: Any, children: Sequence[Any]) -> Any:  # jax's names; aux_data: the fields of the file
        values = dict(zip(aux_data, children, strict=True))
        present = [name for name in aux_data if values[name] is not None and name not in dropped]
        if present != [name for name in names if name in present]:
            expected = f"expected the fields {', '.join(names)}, in this order"
            raise ValueError(f"{title}: {expected}, got {', '.join(present)}")
        if any(values.get(name) is not None for name in dropped):
            return _Older(cls, values)
        return cls(**{name: values.get(name) for name in names})

    jax.export.register_pytree_node_serialization(
        cls,
        serialized_name=title,
        serialize_auxdata=lambda _: json.dumps(names).encode(),
        deserialize_auxdata=json.loads,
        from_children=build,
    )
    return cls


@jax.tree_util.register_pytree_node_class
class _Older:
    """In the structure of a function from an older file: a class with every field that the file has.

    jax counts the arrays of all fields there, and then gets the class of today.
    """

    def __init__(self, cls: type, values: dict[str, Any]):
        self.cls, self.values = cls, values

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[type, tuple[str, ...]]]:
        """For jax."""
        return tuple(self.values.values()), (self.cls, tuple(self.values))

    @staticmethod
    def tree_unflatten(kind: tuple[type, tuple[str, ...]], children: Iterable[Any]) -> Any:
        """For jax: an instance of ``cls``, not of this class."""
        cls, written = kind
        values = dict(zip(written, children, strict=True))
        return cls(**{field.name: values.get(field.name) for field in fields(cls)})


@exportable
@struct.dataclass
class ImageBatch:
    """Normalised images, each on its own canvas inside one bucket. ``flaxdet.transform`` builds it.

    Attributes:
        pixels: [B, H, W, 3], normalised; zero outside each image.
        size: [B, 2] int32, (rows, columns) of each resized image.
        original_size: [B, 2] int32, (rows, columns) before the resize.
        canvas: [B, 2] int32, the padded size that each image counts as having: everything beyond it is
            masked. ``None`` says, statically, that every canvas is the whole array, and traces no masks.
    """

    pixels: Float[Array, "B H W 3"]
    size: Int[Array, "B 2"]
    original_size: Int[Array, "B 2"]
    canvas: Int[Array, "B 2"] | None
    # no longer used: accepted, so that code that builds batches with it still runs
    roi_reference_height: InitVar[Any] = None

    def __post_init__(self, roi_reference_height: Any) -> None:
        del roi_reference_height


@exportable
@struct.dataclass
class Targets:
    """Ground truth in the pixels of the resized image.

    Attributes:
        boxes: [B, G, 4] xyxy.
        labels: [B, G] int32, one of the model's ``target_labels``: 1..k-1 (FCOS: 0..k-1). Padding may hold any.
        valid: [B, G], False for padding.
    """

    boxes: Float[Array, "B G 4"]
    labels: Int[Array, "B G"]
    valid: Bool[Array, "B G"]


@exportable
@struct.dataclass
class Proposals:
    """Region proposals in the pixels of the resized image, best first; padding is zero and not valid.

    Attributes:
        boxes: [B, R, 4] xyxy.
        scores: [B, R] objectness in [0, 1].
        valid: [B, R].
    """

    boxes: Float[Array, "B R 4"]
    scores: Float[Array, "B R"]
    valid: Bool[Array, "B R"]


@functools.partial(exportable, dropped=("overflow",))
@struct.dataclass
class Detections:
    """Detections in the pixels of the resized image, best first.

    Attributes:
        boxes: [B, K, 4] xyxy; padding is 0.
        scores: [B, K] in [0, 1]; padding is 0.
        labels: [B, K] int32; padding is -1.
        valid: [B, K].
    """

    boxes: Float[Array, "B K 4"]
    scores: Float[Array, "B K"]
    labels: Int[Array, "B K"]
    valid: Bool[Array, "B K"]


@dataclass(frozen=True)
class TransformConfig:
    """How images are resized, normalised and padded: torchvision's GeneralizedRCNNTransform.

    Attributes:
        min_size: pixels of the shorter side after the resize. Several: one is chosen at random in
            training, the last is used in evaluation.
        max_size: the longer side never exceeds it; the shorter is then below ``min_size``.
        image_mean: of each channel, for values in [0, 1].
        image_std: of each channel, for values in [0, 1].
        size_divisible: canvases are padded to a multiple of it.
        fixed_size: (width, height) of every resized image, whatever its shape; overrides the two sizes.

    Raises:
        ValueError: for values that no image could be resized with.
        TypeError: for values that are no numbers.
    """

    min_size: tuple[int, ...] = (800,)
    max_size: int = 1333
    image_mean: tuple[float, ...] = IMAGENET_MEAN
    image_std: tuple[float, ...] = IMAGENET_STD
    size_divisible: int = 32
    fixed_size: tuple[int, ...] | None = None

    if TYPE_CHECKING:  # the constructor takes more than the fields hold: lists, one number, None for the default

        def __init__(
            self,
            min_size: int | Sequence[int] = 800,
            max_size: int = 1333,
            image_mean: Sequence[float] | None = None,
            image_std: Sequence[float] | None = None,
            size_divisible: int = 32,
            fixed_size: Sequence[int] | None = None,
        ) -> None: ...

    def __post_init__(self):
        min_size = _numbers("min_size", self.min_size)
        mean = _numbers("image_mean", IMAGENET_MEAN if self.image_mean is None else self.image_mean)
        std = _numbers("image_std", IMAGENET_STD if self.image_std is None else self.image_std)
        fixed = None if self.fixed_size is None else _numbers("fixed_size", self.fixed_size)
        for name in ("max_size", "size_divisible"):
            value = getattr(self, name)
            if _numbers(name, value) != (value,):
                raise TypeError(f"{name} should be one number, got {value!r}")
        if not min_size or not all(size > 0 for size in min_size):
            raise ValueError(f"min_size should be one or more positive numbers, got {self.min_size!r}")
        if self.max_size <= 0:
            raise ValueError(f"max_size should be positive, got {self.max_size!r}")
        if len(mean) != 3 or len(std) != 3:
            raise ValueError(
                "image_mean and image_std should have 3 values, for red, green and blue, got "
                f"{self.image_mean!r} and {self.image_std!r}"
            )
        if not all(value > 0 for value in std):
            raise ValueError(f"image_std should be positive, got {self.image_std!r}")
        if self.size_divisible < 1 or int(self.size_divisible) != self.size_divisible:
            raise ValueError(f"size_divisible should be a positive integer, got {self.size_divisible!r}")
        if fixed is not None and (len(fixed) != 2 or not all(side > 0 for side in fixed)):
            raise ValueError(f"fixed_size should be (width, height), both positive, got {self.fixed_size!r}")
        object.__setattr__(self, "min_size", min_size)
        object.__setattr__(self, "image_mean", tuple(float(value) for value in mean))
        object.__setattr__(self, "image_std", tuple(float(value) for value in std))
        object.__setattr__(self, "fixed_size", fixed)


def _numbers(name: str, values: Any) -> tuple[Any, ...]:
    """One number or several as a tuple."""
    several = isinstance(values, Iterable) and not isinstance(values, str)
    numbers = tuple(values) if several else (values,)
    if not all(isinstance(value, (int, float, np.number)) for value in numbers):
        raise TypeError(f"{name} should be a number, or numbers, got {values!r}")
    return tuple(value.item() if isinstance(value, np.number) else value for value in numbers)
