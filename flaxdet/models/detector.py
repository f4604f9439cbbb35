"""The base of the detectors: common fields, the call of a replaceable backbone, named stages."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.core import Scope
from jaxtyping import Float, Int

from flaxdet.models.backbones import named_maps, warn_of_other_maps, warn_of_other_options
from flaxdet.nn.fpn import BackboneWithFPN, Features
from flaxdet.nn.layers import Array, Dtype, Precision, TypedModule, at_least_float32
from flaxdet.nn.names import TorchName, inside, names_of
from flaxdet.structures import Detections, ImageBatch, TransformConfig


def freeze_lists(value: Any) -> Any:
    """Converts nested lists and numpy arrays to tuples: fields of a module must be hashable to be static under jit."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return tuple(freeze_lists(item) for item in value) if isinstance(value, (list, tuple)) else value


def call_part(part: Any, *args: Any, role: str, **options: Any) -> Any:
    """Calls a replaceable part with the options that the signature of the part takes.

    A custom part may ignore the train mode or the canvas. But if a canvas is smaller than the bucket, a part that takes
    no ``canvas`` or ``extents`` would read the padding, and the result would be silently wrong.

    Raises:
        ValueError: if the part takes no ``canvas`` or ``extents`` and one is needed.
    """
    parameters = inspect.signature(type(part).__call__).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    accepted = {name: value for name, value in options.items() if takes_all or name in parameters}
    for name in ("canvas", "extents"):
        if options.get(name) is not None and name not in accepted:
            raise ValueError(
                f"{role} {type(part).__name__} takes no `{name}` argument, so it can only run where the "
                "canvas is the whole bucket: build the batch with canvas=None"
            )
    return part(*args, **accepted)


# Names of torchvision's keywords of the transform, in the constructor, `clone` and the attributes of a detector.
GEOMETRY = tuple(field.name for field in dataclasses.fields(TransformConfig))


class Detector(TypedModule):
    """Base of the detectors: common fields, the call of a replaceable backbone, named stages.

    The constructor, ``clone`` and the attributes have torchvision's keywords min_size, max_size, image_mean, image_std,
    size_divisible and fixed_size, which are kept in the one field ``transform``.

    While ``init`` or ``init_with_output`` makes the variables, no boxes are selected: the detections are empty slots.

    Attributes:
        backbone: Linen module ``(pixels, *, canvas, train) -> {name: [B, h, w, C]}``, finest first, with an attribute
            ``out_channels``, C.
        num_classes: k, number of classes, including the background.
        transform: how images are resized, normalised and padded.
        trainable_backbone_layers: number of backbone layers that train, 0 to 5, counted from the last stage; the
            optimiser's mask reads it.
        dtype: dtype of the computation.
        param_dtype: dtype of the parameters; default float64 if ``dtype`` is float64, else float32.
        precision: ``jax.lax.Precision`` of every convolution and matrix product.
    """

    backbone: Any
    num_classes: int | None = None
    transform: TransformConfig = TransformConfig()
    trainable_backbone_layers: int = 5
    dtype: Dtype = jnp.float32
    param_dtype: Dtype | None = None
    precision: Precision = None

    if TYPE_CHECKING:  # keywords and attributes, as `__init_subclass__` and the properties below make them
        min_size: int | Sequence[int] = 800
        max_size: int = 1333
        image_mean: Sequence[float] | None = None
        image_std: Sequence[float] | None = None
        size_divisible: int = 32
        fixed_size: Sequence[int] | None = None

    # names of the arrays that are sown besides the maps of the backbone
    _own_stages: ClassVar[frozenset[str]] = frozenset()
    # the field that holds the part with an output for each class
    class_part: ClassVar[str] = ""
    # torch's name of the module in each field, in the order of torch's state_dict
    torch_parts: ClassVar[Mapping[str, str]] = {}
    # names of the training losses
    loss_names: ClassVar[tuple[str, ...]] = ()
    # the field that holds the threshold of the detections' scores
    score_field: ClassVar[str] = ""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.__init__ = _constructor(cls.__init__)

    def _default_parts(self) -> dict[str, Callable[[], Any]]:
        """{field: function that makes the default part of the field}; empty in a detector without default parts."""
        return {}

    def _fill_in_parts(self) -> None:
        for name, make in self._default_parts().items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, make())

    def clone(self, *, parent: Any = None, _deep_clone: Any = False, _reset_names: bool = False, **updates: Any) -> Any:
        """A copy with other options, as Flax's ``clone``: ``model.clone(score_thresh=0.5, dtype=jnp.bfloat16)``.

        A new ``dtype``, ``param_dtype`` or ``precision`` also replaces the field of that name in every part, and in the
        parts of the parts. A part that equals the constructor's default part is made again for the new options: a new
        ``num_classes`` makes a new head or predictor. Other parts, and parts that are given in the same call, stay.

        Args:
            parent: parent module of the copy; default none.
            _deep_clone: for Flax: copies the parts too.
            _reset_names: for Flax: clears the names of the parts.
            **updates: fields to replace. ``param_dtype=None`` means float64 if ``dtype`` is float64, else float32.
                Without a new ``param_dtype``, the copy has the old ``param_dtype``.

        Returns:
            A detector of the same class. The variables of the old detector need not fit the new detector.

        Raises:
            ValueError: if ``num_classes`` changes and the head (FCOS) or the box_predictor (Faster R-CNN) was given to
                the constructor, and for the same reasons as in the constructor.
            TypeError: for a field that the detector doesn't have.
        """
        if updates.keys() - {"name"}:
            made = {name for name, make in self._default_parts().items() if _unnamed(getattr(self, name)) == make()}
            part, classes = self.class_part, self.num_classes
            if updates.get("num_classes", classes) != classes and part not in made | updates.keys():
                raise ValueError(
                    f"clone(num_classes={updates['num_classes']}): the {part} {type(getattr(self, part)).__name__} was "
                    f"given to {type(self).__name__}, which doesn't know how to make another: give clone a {part} for "
                    f"the new classes, or {part}=None for the default one"
                )
            updates = {**dict.fromkeys(made - updates.keys()), **updates}
        return super().clone(parent=parent, _deep_clone=_deep_clone, _reset_names=_reset_names, **updates)

    def torch_names(self) -> Iterator[TorchName]:
        """Names of the modules in torchvision's detector, in the order of the state_dict, without custom parts."""
        for field, name in self.torch_parts.items():
            yield from inside(names_of(getattr(self, field)), field, name)

    @property
    def box_dtype(self) -> Dtype:
        """The dtype of boxes, scores and NMS: float64 in a float64 model, else float32."""
        return at_least_float32(self.dtype)

    @property
    def target_labels(self) -> range:
        """The labels that a ground-truth box may have: with k classes 0..k-1 for FCOS, 1..k-1 for Faster R-CNN."""
        raise NotImplementedError(f"{type(self).__name__} should define target_labels")

    def features(self, batch: ImageBatch, *, train: bool = False) -> Features:
        """Runs the backbone.

        Args:
            batch: the images.
            train: whether BatchNorm is in training mode.

        Returns:
            {name: [B, h, w, C]}, finest first; a single map has the name "0". Values beyond each canvas are undefined.

        Raises:
            TypeError: if the backbone returns neither a map nor a mapping of names to maps.
            ValueError: if a canvas is smaller than the bucket and the backbone takes no ``canvas``, or if the backbone
                returns maps with wrong names, in the wrong order or of wrong shapes.
        """
        backbone, pixels = self.backbone, batch.pixels.astype(self.dtype)
        stages: Features = {}
        if isinstance(backbone, BackboneWithFPN):
            stages, returned = backbone.stages_and_levels(pixels, canvas=batch.canvas, train=train)
        else:
            returned = call_part(backbone, pixels, role="backbone", canvas=batch.canvas, train=train)
        features = named_maps(self, returned, pixels)
        warn_of_other_maps(self, features)
        # if a stage and a level have the same name, the level gets it, since the heads read the level
        self.sow_all({f"body_{name}" if name in features else name: x for name, x in stages.items()})
        self.sow_all(features)
        return features

    def sow_all(self, arrays: dict[str, Any]) -> None:
        """Sows arrays in the collection ``intermediates``, which a caller can make mutable.

        Args:
            arrays: the arrays by name.
        """
        for name, value in arrays.items():
            self.sow("intermediates", name, value)


def _constructor(init: Callable[..., None]) -> Callable[..., None]:
    """The constructor with torchvision's keywords of the transform, which replace fields of ``transform``.

    It also warns of parts with other options than the detector's: here and not in ``__post_init__``, since the line
    that makes the detector calls this function, whatever the detector is a subclass of.
    """

    @functools.wraps(init)
    def constructor(self: Any, *args: Any, **options: Any) -> None:
        given = {name: options.pop(name) for name in GEOMETRY if name in options}
        if given:
            options["transform"] = dataclasses.replace(options.get("transform", TransformConfig()), **given)
        init(self, *args, **options)
        if not isinstance(self.parent, Scope):  # no warning from the copy that Flax makes at each call
            warn_of_other_options(self)

    return constructor


def _geometry(name: str) -> property:
    def value(self: Detector) -> Any:
        option = getattr(self.transform, name)
        return option[0] if name == "min_size" and len(option) == 1 else option

    value.__doc__ = f"``transform.{name}``, torchvision's keyword of the constructor."
    return property(value)


for _name in GEOMETRY:  # not in the class, where Flax would take them for methods of the bound module
    setattr(Detector, _name, _geometry(_name))


def _unnamed(part: Any) -> Any:
    """A copy of a part without the name that Flax gives the part when the model is bound."""
    return nn.Module.clone(part, name=None) if isinstance(part, nn.Module) else part


def example_batch(size: int = 64) -> ImageBatch:
    """One black image of ``size`` x ``size`` pixels, for ``model.init``; the shapes of variables depend on no image."""
    sides = jnp.full((1, 2), size, jnp.int32)
    return ImageBatch(jnp.zeros((1, size, size, 3), jnp.float32), sides, sides, None)


def no_detections(images: int, slots: int, dtype: Dtype) -> Detections:
    """Detections without a box, for ``init``: postprocessing has no variables, and tracing it takes time.

    Args:
        images: B.
        slots: K, detection slots per image.
        dtype: dtype of boxes and scores.

    Returns:
        ``Detections`` of [B, K] empty slots.
    """
    return Detections(
        boxes=jnp.zeros((images, slots, 4), dtype),
        scores=jnp.zeros((images, slots), dtype),
        labels=jnp.full((images, slots), -1, jnp.int32),
        valid=jnp.zeros((images, slots), bool),
    )


def gather_detections(
    boxes: Float[Array, "N 4"],
    scores: Float[Array, " N"],
    labels: Int[Array, " N"],
    keep: Int[Array, " K"],
) -> Detections:
    """The candidates of one image at the indices ``keep``, as a row of ``Detections``; -1 gives an empty slot."""
    valid = keep >= 0
    index = jnp.maximum(keep, 0)
    return Detections(
        boxes=jnp.where(valid[:, None], boxes[index], 0),
        scores=jnp.where(valid, scores[index], 0),
        labels=jnp.where(valid, labels[index].astype(jnp.int32), -1),
        valid=valid,
    )
