"""Converts torchvision's state_dict to Flax variables and back. Strict: an error lists every tensor that does not fit.

Flax has no counterpart of ``num_batches_tracked``: it is ignored when read, and written as 0 for live BatchNorm. Live
and frozen BatchNorm hold the same four vectors, so a model of each kind accepts files of each kind.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from flaxdet.convert.identify import describe
from flaxdet.convert.rules import COLLECTIONS, COUNTER, Rule, canonical_keys, leaves_of, prefixes_of, rules
from flaxdet.files import checkpoint
from flaxdet.files.messages import one_line
from flaxdet.models.detector import example_batch
from flaxdet.registry import FROZEN_EPS

Variables = dict[str, Any]
StateDict = Mapping[str, Any]
Source = StateDict | str | os.PathLike[str]

_SHOWN = 8


class StateDictError(ValueError):
    """A state_dict does not fit a model; lists every fault.

    Args:
        subject: beginning of the message, such as "model.pth does not fit FCOS".
        faults: descriptions of the faults, by kind.
        hint: end of the message's first line.

    Attributes:
        faults: descriptions of the faults, by kind: "missing", "unexpected", "doubled", "wrong shape", "not finite",
            "wrong type". The message shows the first few of each kind.
    """

    def __init__(self, subject: str, faults: Mapping[str, list[str]], hint: str = "") -> None:
        self.faults = {kind: list(texts) for kind, texts in faults.items() if texts}
        counts = ", ".join(f"{len(texts)} {kind}" for kind, texts in self.faults.items())
        lines = [f"{subject}: {counts}{hint}"]
        for kind, texts in self.faults.items():
            lines += [f"  {kind}: {one_line(text)}" for text in texts[:_SHOWN]]
            if len(texts) > _SHOWN:
                lines.append(f"  {kind}: and {len(texts) - _SHOWN} more")
        super().__init__("\n".join(lines))


def from_torchvision(
    model: Any, state_dict: Source, *, allow_nonfinite: bool = False, source: str | None = None
) -> Variables:
    """Converts a state_dict of torchvision's model into variables of flaxdet's model.

    Accepts torchvision's present keys, torchvision's older keys, prefixes of DataParallel, torch.compile, FSDP and of a
    detector that is a part of another module (Lightning's "model."; tensors without this prefix are left out), a
    checkpoint of the training reference ({"model": ...}), state_dicts with and without ``num_batches_tracked``, and any
    floating dtype.

    Args:
        model: a detector of parts that torchvision has, for example from a builder.
        state_dict: torch tensors, numpy arrays or jax arrays by key, or the path of a file for `checkpoint.read`.
        allow_nonfinite: accept NaN and infinities.
        source: name of the state_dict in error messages; default the path, or "state_dict".

    Returns:
        {"params": ..., "batch_stats": ...}, jax arrays in the model's ``param_dtype``.

    Raises:
        StateDictError: for tensors that are missing, unexpected, doubled, of a wrong shape or type, or not finite; the
            message lists them all.
        flaxdet.convert.CheckpointError: if the file can't be read or holds no state_dict.
        TypeError: if `state_dict` is neither a dict nor a path.
    """
    _check_not_folded(model)
    subject, state = _open(state_dict, source)
    abstract = abstract_variables(model)
    rows = rules(model, abstract)
    dtypes = {(c, path): leaf.dtype for c, path, leaf in leaves_of(abstract)}
    flat = _convert(f"{subject} does not fit {type(model).__name__}", state, rows, dtypes, allow_nonfinite)
    return _nest(flat, abstract)


def backbone_from_torchvision(
    model: Any,
    variables: Mapping[str, Any],
    state_dict: Source,
    *,
    allow_nonfinite: bool = False,
    source: str | None = None,
) -> Variables:
    """Replaces the body of a detector's backbone by a ResNet trained on ImageNet (torchvision's ``resnet50`` keys).

    Args:
        model: the detector.
        variables: the variables of the detector; not changed.
        state_dict: as for `from_torchvision`; ``fc.*`` is ignored. The body of a whole detector is taken too.
        allow_nonfinite: accept NaN and infinities.
        source: name of the state_dict in error messages; default the path, or "state_dict".

    Returns:
        Variables: the backbone's body from ``state_dict``, everything else from ``variables``.

    Raises:
        StateDictError: as for `from_torchvision`.
        flaxdet.convert.CheckpointError: if the file can't be read or holds no state_dict.
        TypeError: if `state_dict` is neither a dict nor a path.
    """
    subject, state = _open(state_dict, source)
    prefix = "backbone.body."
    rows = [
        row._replace(key=row.key.removeprefix(prefix)) for row in rules(model, variables) if row.key.startswith(prefix)
    ]
    state = {key: value for key, value in state.items() if ".fc." not in f".{key}"}
    leaves = {(c, path): leaf for c, path, leaf in leaves_of(variables)}
    dtypes = {where: leaf.dtype for where, leaf in leaves.items()}
    message = f"{subject} does not fit the backbone of {type(model).__name__}"
    return _nest(leaves | _convert(message, state, rows, dtypes, allow_nonfinite), variables)


def to_torchvision(model: Any, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Converts variables into the state_dict that torchvision loads with ``strict=True``.

    Args:
        model: a detector of parts that torchvision has, for example from a builder.
        variables: the variables of the detector.

    Returns:
        Arrays with torchvision's keys, order and shapes, in the dtypes of the variables. Each array is contiguous and a
        copy. ``num_batches_tracked`` is an int64 0 for every live BatchNorm. A state_dict does not hold the eps of
        FrozenBatchNorm: for another eps than 1e-5, a warning says how to set the eps in torchvision.

    Raises:
        StateDictError: if leaves of the model's variables are missing, unexpected or of a wrong shape.
        ValueError: if the model is not of torchvision's architecture, or has folded BatchNorm.
    """
    body = getattr(getattr(model, "backbone", None), "body", None)
    eps: float = getattr(body, "norm_eps", FROZEN_EPS)
    if eps != FROZEN_EPS:
        warnings.warn(
            f"the model's BatchNorm adds {eps} to the variance, which a state_dict doesn't hold: in torchvision, "
            f"call torchvision.models.detection._utils.overwrite_eps(model, {eps}) after load_state_dict",
            stacklevel=2,
        )
    return tensors_of(model, variables)


def tensors_of(model: Any, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """``to_torchvision`` without the warning, for files that hold the model's options too.

    Args:
        model: as for ``to_torchvision``.
        variables: as for ``to_torchvision``.

    Returns:
        The result of ``to_torchvision``.

    Raises:
        StateDictError, ValueError: as ``to_torchvision``.
    """
    _check_not_folded(model)
    abstract = abstract_variables(model)
    expected = {(c, path): leaf.shape for c, path, leaf in leaves_of(abstract)}
    leaves = {(c, path): leaf for c, path, leaf in leaves_of(variables)}
    faults = {
        "missing": [_where(at) for at in expected if at not in leaves],
        "unexpected": [_where(at) for at in leaves if at not in expected],
        "wrong shape": [
            f"{_where(at)}: expected {list(shape)}, found {list(leaves[at].shape)}"
            for at, shape in expected.items()
            if at in leaves and tuple(leaves[at].shape) != tuple(shape)
        ],
    }
    if any(faults.values()):
        raise StateDictError(f"the variables do not fit {type(model).__name__}", faults)
    state = {}
    for row in rules(model, abstract):
        if row.collection is None:
            state[row.key] = np.zeros((), np.int64)
        else:
            leaf = np.asarray(jax.device_get(leaves[row.collection, row.path]))
            state[row.key] = np.array(row.layout.to_torch(leaf), order="C", copy=True)
    return state


def _check_not_folded(model: Any) -> None:
    if getattr(getattr(getattr(model, "backbone", None), "body", None), "folded", False):
        raise ValueError(
            "BatchNorm of the model is folded (fold_batch_norm), unlike in torchvision: pass the model before folding"
        )


def abstract_variables(model: Any) -> Variables:
    """Shapes and dtypes of a detector's variables, as `jax.ShapeDtypeStruct`; nothing is computed.

    Args:
        model: a module called with an `ImageBatch`.

    Returns:
        {"params": ..., "batch_stats": ...}.
    """
    return _init.eval_shape(model)


@functools.partial(jax.jit, static_argnums=0)  # jit's cache: an equal model is not traced again
def _init(model: Any) -> Variables:
    variables = model.init(jax.random.key(0), example_batch())  # also has the collection of sown stages
    return {collection: variables[collection] for collection in COLLECTIONS if collection in variables}


def _open(state_dict: Source, name: str | None) -> tuple[str, dict[str, Any]]:
    if isinstance(state_dict, (str, os.PathLike)):
        return name or os.fspath(state_dict), checkpoint.read(state_dict)
    if not isinstance(state_dict, Mapping):
        wanted = "a dict of tensors or arrays by torchvision's key, or the path of a checkpoint"
        hint = "; pass model.state_dict()" if hasattr(state_dict, "state_dict") else ""
        raise TypeError(f"state_dict should be {wanted}, got {type(state_dict).__name__}{hint}")
    name = name or "state_dict"
    try:
        return name, checkpoint.unwrap(state_dict)
    except ValueError as error:
        raise checkpoint.CheckpointError(one_line(f"{name} {error}")) from error


def _where(at: tuple[str, tuple[str, ...]]) -> str:
    return "/".join((at[0], *at[1]))


def _nest(flat: Mapping[tuple[str, tuple[str, ...]], Any], like: Mapping[str, Any]) -> Variables:
    return {
        collection: traverse_util.unflatten_dict({path: leaf for (c, path), leaf in flat.items() if c == collection})
        for collection in COLLECTIONS
        if collection in like
    }


def _detector_names(names: dict[str, list[str]], wanted: set[str]) -> dict[str, list[str]]:
    """The names of the detector's tensors, without the prefix that the detector has as a part of another module."""
    counts = prefixes_of(names, wanted)
    best = max(counts.values(), default=0)
    chosen = [prefix for prefix, count in counts.items() if count == best]
    if "" in chosen or 2 * best < len(wanted):
        return names
    if len(chosen) > 1:
        listed = ", ".join(f'"{prefix[:-1][:80]}"' for prefix in chosen[:_SHOWN])
        raise checkpoint.CheckpointError(
            f"the state_dict holds the model several times, under {listed}: pass one of them"
        )
    return {name.removeprefix(chosen[0]): keys for name, keys in names.items() if name.startswith(chosen[0])}


def _convert(
    message: str,
    state: StateDict,
    rows: list[Rule],
    dtypes: Mapping[tuple[str, tuple[str, ...]], Any],
    allow_nonfinite: bool,
) -> dict[tuple[str, tuple[str, ...]], jax.Array]:
    """The leaf of every row; or one StateDictError with all faults."""
    names = _detector_names(canonical_keys(state), {row.key for row in rows if row.collection is not None})
    expected = {row.key for row in rows}
    # Frozen BatchNorm has no counter, but a file of live BatchNorm has a counter per BatchNorm.
    ignored = {f"{row.key.removesuffix('running_mean')}{COUNTER}" for row in rows if row.key.endswith("running_mean")}
    faults: dict[str, list[str]] = {
        "missing": [row.key for row in rows if row.collection is not None and row.key not in names],
        "unexpected": [keys[0] for name, keys in names.items() if name not in expected | ignored],
        "doubled": [" and ".join(keys) for keys in names.values() if len(keys) > 1],
        "wrong shape": [],
        "not finite": [],
        "wrong type": [],
    }
    flat = {}
    for row in rows:
        key = names.get(row.key, [""])[0]
        if not key:
            continue
        array = checkpoint.as_array(state[key])
        is_array = isinstance(array, (np.ndarray, np.generic, jax.Array))
        if not is_array or (row.collection and not jnp.issubdtype(array.dtype, jnp.floating)):
            kind = array.dtype if is_array else getattr(array, "origin", type(array).__name__)
            wanted = "a floating point tensor" if row.collection else "a tensor"
            faults["wrong type"].append(f"{key}: expected {wanted}, found {kind}")
        elif row.collection is None:
            continue
        elif tuple(array.shape) != row.shape:
            faults["wrong shape"].append(f"{key}: expected {list(row.shape)}, found {list(array.shape)}")
        else:
            at = (row.collection, row.path)
            with np.errstate(over="ignore"):  # an overflow is reported below
                leaf = row.layout.to_flax(np.asarray(array)).astype(dtypes[at], order="C")
            bad = leaf.size - int(np.isfinite(leaf).sum())
            if bad and not allow_nonfinite:
                faults["not finite"].append(f"{key}: {bad} of {leaf.size} values, as {leaf.dtype}")
            flat[at] = leaf
    if any(faults.values()):
        other_model = faults["missing"] or faults["unexpected"] or faults["wrong shape"]
        content = describe(state) if other_model else None
        raise StateDictError(message, faults, f"; it holds {content}" if content else "")
    # The leaves are copies without other references, so device_put may take over the memory. jnp.asarray would compile
    # and cache a program per shape: 40 MB, half a second.
    return {at: jax.device_put(leaf) for at, leaf in flat.items()}
