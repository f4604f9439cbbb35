"""Models of the builders in files: ``load`` and ``save``. ``variables.py`` stores the variables of any other model.

Every file holds a state_dict with torchvision's keys and layouts. Our own .safetensors also describe the model:
builder, options and names of the labels, as JSON in the metadata, with the number of this format and the flaxdet that
wrote it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flaxdet import registry
from flaxdet._version import __version__
from flaxdet.convert.identify import arguments, find_or_raise
from flaxdet.convert.state_dict import from_torchvision, tensors_of, to_torchvision
from flaxdet.files import checkpoint, json_text, schema
from flaxdet.files.unwrap import clean_key
from flaxdet.models.detector import Detector
from flaxdet.models.labels import num_classes
from flaxdet.models.roi_pool import MultiScaleRoIAlign
from flaxdet.ops import AnchorGenerator

METADATA_KEY = "flaxdet"
# Of the description. It grows when an older flaxdet would misread a file, not when one only learns to write more.
FORMAT = 1
_OWN_WRITER = "flaxdet.save_variables stores the variables of any model"
# Small frozen dataclasses among the options, which the description can hold.
_STORED_PARTS = {"AnchorGenerator": AnchorGenerator, "MultiScaleRoIAlign": MultiScaleRoIAlign}


def load(path: str | Path, **overrides: Any) -> tuple[Detector, dict[str, Any]]:
    """Reads a model from a file: our own .safetensors, or torchvision's .pth or .safetensors.

    Our own files carry builder, options and category names. Of torchvision's, the architecture, the number of
    classes and the kind of BatchNorm are told from keys and shapes; what a state_dict does not hold, such as
    ``min_size`` or thresholds, has torchvision's default unless given here.

    A detector that is a part of another module, as in a checkpoint of Lightning, is found under any prefix of the keys;
    tensors beside it (of metrics, of a loss) are left out.

    Args:
        path: the file.
        **overrides: ``key``, which state_dict if the file holds several: its name in the file, such as "model_ema", or
            a prefix of keys, such as "teacher". And options of the builder that replace the file's or the default:
            fields of the model's class, ``dtype``, ``param_dtype``, ``precision``, ``trainable_backbone_layers``,
            ``freeze_bn``, ``remat``, ``frozen_bn``, and ``norm_eps``, which BatchNorm adds to the variance: 0 for a
            ``.pth`` of weights that torchvision takes with ``overwrite_eps``. The dtype is float32 unless given here,
            whatever the dtype of the tensors in the file.

    Returns:
        The model and its variables.

    Raises:
        FileNotFoundError: if there is no such file.
        flaxdet.convert.CheckpointError: for a folder (see ``load_pretrained``), a file of another architecture, of
            ``save_variables``, or of a newer flaxdet's format.
        flaxdet.convert.StateDictError: if its keys, shapes or values don't fit.
        TypeError: for an unknown override.
    """
    return make(read_model(path, key=overrides.pop("key", None)), **overrides)


class ModelFile(NamedTuple):
    """The content of a file with a detector.

    Attributes:
        path: the file, for messages.
        builder: name of the model's builder.
        options: for ``registry.make_model``, as far as the file tells.
        categories: name of each label, or ``None``.
        state_dict: tensors by torchvision's key.
        prefix: what the keys of the detector begin with in the file's state_dict, where other tensors are beside it.
        left_out: the keys beside the detector.
    """

    path: str
    builder: str
    options: dict[str, Any]
    categories: list[str] | None
    state_dict: dict[str, Any]
    prefix: str = ""
    left_out: tuple[str, ...] = ()


def read_model(path: str | Path, *, key: str | None = None) -> ModelFile:
    """Reads the file of a model for ``load``; the tensors are read once.

    Args:
        path: the file.
        key: as for ``load``.

    Returns:
        The content of the file.

    Raises:
        FileNotFoundError, flaxdet.convert.CheckpointError: as ``load``.
    """
    if Path(path).is_dir():
        raise checkpoint.CheckpointFileError(
            f"{path}: is a folder; give the file in it, or use flaxdet.load_pretrained for what save_pretrained wrote"
        )
    stored = read_stored(path)
    if stored is not None and stored["builder"] is None:
        raise checkpoint.CheckpointError(f"{path}: holds variables alone, for flaxdet.load_variables(path, model)")
    state_dict = checkpoint.read(path, key=key)
    prefix, left_out = "", ()
    if stored is not None and _is_told_by_name(stored["builder"]):
        builder, options = stored["builder"], {}
    else:
        found = find_or_raise(state_dict, source=str(path))
        builder, options = arguments(found)
        if prefix := found.prefix:
            left_out = tuple(key for key in state_dict if not clean_key(key).startswith(prefix))
            state_dict = found.state_dict
    if stored is not None:
        if stored["builder"] != builder:
            raise checkpoint.CheckpointError(
                f"{path}: its metadata says {stored['builder']}, its keys say {builder}: the file was tampered with"
            )
        options |= stored["options"]
        try:
            registry.make_model(builder, **options)
        except (TypeError, ValueError, OverflowError) as error:
            raise checkpoint.error_of(path, f"the options in its metadata make no model: {error}") from error
        categories = stored["categories"]
        if categories is not None and len(categories) != options["num_classes"]:
            raise checkpoint.error_of(
                path, f"its metadata has {len(categories)} names of categories for {options['num_classes']} classes"
            )
    return ModelFile(
        str(path), builder, options, None if stored is None else stored["categories"], state_dict, prefix, left_out
    )


def _is_told_by_name(builder: str) -> bool:
    """Whether the keys of such an architecture tell nothing, so that the name in the metadata has to do."""
    return builder in registry.names(private=True) and registry.get(builder).keys is None


def make(file: ModelFile, **overrides: Any) -> tuple[Detector, dict[str, Any]]:
    """Makes the model of a file that ``read_model`` has read.

    Args:
        file: the content.
        **overrides: as for ``load``.

    Returns:
        The model and its variables.

    Raises:
        StateDictError, TypeError: as ``load``.
    """
    model = registry.make_model(file.builder, **{**file.options, **overrides})
    return model, from_torchvision(model, file.state_dict, source=file.path)


def save(
    path: str | Path, model: Detector, variables: dict[str, Any], *, categories: Sequence[str] | None = None
) -> None:
    """Writes a model to a file that ``load`` and torchvision can read.

    The tensors have torchvision's keys and layouts in both formats. ``.safetensors`` also carries the builder, its
    options and category names, and holds models that a builder makes. ``.pth``, which ``torch.load`` and
    ``load_state_dict(strict=True)`` take, holds any model whose parts torchvision has; where no builder makes it,
    ``flaxdet.convert.from_torchvision(model, path)`` reads it. ``flaxdet.save_variables`` stores any other model's.

    Args:
        path: the target, ending in .safetensors or .pth; replaced at once, or not at all.
        model: a model that a builder makes, or with .pth of torchvision's parts.
        variables: its variables.
        categories: name of each label, label 0 first.

    Raises:
        ValueError: for another ending, a number of categories that isn't num_classes, or a model that the format
            can't hold.
        OSError: if the file can't be written; nothing is left behind then.
    """
    path = Path(path)
    check_categories(path, model, categories)
    if path.suffix == ".pth":
        checkpoint.write_pth(path, to_torchvision(model, variables))
    elif path.suffix == ".safetensors":
        metadata = {METADATA_KEY: json.dumps(describe(model, categories))}
        checkpoint.write_safetensors(path, tensors_of(model, variables), metadata)
    else:
        raise ValueError(f"{path}: expected a name ending in .safetensors or .pth")


def load_categories(path: str | Path) -> list[str] | None:
    """Reads the names of the labels from a file.

    Args:
        path: a file of ``save``, or any other.

    Returns:
        The names, label 0 first; ``None`` where the file has none.

    Raises:
        flaxdet.convert.CheckpointError: if the file's description of its model is damaged, or of a newer format.
    """
    stored = read_stored(path)
    return None if stored is None else stored["categories"]


def check_categories(path: str | Path, model: Detector, categories: Sequence[str] | None) -> None:
    """Raises ValueError, naming the file to be written, unless ``categories`` name every label that the model tells."""
    if isinstance(categories, str):
        raise ValueError(f"{path}: categories should be a list with the name of every label, got one {categories!r}")
    if categories is not None:
        schema.check_names(categories, f"{path}: categories")
    count = num_classes(model)
    if categories is not None and count is not None and len(categories) != count:
        raise ValueError(
            f"{path}: categories should name every label, background included: expected {count} names, "
            f"got {len(categories)}"
        )


def read_stored(path: str | Path) -> dict[str, Any] | None:
    """The description in a file of ours, as ``read_description`` gives it; ``None`` for any other file."""
    metadata = checkpoint.read_metadata(path)
    if METADATA_KEY not in metadata:
        return None
    return read_description(f"{path}", metadata[METADATA_KEY], "flaxdet's description of the model in its metadata")


def read_description(path: str, text: str | bytes, expected: str) -> dict[str, Any]:
    """Reads what ``describe`` gives as JSON.

    Args:
        path: the file that holds it, for messages.
        text: the JSON.
        expected: a description of the expected text, for messages.

    Returns:
        {"builder": name, "options": {name: value}, "categories": list of names or None}.

    Raises:
        flaxdet.convert.CheckpointError: if it is anything else, or of a newer format.
    """
    try:
        stored = json_text.loads(text)
        schema.record({})(stored, "")
        number = stored.get("format", 1)  # files of before the number was written are of the first format
        if type(number) is not int or number < 1:
            raise ValueError(f"format {number!r}")
        if number > FORMAT:
            writer = stored.get("flaxdet", "of an unknown version")
            raise checkpoint.error_of(
                path,
                f"was written by flaxdet {writer} in format {number}, and this flaxdet {__version__} reads "
                f"format {FORMAT} at most: install a newer flaxdet",
            )
        schema.DESCRIPTION(stored, "")
        return {
            "builder": stored["builder"],
            "options": {name: _unstore(value) for name, value in stored["options"].items()},
            "categories": stored["categories"],
        }
    except checkpoint.CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise checkpoint.error_of(path, f"expected {expected}, got something unreadable ({error})") from None


def describe(model: Detector, categories: Sequence[str] | None) -> dict[str, Any]:
    """Builder and options from which ``registry.make_model`` makes this very model again, ready for JSON.

    Args:
        model: a model that a builder makes.
        categories: name of each label, label 0 first, or ``None``.

    Returns:
        {"format": 1, "flaxdet": version, "builder": name, "options": {name: value}, "categories": names or None}.

    Raises:
        ValueError: for a model that no builder makes.
    """
    try:
        architecture, options = registry.describe(model)
    except ValueError as error:
        message = f"a .safetensors file of flaxdet.save holds a model of a builder: {error}; {_OWN_WRITER}"
        raise ValueError(message) from None
    return {
        "format": FORMAT,
        "flaxdet": __version__,
        "builder": architecture.name,
        "options": {name: _store(value) for name, value in options.items()},
        "categories": None if categories is None else list(categories),
    }


def _store(value: Any) -> Any:
    if type(value).__name__ in _STORED_PARTS:
        return {"type": type(value).__name__, **dataclasses.asdict(value)}
    return value


def _unstore(value: Any) -> Any:
    if isinstance(value, dict):
        return _STORED_PARTS[value["type"]](**{name: field for name, field in value.items() if name != "type"})
    return value
