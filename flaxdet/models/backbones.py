"""Checks of a detector's backbone, which may be a custom module, and of options that model and parts share."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from flaxdet.nn.fpn import Features
from flaxdet.nn.layers import Array
from flaxdet.nn.options import check_counts
from flaxdet.nn.typed import SHARED_OPTIONS, default_param_dtype, parts_of


def check_backbone(model: Any) -> None:
    """Raises TypeError or ValueError unless a model's backbone is a Linen module with ``out_channels``."""
    backbone = model.backbone
    if not isinstance(backbone, nn.Module):
        raise TypeError(f"backbone should be a flax.linen Module, got {backbone!r}")
    if not hasattr(backbone, "out_channels"):
        raise ValueError(
            "backbone should contain an attribute out_channels specifying the number of output "
            "channels (assumed to be the same for all the levels)"
        )
    check_counts(backbone, 1, "out_channels")


def named_maps(model: Any, found: Any, pixels: Array) -> Features:
    """A backbone's result as {name: map}; a single map gets the name "0".

    Args:
        model: the detector.
        found: the result of the backbone.
        pixels: [B, H, W, 3], the argument of the backbone.

    Returns:
        {name: [B, h, w, C]}, finest first.

    Raises:
        TypeError: if the result is neither a map nor a mapping of names to maps.
        ValueError: for maps of another shape, in another order, or with names that the model uses itself.
    """
    backbone = model.backbone
    who = f"backbone {type(backbone).__name__}"
    maps: Features = dict(found) if isinstance(found, Mapping) else {"0": found}
    for name, x in maps.items():
        if not (isinstance(name, str) and hasattr(x, "shape") and hasattr(x, "dtype")):
            got = f"a map {name!r} of type {type(x).__name__}" if isinstance(found, Mapping) else type(found).__name__
            raise TypeError(
                f"{who} should return one map [B, h, w, C], or a mapping of names to maps, finest first, such as "
                f'{{"0": ..., "1": ...}}; it returned {got}'
            )
    if not maps:
        raise ValueError(f"{who} should return at least one map, it returned none")
    used = {field.name for field in dataclasses.fields(model)} | model._own_stages
    shapes = {name: tuple(x.shape) for name, x in maps.items()}
    for name, shape in shapes.items():
        if name in used:
            raise ValueError(f"{who} returned a map named {name!r}, a name that {type(model).__name__} uses itself")
        if len(shape) != 4 or shape[0] != pixels.shape[0] or 0 in shape[1:] or shape[3] != backbone.out_channels:
            raise ValueError(
                f"{who} should return maps [{pixels.shape[0]}, h, w, {backbone.out_channels}] (images, rows, columns, "
                f"out_channels); map {name!r} has shape {list(shape)}"
            )
    sides = [shape[1:3] for shape in shapes.values()]
    if any(a[0] < b[0] or a[1] < b[1] for a, b in itertools.pairwise(sides)):
        raise ValueError(f"{who} should return maps finest first, and returned {shapes}")
    return maps


def warn_of_other_options(model: Any) -> None:
    """Warns of parts that were made with another ``dtype``, ``param_dtype`` or ``precision`` than the model.

    A model's option applies outside the parts, and to parts that the model makes. A part passed by the user keeps its
    options. If the model's option is not the default, the user has probably forgotten to give it to the part: that is
    likelier than a model of several dtypes.
    """
    defaults = {"dtype": jnp.float32, "param_dtype": default_param_dtype(model.dtype, None), "precision": None}
    for option in SHARED_OPTIONS:
        value = getattr(model, option)
        if value == defaults[option]:
            continue
        others = [f"{path} {type(part).__name__}" for path, part in parts_of(model) if departs(part, option, value)]
        if others:
            value = value.name if option != "precision" else value
            warnings.warn(
                f"{type(model).__name__}: {option}={value} does not reach {', '.join(others)}: make each with "
                f"{option}={value} too, or use model.clone({option}=...), which does. If another {option} is intended, "
                "filter this warning",
                stacklevel=3,  # the line that made the model, above the constructor
            )


def departs(part: nn.Module, option: str, asked: Any) -> bool:
    """Whether a part's ``option`` differs from ``asked``; False without the field, or with a dtype of None."""
    if option not in {field.name for field in dataclasses.fields(part)}:
        return False
    value = getattr(part, option)
    if option == "precision":
        return value is None
    return value is not None and jnp.dtype(value) != asked


def warn_of_other_maps(model: Any, maps: Features) -> None:
    """Warns if a backbone's maps are not in the model's dtype, unless a part has a field with another dtype."""
    if model.dtype == jnp.float32 or any(departs(part, "dtype", model.dtype) for _, part in parts_of(model)):
        return
    others = {name: str(x.dtype) for name, x in maps.items() if x.dtype != model.dtype}
    if others:
        warnings.warn(
            f"{type(model).__name__}: dtype={model.dtype.name} does not reach the backbone "
            f"{type(model.backbone).__name__}: given pixels in {model.dtype.name}, it returned maps in {others}. "
            f"Give the backbone's layers dtype={model.dtype.name} (without a dtype, Flax's layers compute in the wider "
            "dtype of input and parameters). If another dtype is intended, filter this warning",
            stacklevel=2,
        )
