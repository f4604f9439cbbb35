"""torchvision's state_dict to Flax variables and back, strictly: every tensor is placed, or all faults told.

A ``num_batches_tracked`` means nothing in Flax: it is ignored when read and written as 0 where BatchNorm is
live. Live and frozen BatchNorm hold the same four vectors, so either kind of model takes either kind of file.
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
from flaxdet.convert.rules import COLLECTIONS, COUNTER, Rule, canonical_keys, leaves_of, rules
from flaxdet.files import checkpoint
from flaxdet.models.detector import example_batch
from flaxdet.registry import FROZEN_EPS

Variables = dict[str, Any]
StateDict = Mapping[str, Any]
Source = StateDict | str | os.PathLike[str]

_SHOWN = 8


class StateDictError(ValueError):
    """A state_dict that does not fit a model, with every fault.

    Args:
        subject: what does not fit what, the message's beginning.
        faults: sentences by kind.
        hint: the end of the message's first line.

    Attributes:
        faults: sentences by kind: "missing", "unexpected", "doubled", "wrong shape", "not finite",
            "wrong type". The message shows the first few of each.
    """

    def __init__(self, subject: str, faults: Mapping[str, list[str]], hint: str = "") -> None:
        self.faults = {kind: list(found) for kind, found in faults.items() if found}
        counts = ", ".join(f"{len(found)} {kind}" for kind, found in self.faults.items())
        lines = [f"{subject}: {counts}{hint}"]
        for kind, found in self.faults.items():
            lines += [f"  {kind}: {checkpoint.one_line(line)}" for line in found[:_SHOWN]]
            if len(found) > _SHOWN:
                lines.append(f"  {kind}: and {len(found) - _SHOWN} more")
        super().__init__("\n".join(lines))


def from_torchvision(
    model: Any, state_dict: Source, *, allow_nonfinite: bool = False, source: str | None = None
) -> Variables:
    """Converts a state_dict of torchvision's model into variables for ours.

    Accepted besides today's keys: torchvision's older names, the "module." of DataParallel, a checkpoint of
    the training reference ({"model": ...}), ``num_batches_tracked`` present or absent, any floating dtype.

    Args:
        model: a detector whose parts torchvision has, as the builders make them.
        state_dict: torch tensors or numpy or jax arrays by key, or the path of a file for `checkpoint.read`.
        allow_nonfinite: accept NaN and infinities.
        source: what error messages call it; default the path or "state_dict".

    Returns:
        {"params": ..., "batch_stats": ...}, jax arrays in the dtype that the model stores (its
        ``param_dtype``).

    Raises:
        StateDictError: with everything that is missing, unexpected, doubled, of a wrong shape or type, or
            not finite.
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
    """Puts an ImageNet classifier's ResNet (torchvision's ``resnet50`` keys) into a detector's backbone.

    Args:
        model: the detector.
        variables: its variables; they are not changed.
        state_dict: as for `from_torchvision`; ``fc.*`` is ignored.
        allow_nonfinite: accept NaN and infinities.
        source: what error messages call it; default the path or "state_dict".

    Returns:
        Variables with the backbone's body from the state_dict and all else from `variables`.

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
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    leaves = {(c, path): leaf for c, path, leaf in leaves_of(variables)}
    dtypes = {where: leaf.dtype for where, leaf in leaves.items()}
    message = f"{subject} does not fit the backbone of {type(model).__name__}"
    return _nest(leaves | _convert(message, state, rows, dtypes, allow_nonfinite), variables)


def to_torchvision(model: Any, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Converts variables into the state_dict that torchvision loads with ``strict=True``.

    Args:
        model: a detector whose parts torchvision has, as the builders make them.
        variables: its variables.

    Returns:
        Arrays of the same dtypes, in torchvision's shapes, by torchvision's key, in torchvision's order, each
        contiguous and a copy; ``num_batches_tracked`` is an int64 0 for every live BatchNorm. The tensors can't say
        that FrozenBatchNorm adds another eps than 1e-5: a warning then says what to do in torchvision.

    Raises:
        StateDictError: if the variables are not the model's: leaves missing, unexpected or of a wrong shape.
        ValueError: if the model is not of torchvision's architecture, or its BatchNorm is folded.
    """
    body = getattr(getattr(model, "backbone", None), "body", None)
    eps: float = getattr(body, "norm_eps", FROZEN_EPS)
    if eps != FROZEN_EPS:
        warnings.warn(
            f"the model's BatchNorm adds {eps} to the variance, which tensors can't say: in torchvision, "
            f"call torchvision.models.detection._utils.overwrite_eps(model, {eps}) after load_state_dict",
            stacklevel=2,
        )
    return tensors_of(model, variables)


def tensors_of(model: Any, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """``to_torchvision`` without the warning, for files that say the model's options too.

    Args:
        model: as there.
        variables: as there.

    Returns:
        As there.

    Raises:
        StateDictError, ValueError: as there.
    """
    _check_not_folded(model)
    abstract = abstract_variables(model)
    wanted = {(c, path): leaf.shape for c, path, leaf in leaves_of(abstract)}
    leaves = {(c, path): leaf for c, path, leaf in leaves_of(variables)}
    faults = {
        "missing": [_where(at) for at in wanted if at not in leaves],
        "unexpected": [_where(at) for at in leaves if at not in wanted],
        "wrong shape": [
            f"{_where(at)}: expected {list(shape)}, found {list(leaves[at].shape)}"
            for at, shape in wanted.items()
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
            "BatchNorm of the model is folded (fold_batch_norm), so torchvision has no such model: pass the one before"
        )


def abstract_variables(model: Any) -> Variables:
    """Shapes and dtypes of a detector's variables, as `jax.ShapeDtypeStruct`; nothing is computed.

    Args:
        model: a module called with an `ImageBatch`.

    Returns:
        {"params": ..., "batch_stats": ...}.
    """
    return _init.eval_shape(model)


@functools.partial(jax.jit, static_argnums=0)  # for its cache: an equal model is not traced again
def _init(model: Any) -> Variables:
    variables = model.init(jax.random.key(0), example_batch())  # sown intermediates are left out
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
        raise checkpoint.CheckpointError(checkpoint.one_line(f"{name} {error}")) from error


def _where(at: tuple[str, tuple[str, ...]]) -> str:
    return "/".join((at[0], *at[1]))


def _nest(flat: Mapping[tuple[str, tuple[str, ...]], Any], like: Mapping[str, Any]) -> Variables:
    return {
        collection: traverse_util.unflatten_dict({path: leaf for (c, path), leaf in flat.items() if c == collection})
        for collection in COLLECTIONS
        if collection in like
    }


def _convert(
    message: str,
    state: StateDict,
    rows: list[Rule],
    dtypes: Mapping[tuple[str, tuple[str, ...]], Any],
    allow_nonfinite: bool,
) -> dict[tuple[str, tuple[str, ...]], jax.Array]:
    """The leaf of every row, or one StateDictError with all that is wrong."""
    names = canonical_keys(state)
    known = {row.key for row in rows}
    # Frozen BatchNorm has no counter, but a file of the live kind brings one for each.
    ignored = {f"{row.key.removesuffix('running_mean')}{COUNTER}" for row in rows if row.key.endswith("running_mean")}
    faults: dict[str, list[str]] = {
        "missing": [row.key for row in rows if row.collection is not None and row.key not in names],
        "unexpected": [given[0] for name, given in names.items() if name not in known | ignored],
        "doubled": [" and ".join(given) for given in names.values() if len(given) > 1],
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
        strange = faults["missing"] or faults["unexpected"] or faults["wrong shape"]
        known_as = describe(state) if strange else None
        raise StateDictError(message, faults, f"; it holds {known_as}" if known_as else "")
    # The leaves are copies that nobody else holds, so device_put may keep their memory. jnp.asarray would compile a
    # program for each shape, and keep it: 40 MB, half a second.
    return {at: jax.device_put(leaf) for at, leaf in flat.items()}
