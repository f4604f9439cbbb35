"""The base of modules with ``dtype`` and ``param_dtype``; ``clone`` passes these options on to every part."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Dtype = Any

# Options that a module shares with its parts.
SHARED_OPTIONS = ("dtype", "param_dtype", "precision")


def default_param_dtype(dtype: Dtype, param_dtype: Dtype | None) -> Dtype:
    """The dtype of the parameters: ``param_dtype``, by default float64 if ``dtype`` is float64, else float32.

    Raises:
        ValueError: for a dtype that is no floating point dtype, or for float64 without jax's 64-bit mode.
    """
    dtype = jnp.dtype(dtype)
    stored = (
        jnp.dtype(param_dtype)
        if param_dtype is not None
        else (dtype if dtype == jnp.float64 else jnp.dtype(jnp.float32))
    )
    for name, asked in (("dtype", dtype), ("param_dtype", stored)):
        if not jnp.issubdtype(asked, jnp.floating):
            raise ValueError(f"{name} should be a floating point dtype, got {asked}")
        if asked == jnp.float64 and jax.dtypes.canonicalize_dtype(asked) != asked:
            raise ValueError(
                f"{name}=float64 needs jax's 64-bit mode: call inside `with jax.enable_x64(True):` "
                "or set jax_enable_x64 (without it jax would compute in float32)"
            )
    return stored


class _Dtypes:
    """Types of the attributes that ``TypedModule`` reads. Each module declares these attributes as fields.

    They are not annotated in ``TypedModule``, where Flax would make them the first fields of every module.
    """

    dtype: Dtype
    param_dtype: Dtype | None


class TypedModule(_Dtypes, nn.Module):
    """Base of modules that declare the fields ``dtype`` and ``param_dtype``.

    The constructor resolves ``dtype`` and ``param_dtype``. So modules with the same options are equal, however the
    dtypes were written. Equal modules share compiled programs, and a checkpoint file can recognise a builder's model.
    """

    def __post_init__(self) -> None:
        stored = default_param_dtype(self.dtype, self.param_dtype)
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        object.__setattr__(self, "param_dtype", stored)
        super().__post_init__()

    def clone(self, *, parent: Any = None, _deep_clone: Any = False, _reset_names: bool = False, **updates: Any) -> Any:
        """A copy with other options, as Flax's ``clone``.

        A new ``dtype``, ``param_dtype`` or ``precision`` also replaces the field of that name in the module's parts,
        and in the parts of the parts. Parts that are given in the same call are not changed.

        Args:
            parent: parent module of the copy; default none.
            _deep_clone: for Flax: copies the parts too.
            _reset_names: for Flax: clears the names of the parts.
            **updates: fields to replace. ``param_dtype=None`` means float64 if ``dtype`` is float64, else float32.
                Without a new ``param_dtype``, the copy has the old ``param_dtype``.

        Returns:
            A module of the same class.
        """
        shared = {name: updates[name] for name in SHARED_OPTIONS if name in updates}
        if shared:
            dtype = updates.get("dtype", self.dtype)
            if "param_dtype" in shared:  # a part of another library may not accept None
                shared["param_dtype"] = default_param_dtype(dtype, shared["param_dtype"])
            updates = {**_parts_with(self, shared, {}), **updates}
        return super().clone(parent=parent, _deep_clone=_deep_clone, _reset_names=_reset_names, **updates)


def parts_of(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules in the fields of a module; after each module, the modules in the fields of that module.

    Args:
        module: any Linen module.
        path: prefix of the paths of the parts.

    Yields:
        (path, part), such as ("backbone.body", the ResNet). If a field holds several modules, each has the path of the
        field.
    """
    for name, value in _fields(module).items():
        for part in jax.tree.leaves(value):
            if isinstance(part, nn.Module):
                yield f"{path}{name}", part
                yield from parts_of(part, f"{path}{name}.")


def _fields(module: nn.Module) -> dict[str, Any]:
    fields = (field.name for field in dataclasses.fields(module) if field.init)
    return {name: getattr(module, name) for name in fields if name not in ("parent", "name")}


def _parts_with(module: nn.Module, options: Mapping[str, Any], done: dict[int, nn.Module]) -> dict[str, Any]:
    """New values of the fields of a module that hold parts which the options change.

    ``done`` maps the id of each visited part to the new part. A part that is in two fields shares the parameters, so
    the two fields get the same new part.
    """

    def changed(part: Any) -> Any:
        if not isinstance(part, nn.Module):
            return part
        if id(part) not in done:
            accepted = {name: value for name, value in options.items() if name in _fields(part)}
            updates = {**_parts_with(part, options, done), **accepted}
            done[id(part)] = nn.Module.clone(part, **updates) if updates else part
        return done[id(part)]

    fields = {name: (value, jax.tree.map(changed, value)) for name, value in _fields(module).items()}
    return {name: new for name, (old, new) in fields.items() if _modules(old) != _modules(new)}


def _modules(value: Any) -> list[int]:
    return [id(part) for part in jax.tree.leaves(value) if isinstance(part, nn.Module)]
