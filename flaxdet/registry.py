"""The table of detectors that have a builder. Code outside ``flaxdet/zoo/`` finds detectors here and names none.

Each file of ``flaxdet/zoo/`` registers one ``Architecture``. Conversion, files, the command line, training defaults and
the parity tests use the table.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from flaxdet.models.detector import GEOMETRY, Detector
from flaxdet.nn.resnet import ResNet

NUM_COCO_CLASSES = 91
FROZEN_EPS = 1e-5  # the default eps of torch's BatchNorm and of torchvision's FrozenBatchNorm2d

# Options of `make_model` for the backbone's body, with default values.
_BODY_OPTIONS: Mapping[str, Any] = MappingProxyType(
    {"frozen_bn": False, "norm_eps": FROZEN_EPS, "freeze_bn": False, "remat": False}
)
# Options of `make_model` for every part, with default values.
_SHARED_OPTIONS: Mapping[str, Any] = MappingProxyType({"dtype": jnp.float32, "param_dtype": None, "precision": None})


def resnet50(*, small: bool = False, **options: Any) -> ResNet:
    """The backbone's body in most of torchvision's detectors; in their small forms a ResNet of one block per stage."""
    return ResNet(10 if small else 50, **options)


@dataclass(frozen=True)
class Keys:
    """The keys that identify a state_dict of an architecture.

    Attributes:
        present: keys that the state_dict must have.
        absent: keys that the state_dict must not have.
        class_key: the key of a tensor with one row per class.
        relative: keys that identify another detector of the same kind, and a phrase for that detector in errors.
    """

    present: frozenset[str]
    absent: frozenset[str]
    class_key: str
    relative: tuple[frozenset[str], str]


@dataclass(frozen=True)
class Training:
    """torchvision's recipe for the published weights, from which ``flaxdet train`` takes default values.

    Attributes:
        lr: learning rate after the warm-up, for ``batch_size``.
        batch_size: images per update, over all devices.
        epochs: number of epochs.
        milestones: epochs (from 0) at whose start the learning rate is divided by 10.
        weight_decay: weight decay of every parameter, biases and norms included.
        fine_tuning_lr: learning rate for ``batch_size`` images when trained weights are adapted to other images.
        alias: name of this architecture's recipe in ``flaxdet.train``; None for no such name.
        data: the augmentation: options of ``flaxdet.data.train_batches``.
    """

    lr: float
    batch_size: int
    epochs: int
    milestones: tuple[int, ...]
    weight_decay: float
    fine_tuning_lr: float
    alias: str | None = None
    data: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({"flip": 0.5}))


@dataclass(frozen=True)
class Architecture:
    """A detector that has a builder.

    Attributes:
        name: name of the builder, in torchvision and in flaxdet.
        title: short description of the detector, for people.
        kind: class of the model, of the same name as torchvision's class.
        make: ``(num_classes, body, shared, *, small, **fields) -> model``; ``body`` is the backbone's body, ``shared``
            are the options of every part, ``small`` asks for the small form of the architecture, ``fields`` are fields
            of ``kind``.
        weights: the ``WeightsEnum`` of the published weights; None if there are none.
        keys: the keys that identify a state_dict of this architecture. None if keys can't identify the architecture;
            then only files of ``flaxdet.save``, which store the name, can be loaded.
        training: the recipe of the published weights.
        in_torch: ``(norm_layer, trainable_layers, num_classes, *, small, **options) -> torch.nn.Module``, torchvision's
            detector with ``norm_layer`` in the body; imports torch when called.
        comparison: name of the module that records the stages of torchvision's detector and calibrates the prediction
            layers (``flaxdet.convert.stages``, ``flaxdet.convert.lively``). The module is imported on use and needs
            torch.
        make_body: ``(*, small, **options) -> module``, the backbone's body; default a ResNet-50, or if ``small`` a
            ResNet-10.
        made_parts: fields of ``kind`` that ``make`` sets; callers can't set these fields.
        freezable: True if torchvision builds the body on FrozenBatchNorm2d when anything is pretrained.
        default: True for the architecture that the command line uses by default.
        private: True to hide the architecture from users.
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
    made_parts: tuple[str, ...] = ()
    freezable: bool = False
    default: bool = False
    private: bool = False

    @property
    def fields(self) -> list[str]:
        """Fields of ``kind`` that the builder accepts as keywords, under torchvision's names."""
        excluded = {"backbone", "num_classes", "transform", "parent", "name", "trainable_backbone_layers"}
        excluded |= {*_SHARED_OPTIONS, *self.made_parts}
        names = {each.name for each in dataclasses.fields(self.kind)} - excluded
        return sorted({*names, *GEOMETRY})

    def load_comparison(self) -> ModuleType:
        """Imports the module named ``comparison``.

        Raises:
            ImportError: without torch and torchvision.
        """
        return importlib.import_module(self.comparison)


_table: dict[str, Architecture] = {}


def register(architecture: Architecture) -> Architecture:
    """Adds an architecture to the table.

    Args:
        architecture: an architecture whose name is not registered.

    Returns:
        The argument.

    Raises:
        ValueError: if the name is registered already.
    """
    if architecture.name in _table:
        raise ValueError(f"{architecture.name} is registered already")
    _table[architecture.name] = architecture
    return architecture


def architectures(*, private: bool = False) -> list[Architecture]:
    """The architectures, the default first, the others in the order of names.

    Args:
        private: include private architectures.
    """
    selected = (each for each in _table.values() if private or not each.private)
    return sorted(selected, key=lambda each: (not each.default, each.name))


def names(*, private: bool = False) -> list[str]:
    """The names of the builders, in the order of ``architectures``."""
    return [each.name for each in architectures(private=private)]


def get(name: str) -> Architecture:
    """The architecture of a builder, by the builder's name.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in _table:
        raise ValueError(f"unknown model {name!r}; expected one of {', '.join(names())}")
    return _table[name]


def make_model(name: str, /, *, num_classes: int, small: bool = False, **options: Any) -> Any:
    """The module that a builder returns, without variables.

    Args:
        name: name of the builder.
        num_classes: number of classes, including the background.
        small: makes the small form of the architecture, which compiles in a third of the time and which tests use: one
            block per stage of the body, fewer convolutions in the heads.
        **options: ``trainable_backbone_layers`` (0..5, default 5). Options of the body: ``frozen_bn``
            (``FrozenBatchNorm``), ``norm_eps`` (added to the variance), ``freeze_bn`` (in training, live BatchNorm
            normalises with the running statistics and does not update them) and ``remat`` (rematerialises each residual
            block in the backward pass). Options of every part: ``dtype``, ``param_dtype`` and ``precision``. Fields of
            the model's class.

    Returns:
        The model.

    Raises:
        TypeError: for an unknown keyword, or for a part that the builder makes.
        ValueError: for an unknown builder, fewer than one class, or frozen BatchNorm in a detector that has no frozen
            form.
    """
    architecture = get(name)
    accepted = {"trainable_backbone_layers", *_BODY_OPTIONS, *_SHARED_OPTIONS, *architecture.fields}
    for option in options:
        if option in architecture.made_parts:
            raise TypeError(f"{name}() got multiple values for keyword argument {option!r}: the builder makes it")
        if option not in accepted:
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
    return architecture.make(
        num_classes, architecture.make_body(small=small, **body, **shared), shared, small=small, **options
    )


def describe(model: Any) -> tuple[Architecture, dict[str, Any]]:
    """The architecture and the options with which ``make_model`` makes an equal model, dtypes and precision left out.

    Args:
        model: a detector.

    Returns:
        The architecture, and the options: ``num_classes``, ``trainable_backbone_layers``, ``frozen_bn``, ``freeze_bn``
        and ``remat`` in any case; every other option only if the value is not the default.

    Raises:
        ValueError: for a model that no builder makes.
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
    builders = ", ".join(each.name for each in kinds)
    raise ValueError(
        f"no builder of this class ({builders}) makes this model, which has parts of another kind (another "
        "backbone, head or predictor)"
    )


def nearest(model: Any) -> Architecture:
    """The architecture of a model, or, for a model that no builder makes, an architecture with the same model class.

    Raises:
        ValueError: if no architecture has the model's class.
    """
    try:
        return describe(model)[0]
    except ValueError:
        kinds = [each for each in architectures(private=True) if type(model) is each.kind]
        if not kinds:
            raise
        return kinds[0]


def _differing(architecture: Architecture, model: Any, dtypes: Mapping[str, Any]) -> dict[str, Any]:
    """The options of ``describe``, if the model is of this architecture."""
    body = getattr(model.backbone, "body", None)
    options: dict[str, Any] = {
        "num_classes": getattr(model, "num_classes", None)
        or getattr(getattr(model, model.class_part), "num_classes", None)
        or 1,  # a custom part may have no num_classes; no builder makes such a model
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
