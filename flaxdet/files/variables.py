"""Variables of any model in a file, under the names that Flax has for them: ``save_variables``, ``load_variables``.

``flaxdet.save`` writes models that torchvision has too; a model with parts of the user's own is stored by this module.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from flaxdet._version import __version__
from flaxdet.convert import StateDictError
from flaxdet.files import checkpoint
from flaxdet.files.models import FORMAT, METADATA_KEY, check_categories, read_stored
from flaxdet.models.detector import Detector, example_batch


def save_variables(
    path: str | Path, model: Detector, variables: Mapping[str, Any], *, categories: Sequence[str] | None = None
) -> None:
    """Writes the variables of any detector, whatever its parts, as ``.safetensors``.

    The tensors have Flax's names, such as ``params/backbone/conv0/kernel``, and Flax's layouts. The file doesn't
    describe the model, which ``load_variables`` must be given. For the models of the two builders ``flaxdet.save``
    writes a file that describes the model and that torchvision takes.

    Args:
        path: the target, ending in .safetensors; replaced at once, or not at all.
        model: the detector; one from ``fold_batch_norm`` too.
        variables: the variables of the model, every collection that ``model.init`` makes.
        categories: name of each label, label 0 first; ``flaxdet.load_categories`` reads them.

    Raises:
        TypeError: if ``variables`` is no dict.
        ValueError: for another ending, or a number of categories that isn't num_classes.
        flaxdet.convert.StateDictError: (a ValueError) if the variables are not the model's.
        OSError: if the file can't be written; nothing is left behind then.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected a name ending in .safetensors")
    if not isinstance(variables, Mapping):
        raise TypeError(f'variables should be a dict such as {{"params": ...}}, got {type(variables).__name__}')
    check_categories(path, model, categories)
    arrays = flat_arrays(variables)
    faults = _faults(arrays, _abstract(model))
    if any(faults.values()):
        raise StateDictError(f"{path}: the variables do not fit {type(model).__name__}", faults)
    description = {
        "format": FORMAT,
        "flaxdet": __version__,
        "builder": None,
        "options": {},
        "categories": None if categories is None else list(categories),
    }
    checkpoint.write_safetensors(path, arrays, {METADATA_KEY: json.dumps(description)})


def load_variables(path: str | Path, model: Detector, *, allow_nonfinite: bool = False) -> dict[str, Any]:
    """Reads the variables of a model from a file of ``save_variables``.

    Args:
        path: the file. One of another origin is taken if its tensors have the names ``collection/module/.../leaf``.
        model: the detector, made as it was made for the file.
        allow_nonfinite: accept NaN and infinities.

    Returns:
        {"params": ..., ...}: the collections that ``model.init`` makes, as jax arrays. Floating point arrays have the
        dtype that the model stores (its ``param_dtype``), whatever the file's.

    Raises:
        FileNotFoundError: if there is no such file.
        flaxdet.convert.CheckpointError: if the file can't be read, or is one of ``flaxdet.save``.
        flaxdet.convert.StateDictError: with everything that is missing, unexpected, of a wrong shape or type, or not
            finite.
    """
    stored = read_stored(path)
    if stored is not None and stored["builder"] is not None:
        raise checkpoint.CheckpointError(
            f"{path}: expected a file of flaxdet.save_variables, found {stored['builder']} under torchvision's names: "
            "flaxdet.load reads it"
        )
    state, abstract = checkpoint.read(path), _abstract(model)
    arrays = {name: checkpoint.as_array(value) for name, value in state.items()}
    faults = _faults(arrays, abstract)
    leaves: dict[tuple[str, ...], np.ndarray] = {}
    if not any(faults.values()):
        with np.errstate(over="ignore"):  # an overflow is reported below
            leaves = {at: np.asarray(arrays["/".join(at)]).astype(leaf.dtype) for at, leaf in abstract.items()}
    if not allow_nonfinite:
        faults["not finite"] = [
            f"{'/'.join(at)}: {bad} of {leaf.size} values, as {leaf.dtype}"
            for at, leaf in leaves.items()
            if jnp.issubdtype(leaf.dtype, jnp.floating) and (bad := leaf.size - int(np.isfinite(leaf).sum()))
        ]
    if any(faults.values()):
        raise StateDictError(f"{path} does not fit {type(model).__name__}", faults)
    # the leaves are copies that nobody else holds, so device_put may keep their memory
    return traverse_util.unflatten_dict({at: jax.device_put(leaf) for at, leaf in leaves.items()})


def flat_arrays(variables: Mapping[str, Any], sep: str = "/") -> dict[str, np.ndarray]:
    """Variables as one dict of numpy arrays, by the names of collection, modules and leaf.

    Args:
        variables: nested dicts of arrays.
        sep: between the names.

    Returns:
        Arrays in C order, by name.
    """
    flat = traverse_util.flatten_dict(jax.device_get(dict(variables)), sep=sep)
    return {name: np.asarray(array, order="C") for name, array in flat.items()}


def _abstract(model: Detector) -> dict[tuple[str, ...], Any]:
    """Shapes and dtypes of all collections that the model's ``init`` makes, by path; nothing is computed."""
    return traverse_util.flatten_dict(jax.eval_shape(model.init, jax.random.key(0), example_batch()))


def _faults(arrays: Mapping[str, Any], abstract: Mapping[tuple[str, ...], Any]) -> dict[str, list[str]]:
    """The faults of arrays that should be the model's variables, by kind of fault."""
    expected = {"/".join(at): leaf for at, leaf in abstract.items()}
    faults: dict[str, list[str]] = {
        "missing": [name for name in expected if name not in arrays],
        "unexpected": [name for name in arrays if name not in expected],
        "wrong shape": [],
        "wrong type": [],
    }
    for name, wanted in expected.items():
        found = arrays.get(name)
        if found is None:
            continue
        dtype: Any = getattr(found, "dtype", type(found).__name__)
        floating = hasattr(found, "dtype") and all(jnp.issubdtype(t, jnp.floating) for t in (dtype, wanted.dtype))
        if dtype != wanted.dtype and not floating:
            faults["wrong type"].append(f"{name}: expected {wanted.dtype}, found {dtype}")
        elif tuple(found.shape) != tuple(wanted.shape):
            faults["wrong shape"].append(f"{name}: expected {list(wanted.shape)}, found {list(found.shape)}")
    return faults
