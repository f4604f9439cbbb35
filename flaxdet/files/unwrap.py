"""Finds the state_dict in the content of a checkpoint file, and takes wrappers' prefixes off the keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_WRAPPERS = ("model", "state_dict", "model_state_dict")
_EMA = "model_ema"
# Components that wrappers of modules add to keys, at any depth: torch.compile, FSDP, activation checkpointing.
_COMPONENTS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
DATA_PARALLEL = "module."
# Prefixes of all keys: DataParallel, and the names that people give to a detector inside another module (Lightning).
_PREFIXES = (DATA_PARALLEL, "model.", "detector.", "net.")
_COUNTER = "n_averaged"  # torch.optim.swa_utils.AveragedModel counts its updates
_DEPTH = 8  # of wrappers around a state_dict
_SHOWN = 8


def unwrap(root: Any, *, ema: bool = False, key: str | None = None) -> dict[str, Any]:
    """The state_dict in the content of a checkpoint file.

    Args:
        root: a state_dict; or a dict that holds one state_dict, under "model", "state_dict" or "model_state_dict" if it
            holds several.
        ema: as ``key="model_ema"``.
        key: which state_dict: its name in the file, with a dot between names where dicts are nested; or else a prefix
            of keys in the state_dict that would be returned without ``key``, such as "teacher".

    Returns:
        The state_dict. The prefixes "module.", "model.", "detector." and "net." are removed if every key begins with
        them, alone or nested; "_orig_mod." and "_fsdp_wrapped_module." are removed from every key.

    Raises:
        ValueError: if there is no state_dict, or several to choose from.
    """
    key = _EMA if ema else key
    if key is None:
        return _plain(_descend(root))
    _check_mapping(root)
    if (chosen := next(_under(root, key), None)) is not None:
        return _plain(_descend(chosen))
    try:
        state = _tensors_checked(_descend(root))
    except ValueError:
        state = {}
    for names in (clean_keys(state), state):
        if chosen := {
            name.removeprefix(f"{key}."): value for name, value in names.items() if name.startswith(f"{key}.")
        }:
            return _plain(chosen)
    raise ValueError(f'holds no state_dict under "{key}"; it holds {_choices(root, state)}')


def clean_key(key: str) -> str:
    """The key without the components of wrappers: "model._orig_mod.fc.weight" is "model.fc.weight"."""
    for component in _COMPONENTS:
        if component in key:
            parts = key.split(".")
            key = ".".join(part for part in parts[:-1] if f"{part}." != component) + "." + parts[-1]
    return key.removeprefix(".")


def clean_keys(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state_dict by ``clean_key`` of its keys; unchanged if two keys would become one."""
    cleaned = {clean_key(key): value for key, value in state.items()}
    return cleaned if len(cleaned) == len(state) else dict(state)


def is_tensor(value: Any) -> bool:
    """Whether a value of a state_dict is a tensor or an array."""
    return hasattr(value, "shape")


def _plain(state: Any) -> dict[str, Any]:
    state = clean_keys(_tensors_checked(state))
    while True:
        averaged = all(name.startswith(DATA_PARALLEL) for name in state if name != _COUNTER)
        if averaged and len(state) > 1:
            state.pop(_COUNTER, None)
        prefix = next((each for each in _PREFIXES if all(name.startswith(each) for name in state)), None)
        if prefix is None:
            return state
        state = {name.removeprefix(prefix): value for name, value in state.items()}


def _tensors_checked(state: Any) -> dict[str, Any]:
    wrong = [key for key in state if not isinstance(key, str)]
    if wrong:
        raise ValueError(f"holds a dict with keys of type {type(wrong[0]).__name__}, not a state_dict")
    if not any(map(is_tensor, state.values())):
        for name, value in state.items():
            if getattr(value, "is_module", False) is True:
                raise ValueError(_module_message(value, f' under "{name}"'))
        shown = ", ".join(sorted(state)[:5]) or "none"
        raise ValueError(f"holds a dict without tensors (keys: {shown}), not a state_dict")
    return dict(state)


def _check_mapping(root: Any) -> None:
    if isinstance(root, Mapping):
        return
    if getattr(root, "is_module", False) is True:
        raise ValueError(_module_message(root, ""))
    origin = getattr(root, "origin", type(root).__name__)
    raise ValueError(f"holds an object of type {origin}, not a state_dict: save model.state_dict() instead")


def _module_message(module: Any, where: str) -> str:
    return (
        f"holds a pickled module, {module.origin}{where}, not a state_dict: load it by torch.load where the code "
        "of the module is, and save model.state_dict() instead"
    )


def _descend(root: Any) -> Mapping[Any, Any]:
    """The innermost dict that wrappers lead to."""
    for _ in range(_DEPTH):
        _check_mapping(root)
        inner = [name for name, value in _mappings(root) if name in _WRAPPERS]
        inner.sort(key=_WRAPPERS.index)
        if not inner and not any(map(is_tensor, root.values())):
            inner = _names_with_tensors(root)
            if len(inner) > 1:
                raise ValueError(
                    f"holds several state_dicts: choose one of {_listed(inner)} by key= (flaxdet convert --key NAME)"
                )
        if not inner:
            break
        root = root[inner[0]]
    return root


def _mappings(root: Mapping[Any, Any]) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    for name, value in root.items():
        if isinstance(name, str) and isinstance(value, Mapping):
            yield name, value


def _names_with_tensors(root: Mapping[Any, Any]) -> list[str]:
    """The names of the dicts that hold tensors; one dict under many names is looked through once."""
    holds: dict[int, bool] = {}
    for _, value in _mappings(root):
        if id(value) not in holds:
            holds[id(value)] = any(map(is_tensor, value.values()))
    return [name for name, value in _mappings(root) if holds[id(value)]]


def _under(root: Mapping[Any, Any], path: str, depth: int = _DEPTH) -> Iterator[Any]:
    """The dicts, or else modules, that the names of a dotted path lead to; a name may have dots itself."""
    for name, value in root.items():
        if not isinstance(name, str) or not depth:
            continue
        if name == path and (isinstance(value, Mapping) or getattr(value, "is_module", False) is True):
            yield value
        elif path.startswith(f"{name}.") and isinstance(value, Mapping):
            yield from _under(value, path[len(name) + 1 :], depth - 1)


def _choices(root: Mapping[Any, Any], state: Mapping[str, Any]) -> str:
    """The possible values of ``key``, for an error."""
    named = _names_with_tensors(root)
    prefixes = {name.partition(".")[0] for name, value in state.items() if is_tensor(value) and "." in name}
    return _listed([*named, *sorted(prefixes - {*named})])


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(f'"{name[:80]}"' for name in names[:_SHOWN]) + more or "no tensors by name"
