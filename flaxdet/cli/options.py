"""Shared by several commands: options, checks of options, loading models, class names, output files."""

from __future__ import annotations

import difflib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from flaxdet import registry
from flaxdet.files import schema
from flaxdet.files.messages import one_line
from flaxdet.files.opening import HEAD, foreign_kind, open_regular

if TYPE_CHECKING:
    ModelName = str
else:
    ModelName = Literal[tuple(registry.names())]  # tyro lists the names and refuses others
Quiet = tyro.conf.arg(help_behavior_hint="")  # the help text states the default in words
Size = Annotated[int | None, Quiet]
Key = Annotated[str | None, Quiet, tyro.conf.arg(metavar="NAME")]
_MOST_LABELS = 100_000  # category ids above this can't be labels
_MOST_SHOWN = 5


def check_sizes(min_size: int | None, max_size: int | None) -> None:
    """Raises ValueError for sizes that no image could be resized to."""
    for name, size in (("--min-size", min_size), ("--max-size", max_size)):
        if size is not None and size < 1:
            raise ValueError(f"{name} should be at least 1 pixel, got {size}")


def check_font(font: Path | None) -> None:
    """Raises ValueError for a file that is no font."""
    if font is not None:
        from flaxdet.results.fonts import load_font

        load_font(font, 12)


def make_folder(path: Path) -> None:
    """Creates a folder if it does not exist. Checks, before any work is done, that files can be written to the folder.

    Raises:
        OSError: if files can't be written; the message names the folder.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OSError(f"{path}: can't be written to ({error.strerror}), expected a folder for the results") from None


def free_name(stem: str, suffix: str, taken: set[str]) -> str:
    """A file name that is not in ``taken``, with a number if necessary. Adds the name to ``taken``."""
    name, number = f"{stem}{suffix}", 1
    while name.casefold() in taken:  # on some file systems a.jpg and A.JPG are the same file
        number += 1
        name = f"{stem}-{number}{suffix}"
    taken.add(name.casefold())
    return name


def is_file_name(weights: str) -> bool:
    """Whether the value of ``--weights`` is a file and not the name of published weights."""
    if weights.partition(".")[0].endswith("_Weights"):  # ENUM.MEMBER
        return False
    path = Path(weights)
    return path.suffix != "" or path.exists() or os.sep in weights


def model_file(weights: str) -> str:
    """The file that ``--weights`` names: of a folder, the model in it.

    Args:
        weights: a file, or the folder of a run of ``flaxdet train`` or of ``flaxdet.save_pretrained``.

    Returns:
        The argument; for a folder, model.safetensors in the folder, or if a run stopped before there was a best model,
        last.safetensors.

    Raises:
        ValueError: for a folder without such a file.
    """
    folder = Path(weights)
    if not folder.is_dir():
        return weights
    for name in ("model.safetensors", "last.safetensors"):
        if (folder / name).is_file():
            return str(folder / name)
    if (folder / "checkpoints").is_dir():
        raise ValueError(
            f"{weights}: this run has no model yet; the first checkpoint comes with one (--save-every STEPS)"
        )
    raise ValueError(
        f"{weights}: is a folder without model.safetensors; expected a file, or the folder of a run of flaxdet train"
    )


def published(weights: str, model: str | None = None) -> tuple[str, Any]:
    """The builder and the weights for a name of published weights.

    Args:
        weights: "COCO_V1", or with the name of the enum, "FCOS_ResNet50_FPN_Weights.COCO_V1".
        model: name of the builder; default: the builder of the enum, else the default architecture.

    Returns:
        The name of the builder, and the member of the builder's enum.

    Raises:
        ValueError: if there are no such weights, or the weights belong to another model.
    """
    enums: dict[str, Any] = {each.name: each.weights for each in registry.architectures() if each.weights is not None}
    prefix, _, name = weights.rpartition(".")
    builder: Any = next((key for key, enum in enums.items() if enum.__name__ == prefix), None)
    if prefix and builder is None:
        known = " or ".join(enum.__name__ for enum in enums.values())
        raise ValueError(f"weights {weights!r}: expected a file, or a member of {known}")
    if builder and model and builder != model:
        raise ValueError(f"weights {weights!r}: expected weights of {model}, these are of {builder}")
    builder = builder or model or registry.names()[0]
    if name not in enums[builder].__members__:
        names = ", ".join(enums[builder].__members__)
        raise ValueError(f"weights {weights!r}: neither a file nor published weights of {builder}, which are {names}")
    return builder, enums[builder][name]


def read_weights(weights: str, key: str | None = None) -> Any:
    """The content of a file of weights; tells on stderr which tensors beside the detector are left out.

    Args:
        weights: the file.
        key: as for ``flaxdet.load``.

    Returns:
        A ``ModelFile``.

    Raises:
        ValueError, OSError: as ``flaxdet.load``.
    """
    from flaxdet.files.models import read_model

    file = read_model(weights, key=key)
    if file.left_out:
        some = ", ".join(file.left_out[:_MOST_SHOWN])
        more = f" and {len(file.left_out) - _MOST_SHOWN} more" if len(file.left_out) > _MOST_SHOWN else ""
        print(f"{weights}: reads the tensors under {file.prefix}, leaves out {one_line(some)}{more}", file=sys.stderr)
    return file


def load_model(
    model: ModelName | None, weights: str, *, key: str | None = None, progress: bool = True, **options: Any
) -> tuple[Any, Any, list[str] | None]:
    """The model, its variables and the names of its labels.

    Args:
        model: name of the builder, or None. A file states the builder, which must then be this one.
        weights: name of published weights, a file, or the folder of a run.
        key: which state_dict of the file, as for ``flaxdet.load``.
        progress: shows a progress bar while downloading.
        **options: options of the model; options with the value None are ignored. ``threshold`` is the score threshold
            of any model.

    Returns:
        Model, variables, and the names of the labels (None if the file holds no names).

    Raises:
        ValueError: if the file holds another model than ``model``, or there are no published weights of this name.
        OSError: if the file can't be read.
    """
    import flaxdet
    from flaxdet.files import models as files

    options = {name: value for name, value in options.items() if value is not None}
    threshold = options.pop("threshold", None)
    member, file = None, None
    if is_file_name(weights):
        weights = model_file(weights)
        file = read_weights(weights, key)
        builder = file.builder
        if model not in (None, builder):
            raise ValueError(f"{weights}: expected weights of {model}, found {builder}")
    else:
        check_key(weights, key)
        builder, member = published(weights, model)
        if "frozen_bn" in options:  # the builders accept no frozen_bn
            file = files.read_model(member.get_path(progress=progress))
    if threshold is not None:
        options[registry.get(builder).kind.score_field] = threshold
    if file is None:
        detector, variables = getattr(flaxdet, builder)(weights=member, progress=progress, **options)
    else:
        detector, variables = files.make(file, **({} if member is None else member.options) | options)
    if member is not None:
        return detector, variables, list(member.meta["categories"])
    return detector, variables, None if file is None else file.categories


def check_key(weights: str, key: str | None) -> None:
    """Raises ValueError for a ``--key`` of published weights."""
    if key is not None:
        raise ValueError(f"--key {key}: chooses a state_dict of a file, and {weights} names published weights")


def load_with_names(command: Any, given: list[str] | None) -> tuple[Any, Any, list[str] | None]:
    """The model, its variables and the names of its labels, by the options of a command.

    Args:
        command: a command with the options model, weights, key, categories, threshold, min_size, max_size, dtype and
            progress.
        given: the names in the file --categories (``given_names``), or None.

    Returns:
        Model, variables, and names: ``given``, else the names that the weights hold, else None.

    Raises:
        ValueError: as ``load_model``, or if ``given`` doesn't have one name per label.
        OSError: if a file can't be read.
    """
    import jax.numpy as jnp

    model, variables, stored_names = load_model(
        command.model,
        command.weights,
        key=command.key,
        progress=command.progress,
        threshold=command.threshold,
        min_size=command.min_size,
        max_size=command.max_size,
        dtype=jnp.dtype(command.dtype).type,
    )
    if given is not None:
        check_categories(command.categories, given, model.num_classes)
    return model, variables, given or stored_names


def given_names(path: Path | None) -> list[str] | None:
    """The names in the file --categories; None without --categories."""
    return None if path is None else read_categories(path)


def check_threshold(threshold: float | None) -> None:
    """Raises ValueError for a threshold outside [0, 1]."""
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"--threshold should be from 0 to 1, got {threshold}")


def read_categories(path: Path) -> list[str]:
    """Names of labels from a file, label 0 (the background) first.

    Args:
        path: a JSON list of strings, COCO annotations (category ids are the labels), or text with one name per line.

    Raises:
        OSError: if the file can't be read.
        ValueError: if the file has none of these formats.
    """
    expected = 'expected a JSON list of names, COCO annotations with "categories", or text with one name per line'
    try:
        with open_regular(path) as file:
            content = file.read()
    except OSError as error:
        raise OSError(f"{path}: cannot be read ({error.strerror}), {expected}") from None
    if (kind := foreign_kind(content[:HEAD])) is not None:
        raise ValueError(f"{path}: {expected}; it {kind}")
    try:
        text = content.decode("utf-8-sig")
    except ValueError:
        raise ValueError(f"{path}: {expected}, found something that is no text") from None
    if path.suffix.lower() == ".json":
        try:
            names = _names_in_json(text)
            schema.check_names(names, "the names")
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(one_line(f"{path}: {expected}, found something else ({error})")) from None
        return names
    names = [line.strip() for line in text.strip().splitlines()]
    if not names:
        raise ValueError(f"{path}: {expected}, found an empty file")
    try:
        schema.check_names(names, "the names")
    except ValueError as error:
        raise ValueError(one_line(f"{path}: {expected}; {error}")) from None
    return names


def _names_in_json(text: str) -> list[str]:
    content = json.loads(text)  # annotations may be larger than ``json_text`` allows
    if isinstance(content, dict):
        names_by_id = {int(row["id"]): str(row["name"]) for row in content["categories"]}
        first, last = min(names_by_id), max(names_by_id)
        if first < 0 or last > _MOST_LABELS:
            raise ValueError(f"ids from {first} to {last}")
        return [names_by_id.get(label, "N/A" if label else "__background__") for label in range(last + 1)]
    if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"a JSON {type(content).__name__}")
    return content


def check_categories(path: Path, names: Sequence[str], num_classes: int) -> None:
    """Raises ValueError unless there is one name per label. A missing background would shift all names by one."""
    if len(names) != num_classes:
        raise ValueError(
            f"{path}: expected {num_classes} names, one for each label of the model, label 0 (the background) first; "
            f"found {len(names)}"
        )


def labels_of(names: Sequence[str], categories: Sequence[str] | None, num_classes: int) -> set[int] | None:
    """The labels of classes that are given by name or by number; ``None`` for no classes.

    Raises:
        ValueError: for an unknown name (the message suggests the nearest names), or a number that is no label of the
            model.
    """
    if not names:
        return None
    label_by_name = {category.lower(): label for label, category in enumerate(categories or ()) if category != "N/A"}
    labels = set()
    for name in names:
        if name.lower() in label_by_name:
            labels.add(label_by_name[name.lower()])
        elif name.isdecimal():
            if int(name) >= num_classes:
                raise ValueError(f"class {name}: expected a label from 0 to {num_classes - 1}")
            labels.add(int(name))
        elif categories is None:
            raise ValueError(
                f"class {name!r}: these weights have no class names; give the label's number, or --categories FILE"
            )
        else:
            near = difflib.get_close_matches(name.lower(), label_by_name, n=3)
            written = [category for category in categories if category.lower() in (near or list(label_by_name)[1:])]
            hint = f"did you mean {' or '.join(written)}?" if near else f"it knows {', '.join(written)}"
            raise ValueError(f"class {name!r}: the model knows no such class; {hint}")
    return labels


def is_primary() -> bool:
    """Whether this is the process that writes."""
    import jax

    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints a line on stderr, in the process that writes."""
    if is_primary():
        print(text, file=sys.stderr, flush=True)
