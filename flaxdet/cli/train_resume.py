"""The checks of ``flaxdet train --resume``: the options, and the image files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flaxdet.cli.options import is_primary, say
from flaxdet.cli.train_options import flag, stored_value

if TYPE_CHECKING:
    from flaxdet.cli.train_options import TrainOptions
    from flaxdet.data import CocoDataset
    from flaxdet.train import Checkpoints


def check_options(options: TrainOptions, checkpoints: Checkpoints) -> int | None:
    """Compares the options with the options of the run. More epochs are allowed.

    Args:
        options: of this command.
        checkpoints: of the run, with the config of these options.

    Returns:
        The run's number of epochs, if it is less than the number in the options.

    Raises:
        ValueError: if another option differs; names each, and says what to do.
    """
    stored = checkpoints.stored_config
    if stored is None:
        return None
    if not isinstance(stored, dict):
        raise ValueError(f"{checkpoints.folder}: config.json is damaged: expected the options of the run")
    given: dict[str, Any] = options.config()
    # options that an older flaxdet did not have
    fields = (*dataclasses.fields(options), *dataclasses.fields(options.data))
    defaults = {field.name: stored_value(field.default) for field in fields}
    before = {name: stored.get(name, defaults[name]) for name in given}
    changed = {name: (before[name], given[name]) for name in given if before[name] != given[name]}
    changed |= {name: (stored[name], None) for name in stored if name not in given}
    epochs = changed.get("epochs")
    longer = epochs is not None and isinstance(epochs[0], int) and epochs[0] < options.epochs
    if longer:
        del changed["epochs"]
    if changed:
        raise ValueError(
            f"{checkpoints.folder}: holds a run with other options: {_differences(changed)}. To continue it, repeat "
            f"the run's values (more --epochs are allowed). For a new run that begins with its model: --weights "
            f"{options.out} --out ANOTHER"
        )
    return epochs[0] if epochs is not None and longer else None


def say_more_epochs(options: TrainOptions, before: int, step: int, rates: tuple[float, float]) -> None:
    """Prints how more epochs change the learning rate.

    Args:
        options: of this command.
        before: the run's number of epochs so far.
        step: the last step so far.
        rates: the learning rate of the next step by the old schedule and by the new one.
    """
    text = f"{before} epochs become {options.epochs}"
    if options.schedule != "constant":
        text += (
            f": the schedule '{options.schedule}' is stretched over all of them, and the learning rate after step "
            f"{step} is {rates[1]:.3g}, with {before} epochs it was {rates[0]:.3g}"
        )
    say(text)


def check_images(options: TrainOptions, checkpoints: Checkpoints, datasets: Mapping[str, CocoDataset | None]) -> None:
    """Notes the image files of a new run; compares the image files of a resumed run with the note.

    Args:
        options: of this command.
        checkpoints: of the run.
        datasets: the data sets by role, "train" and "val".

    Raises:
        ValueError: if the size or the content of a file has changed.
    """
    from flaxdet.files.checkpoint import replacing
    from flaxdet.train.data_files import NAME, compare_files, describe_files, with_mended

    if not is_primary():
        return
    path = checkpoints.folder / NAME
    resumed = checkpoints.last is not None
    if resumed and not path.is_file():
        say(f"{path}: is missing (an older flaxdet wrote none), so changes of the images since the start don't show")
        return
    found = describe_files(datasets, progress=options.progress)
    if not resumed:
        with replacing(path) as file:
            file.write(json.dumps(found).encode())
        return
    try:
        stored = json.loads(path.read_text())
        faults, dates = compare_files(stored, found)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: is damaged ({error}); without this file, images are not compared") from None
    if faults:
        raise ValueError(
            f"{checkpoints.folder}: the images have changed since the run began: {'; '.join(faults)}. To continue the "
            f"run, put them back. For a new run that begins with its model: --weights {options.out} --out ANOTHER"
        )
    for text in dates:
        say(f"warning: {text}")
    if stored != (noted := with_mended(stored, found)):
        with replacing(path) as file:
            file.write(json.dumps(noted).encode())


def note_broken_image(checkpoints: Checkpoints, datasets: Mapping[str, CocoDataset | None], error: Exception) -> None:
    """If an error is about an image, lets the image change before the run is resumed.

    Args:
        checkpoints: of the run.
        datasets: as for ``check_images``.
        error: why the run stopped.
    """
    from flaxdet.files.checkpoint import replacing
    from flaxdet.train.data_files import NAME, without_broken

    path = checkpoints.folder / NAME
    if is_primary() and path.is_file():
        stored = json.loads(path.read_text())
        noted = without_broken(stored, datasets, str(error))
        if noted != stored:
            with replacing(path) as file:
                file.write(json.dumps(noted).encode())


def _differences(changed: Mapping[str, tuple[Any, Any]]) -> str:
    def shown(name: str, old: Any, new: Any) -> str:
        if str(old).startswith("sha256 ") and str(new).startswith("sha256 "):
            return f"the annotations of {flag(name)} changed"
        return f"{flag(name)} was {_value(old)}, is {_value(new)}"

    return "; ".join(shown(name, *values) for name, values in sorted(changed.items()))


def _value(value: Any) -> str:
    if str(value).startswith("sha256 "):
        return "given"
    return "not given" if value is None else str(value)
