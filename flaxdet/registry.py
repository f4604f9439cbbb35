"""The table of detectors that have a builder: what each one is, for all who name no detector themselves.

A file of ``flaxdet/zoo/`` registers one ``Architecture``. Conversion, files, the command line, training defaults and
the parity tests ask the table.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from flaxdet.models.detector import GEOMETRY, Detector
from flaxdet.nn.resnet import ResNet

NUM_COCO_CLASSES = 91
FROZEN_EPS = 1e-5  # of BatchNorm in torch, and of torchvision's FrozenBatchNorm2d

# Options of `make_model` that reach the backbone's body, with their defaults.
_BODY_OPTIONS: Mapping[str, Any] = MappingProxyType(
    {"frozen_bn": False, "norm_eps": FROZEN_EPS, "freeze_bn": False, "remat": False}
)
# Options that reach every part, with their defaults.
_SHARED_OPTIONS: Mapping[str, Any] = MappingProxyType({"dtype": jnp.float32, "param_dtype": None, "precision": None})


def resnet50(**options: Any) -> ResNet:
    """The body of most of torchvision's detectors."""
    return ResNet(50, **options)


def resnet18(**options: Any) -> ResNet:
    """The body of small forms."""
    return ResNet(18, **options)


@dataclass(frozen=True)
class Keys:
    """How the state_dict of an architecture is told from others.

    Attributes:
        present: keys that it has.
        absent: keys that it lacks.
        class_key: the key of a tensor whose first axis has one row for each class.
        relative: keys by which another detector of this kind is told, and what to call it in an error.
    """

    present: frozenset[str]
    absent: frozenset[str]
    class_key: str
    relative: tuple[frozenset[str], str]


@dataclass(frozen=True)
class Training:
    """How torchvision trained the published weights, which is also what ``flaxdet train`` goes by.

    Attributes:
        lr: learning rate after the warm-up, for ``batch_size``.
        batch_size: images of an update, on all devices together.
        epochs: of training.
        milestones: epochs before which the rate is divided by 10.
        weight_decay: of every parameter, biases and norms too.
        data: options of ``flaxdet.data.train_batches``, the augmentation.
        fine_tuning_lr: learning rate for ``batch_size`` images when trained weights are adapted to other images.
        alias: a name of ``recipe`` for this architecture in ``flaxdet.train``, if it has one.
    """

    lr: float
    batch_size: int
    epochs: int
    milestones: tuple[int, ...]
    weight_decay: float
    fine_tuning_lr: float
    alias: str | None = None
    data: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class Architecture:
    """A detector that has a builder.

    Attributes:
        name: of the builder, in torchvision and here.
        title: the detector in words, for people.
        kind: class of the model.
        make: ``(num_classes, body, shared, **fields) -> model``; ``body`` is the backbone's body, ``shared`` the
            options that every part takes, ``fields`` those of ``kind``.
        make_body: ``(**options) -> module``, the backbone's body; default a ResNet-50.
        make_small_body: the same for the small form of the architecture, in which tests run it; default a ResNet-18.
        weights: the ``WeightsEnum`` of the published weights; None for none.
        keys: how its state_dict is told from others; None for an architecture that is never told from keys, so that
            only files of ``flaxdet.save``, which carry the name, can be loaded.
        training: how the weights were trained.
        made_parts: fields of ``kind`` that ``make`` fills in, which nobody else may give.
        freezable: whether torchvision builds the body on FrozenBatchNorm2d where anything is pretrained.
        in_torch: ``(norm_layer, trainable_layers, num_classes, *, small, **options) -> torch.nn.Module``, torchvision's
            detector with a kind of norm in the body; it imports torch when called.
        comparison: name of the module that records the stages of torchvision's detector and makes its weights lively
            (``flaxdet.convert.stages``, ``flaxdet.convert.lively``); it needs torch, and is imported when asked for.
        default: whether the command line takes this architecture where none is named.
        private: left out of what users choose from.
    """

    name: str
    title: str
    kind: type[Detector]
    make: Callable[..., Detector]
    weights: Any
    keys: Keys | None
    training: Training
    in_torch: Callable[..., Any]
    comparison: str
    make_body: Callable[..., nn.Module] = resnet50
    make_small_body: Callable[..., nn.Module] = resnet18
    made_parts: tuple[str, ...] = ()
    freezable: bool = False
    default: bool = False
    private: bool = False

    @property
    def fields(self) -> list[str]:
        """The keywords of the builder besides its own parameters: fields of ``kind``, under torchvision's names."""
        own = {"backbone", "num_classes", "transform", "parent", "name", *_SHARED_OPTIONS, *self.made_parts}
        names = {each.name for each in dataclasses.fields(self.kind)} - own - {"trainable_backbone_layers"}
        return sorted({*names, *GEOMETRY})

    def load_comparison(self) -> ModuleType:
        """Imports the module ``comparison``.

        Raises:
            ImportError: without torch and torchvision.
        """
        return importlib.import_module(self.comparison)


_table: dict[str, Architecture] = {}


def register(architecture: Architecture) -> Architecture:
    """Enters an architecture.

    Args:
        architecture: of a name that is not taken.

    Returns:
        The same.

    Raises:
        ValueError: if the name is taken.
    """
    if architecture.name in _table:
        raise ValueError(f"{architecture.name} is registered already")
    _table[architecture.name] = architecture
    return architecture


def architectures(*, private: bool = False) -> list[Architecture]:
    """The architectures, the default first and the others by name.

    Args:
        private: those that are left out of what users choose from too.
    """
    known = (each for each in _table.values() if private or not each.private)
    return sorted(known, key=lambda each: (not each.default, each.name))


def names(*, private: bool = False) -> list[str]:
    """The builders' names, in the order of ``architectures``."""
    return [each.name for each in architectures(private=private)]


def get(name: str) -> Architecture:
    """The architecture of a builder's name.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in _table:
        raise ValueError(f"unknown model {name!r}; expected one of {', '.join(names())}")
    return _table[name]


def make_model(name: str, /, *, num_classes: int, small: bool = False, **options: Any) -> Any:
    """The module that a builder returns, without variables.

    Args:
        name: of the builder.
        num_classes: including the background.
        small: makes the small form of the architecture.
        **options: ``trainable_backbone_layers`` (0..5, default 5); of the body ``frozen_bn`` (``FrozenBatchNorm``),
            ``norm_eps`` (added to the variance), ``freeze_bn`` (keeps live BatchNorm as in evaluation while training)
            and ``remat`` (rematerialises each residual block in the gradient); ``dtype``, ``param_dtype`` and
            ``precision`` of every part; fields of the model's class.

    Returns:
        The model.

    Raises:
        TypeError: for a keyword that is unknown or that the builder sets itself.
        ValueError: for an unknown builder, fewer than one class, or frozen BatchNorm where the detector has none.
    """
    architecture = get(name)
    known = {"trainable_backbone_layers", *_BODY_OPTIONS, *_SHARED_OPTIONS, *architecture.fields}
    for option in options:
        if option in architecture.made_parts:
            raise TypeError(f"{name}() got multiple values for keyword argument {option!r}: it makes its own")
        if option not in known:
            taken = ", ".join(architecture.fields)
            raise TypeError(f"{name}() got an unexpected keyword argument {option!r}; it takes {taken}")
    if num_classes < 1:
        raise ValueError(f"num_classes should be at least 1, got {num_classes}")
    body, shared = (
        {option: options.pop(option, default) for option, default in defaults.items()}
        for defaults in (_BODY_OPTIONS, _SHARED_OPTIONS)
    )
    if body["frozen_bn"] and not architecture.freezable:
        raise ValueError(f"{name} has live BatchNorm throughout: frozen_bn should be False")
    make_body = architecture.make_small_body if small else architecture.make_body
    return architecture.make(num_classes, make_body(**body, **shared), shared, **options)


def describe(model: Any) -> tuple[Architecture, dict[str, Any]]:
    """The architecture and the options from which ``make_model`` makes this very model again, its dtypes left out.

    Args:
        model: a detector.

    Returns:
        The architecture, and options that differ from the defaults, ``num_classes`` and those of BatchNorm always.

    Raises:
        ValueError: for a model that no builder makes; a TypeError if it is no detector.
    """
    kinds = [each for each in architectures(private=True) if type(model) is each.kind]
    if not kinds:
        known = " or ".join(sorted({each.kind.__name__ for each in architectures()}))
        raise ValueError(f"expected a model of {known}, got {type(model).__name__}")
    dtypes = {option: getattr(model, option) for option in _SHARED_OPTIONS}
    for architecture in kinds:
        options = _differing(architecture, model, dtypes)
        try:
            if make_model(architecture.name, **options, **dtypes) == model:
                return architecture, options
        except (TypeError, ValueError):  # options that belong to another architecture of this class
            continue
    raise ValueError(
        f"no builder of this class ({_listed(kinds)}) makes this model, which has parts of another kind (another "
        "backbone, head or predictor)"
    )


def nearest(model: Any) -> Architecture:
    """The architecture of a model, or another of the same class where new class layers or parts have changed it.

    Raises:
        ValueError: for a model of no architecture's class.
    """
    try:
        return describe(model)[0]
    except ValueError:
        kinds = [each for each in architectures(private=True) if type(model) is each.kind]
        if not kinds:
            raise
        return kinds[0]


def _differing(architecture: Architecture, model: Any, dtypes: Mapping[str, Any]) -> dict[str, Any]:
    body = getattr(model.backbone, "body", None)
    options: dict[str, Any] = {
        "num_classes": getattr(model, "num_classes", None)
        or getattr(getattr(model, model.class_part), "num_classes", None)
        or 1,  # a part of the user's own needn't say: no builder makes it
        **{name: bool(getattr(body, name, False)) for name in ("frozen_bn", "freeze_bn", "remat")},
        "trainable_backbone_layers": model.trainable_backbone_layers,
    }
    if (eps := getattr(body, "norm_eps", FROZEN_EPS)) != FROZEN_EPS:
        options["norm_eps"] = eps
    if options["frozen_bn"] and not architecture.freezable:
        return options
    standard = make_model(architecture.name, **options, **dtypes)
    for name in architecture.fields:
        value = getattr(model, name)
        if name not in (model.class_part, "head") and value != getattr(standard, name):
            options[name] = value.item() if isinstance(value, np.generic) else value
    return options


def _listed(those: Iterable[Architecture]) -> str:
    return ", ".join(each.name for each in those)
