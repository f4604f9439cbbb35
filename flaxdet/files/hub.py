"""A model as a folder that the Hugging Face Hub takes as it is: ``save_pretrained`` and ``load_pretrained``."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flaxdet import registry
from flaxdet.convert.state_dict import tensors_of
from flaxdet.files import checkpoint, json_text
from flaxdet.files import models as files
from flaxdet.models.detector import Detector

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"

_EXPECTED = "the config.json of flaxdet.save_pretrained"
_CARD = """\
---
library_name: flaxdet
pipeline_tag: object-detection
tags:
- object-detection
- flaxdet
- jax
- flax
---

# {builder}

{title}, for {count} labels (the background included), in JAX/Flax, written by flaxdet
{version}. `model.safetensors` has torchvision's keys and layouts, so that torchvision's `{builder}` takes it too.

```python
import flaxdet
import numpy as np
from PIL import Image

folder = "."  # where this repository lies: hf download REPOSITORY --local-dir FOLDER
model, variables = flaxdet.load_pretrained(folder)
names = flaxdet.load_categories(folder + "/model.safetensors")  # None if the labels have no names
image = np.asarray(Image.open("photo.jpg").convert("RGB"))
(found,) = flaxdet.predict(model, variables, [image])  # boxes xyxy in pixels of the image, scores, labels
```

Labels, from 0:

    {labels}
"""


def save_pretrained(
    folder: str | Path, model: Detector, variables: dict[str, Any], *, categories: Sequence[str] | None = None
) -> None:
    """Writes a model as a folder that the Hugging Face Hub takes as it is (``hf upload REPOSITORY FOLDER``).

    It holds ``model.safetensors``, the file that ``flaxdet.save`` writes; ``config.json``, the builder, its options,
    the names of the labels and the versions of flaxdet and of the format; and ``README.md``, a model card, unless there
    is one already, which is kept. Other files are left alone.

    All is written under other names first, so that a failure changes nothing. Only a kill between the renames can leave
    new files beside old ones; a mixture that differs in anything but the card is refused by ``load_pretrained``.

    Args:
        folder: created if need be, in a folder that exists.
        model: a model that a builder makes.
        variables: its variables.
        categories: name of each label, label 0 first.

    Raises:
        ValueError: for a number of categories that isn't num_classes, or a model that no builder makes.
        flaxdet.convert.StateDictError: (a ValueError) if the variables are not the model's.
        OSError: if the folder or a file can't be written.
    """
    folder = Path(folder)
    files.check_categories(folder, model, categories)
    description = files.describe(model, categories)
    state_dict = tensors_of(model, variables)
    texts = {CONFIG: json.dumps(description, indent=2, ensure_ascii=False) + "\n"}
    if not (folder / CARD).exists():
        texts[CARD] = _card(description)
    created = _make_folder(folder)
    try:
        # each file takes its place when its block ends: the weights first, then the texts
        with contextlib.ExitStack() as stack:
            for name, text in texts.items():
                stack.enter_context(checkpoint.replacing(folder / name)).write(text.encode())
            metadata = {files.METADATA_KEY: json.dumps(description)}
            checkpoint.write_safetensors(folder / WEIGHTS, state_dict, metadata)
    except BaseException:
        if created:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def load_pretrained(folder: str | Path, **overrides: Any) -> tuple[Detector, dict[str, Any]]:
    """Reads a model from a folder that ``save_pretrained`` wrote, on this machine.

    The names of its labels are ``flaxdet.load_categories(folder / "model.safetensors")``.

    Args:
        folder: with ``model.safetensors`` and ``config.json``; one from the Hub after ``hf download REPOSITORY
            --local-dir FOLDER``.
        **overrides: options that replace the stored ones, as in ``flaxdet.load``.

    Returns:
        The model and its variables.

    Raises:
        FileNotFoundError: if the folder or one of the two files is missing.
        flaxdet.convert.CheckpointError: if one of them is damaged or of a newer format, or they describe two models.
        TypeError: for an unknown override.
    """
    config, weights = Path(folder) / CONFIG, Path(folder) / WEIGHTS
    try:
        text = json_text.read_bytes(config)
    except ValueError as error:
        raise checkpoint.error_of(config, f"expected {_EXPECTED}; {error}") from None
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        kind = checkpoint.CheckpointNotFoundError if missing else checkpoint.CheckpointFileError
        wanted = "expected a folder that flaxdet.save_pretrained wrote (flaxdet.load reads single files)"
        raise kind(f"{config}: cannot be read: {error.strerror or error}; {wanted}") from error
    described = files.read_description(f"{config}", text, _EXPECTED)
    loaded = files.load(weights, **overrides)
    stored = files.read_stored(weights) or {}
    differing = ", ".join(name for name in described if described[name] != stored.get(name))
    if differing:
        raise checkpoint.CheckpointError(
            f"{config}: describes another model than {WEIGHTS} beside it ({differing} differ): one of the two was "
            "replaced or edited. flaxdet.load reads the .safetensors alone, and both take options: min_size=640"
        )
    return loaded


def _make_folder(folder: Path) -> bool:
    """Creates the folder; False if it was there."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False  # if it is no folder, writing into it says so
    except OSError as error:
        raise checkpoint.CheckpointFileError(f"{folder}: cannot be made: {error.strerror or error}") from error
    return True


def _card(description: dict[str, Any]) -> str:
    builder, options = description["builder"], description["options"]
    names = description["categories"]
    return _CARD.format(
        builder=builder,
        title=registry.get(builder).title,
        count=options["num_classes"],
        version=description["flaxdet"],
        # JSON on one indented line: nothing in a name can be taken for Markdown
        labels="(without names)" if names is None else json.dumps(names, ensure_ascii=False),
    )
