"""Pytrees as checkpoints store them: nested dicts of arrays, whatever the containers were.

So a stored state does not depend on classes of optax or flaxdet, and every leaf has a name for error messages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from flaxdet.files import checksums

Tree = TypeVar("Tree")
_MAX_NAMED = 3  # leaves that an error names for each kind of difference


def to_nested(tree: Any) -> dict[str, Any]:
    """A pytree as nested dicts: {"params": {...}, "opt_state": {"0": {"trace": ...}}, ...}.

    Args:
        tree: pytree of jax or numpy arrays. Arrays of size 0 are left out.

    Returns:
        The arrays in nested dicts whose keys are field names, dict keys and indices as text.

    Raises:
        TypeError: if a leaf is no array.
    """
    nested: dict[str, Any] = {}
    for parts, leaf in _leaves(tree):
        if leaf.size == 0:
            continue
        inner = nested
        for part in parts[:-1]:
            inner = inner.setdefault(part, {})
        inner[parts[-1]] = np.asarray(leaf) if isinstance(leaf, np.generic) else leaf
    return nested


def from_nested(nested: Any, template: Tree) -> Tree:
    """The pytree of nested dicts; the inverse of ``to_nested``.

    Args:
        nested: nested dicts of numpy arrays, of the structure of the template (``check_structure``).
        template: pytree of arrays or ``jax.ShapeDtypeStruct``.

    Returns:
        A pytree like the template. Where the template has a numpy array, the result has one too; other leaves have the
        sharding of the template's leaf. If that leaf has no sharding, or is not committed to a device, the result is on
        the default device, not committed.

    Raises:
        ValueError: if a leaf has 64 bits, and jax has no 64-bit types on.
    """
    placed = [_place(_lookup(nested, parts, leaf), parts, leaf) for parts, leaf in _leaves(template)]
    return jax.tree.unflatten(jax.tree.structure(template), placed)


def array_checksums(nested: Any) -> dict[str, str]:
    """The checksum of each array, by names such as "params/head/bias".

    Args:
        nested: nested dicts of arrays. If an array is divided over several processes, all must call this together.
    """
    return {"/".join(parts): checksums.of_array(_on_host(leaf)) for parts, leaf in _leaves(nested)}


def differing(nested: Any, stored: Mapping[str, str]) -> list[str]:
    """The names of arrays that differ from the arrays whose checksums are stored, and of missing ones."""
    found = array_checksums(nested)
    return sorted(name for name in {*found, *stored} if found.get(name) != stored.get(name))


def _on_host(leaf: Any) -> np.ndarray:
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)
    if leaf.is_fully_replicated:
        return np.asarray(leaf.addressable_data(0))  # not of the leaf itself, which would keep the copy
    if leaf.is_fully_addressable:
        return np.asarray(leaf)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def numpy_template(metadata: Any) -> Any:
    """A template that makes orbax restore arrays as numpy, with the shapes and dtypes of their metadata.

    ``from_nested`` then puts the arrays on devices. Orbax would do so in another thread, where the caller's
    ``jax.enable_x64`` has no effect, and would silently convert float64 to float32.
    """
    return jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), metadata)


def check_structure(metadata: Any, template: Any, what: str) -> None:
    """Compares the structure of a stored pytree with a template.

    Args:
        metadata: the stored pytree: nested dicts of objects with shape and dtype.
        template: the pytree to restore.
        what: the beginning of an error.

    Raises:
        ValueError: if a leaf is in only one of the pytrees, or differs in shape or dtype; names some of these leaves.
    """
    stored = {"/".join(parts): _kind(leaf) for parts, leaf in _leaves(metadata)}
    expected = {"/".join(parts): _kind(leaf) for parts, leaf in _leaves(template) if leaf.size}
    differing = [
        f"{name}: {stored[name]} stored, {expected[name]} here"
        for name in stored
        if name in expected and stored[name] != expected[name]
    ]
    lines = [
        *_some(differing, "differ"),
        *_some([f"{name}: {kind}" for name, kind in stored.items() if name not in expected], "are stored only"),
        *_some(
            [f"{name}: {kind}" for name, kind in expected.items() if name not in stored], "are expected, but not stored"
        ),
    ]
    if lines:
        raise ValueError(f"{what} is of another model, class count or optimiser than this run:\n" + "\n".join(lines))


def _some(lines: Sequence[str], kind: str) -> list[str]:
    if not lines:
        return []
    head = f"  {len(lines)} {kind}" + (", among them:" if len(lines) > _MAX_NAMED else ":")
    return [head, *(f"    {line}" for line in lines[:_MAX_NAMED])]


def _kind(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype).name}[{', '.join(map(str, leaf.shape))}]"


def _leaves(tree: Any) -> list[tuple[list[str], Any]]:
    leaves = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        parts = [jax.tree_util.keystr((key,), simple=True) for key in path]
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TypeError(f"{'/'.join(parts)} must be a jax or numpy array, got {type(leaf).__name__}")
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(f"{'/'.join(parts)} is a typed random key; store jax.random.key_data of it")
        leaves.append((parts, leaf))
    return leaves


def _lookup(nested: Any, parts: Sequence[str], leaf: Any) -> np.ndarray:
    if leaf.size == 0:
        return np.zeros(leaf.shape, leaf.dtype)
    for part in parts:
        nested = nested[part]
    return nested


def _place(host: np.ndarray, parts: Sequence[str], leaf: Any) -> Any:
    if isinstance(leaf, (np.ndarray, np.generic)):
        return host
    sharding = leaf.sharding
    if sharding is None or not getattr(leaf, "committed", True):
        array = jax.device_put(host)
    else:
        array = jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
    if array.dtype != host.dtype:
        raise ValueError(f"{'/'.join(parts)} is {host.dtype}, which jax has only with jax_enable_x64")
    return array
