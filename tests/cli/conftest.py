"""What all tests of the command line share: saved models, photos, a way to run a command, what it has written."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from PIL import Image

import flaxdet
from flaxdet import registry
from flaxdet.cli import options
from flaxdet.cli.main import main
from flaxdet.files import checkpoint
from flaxdet.models.initial import initial_variables
from tests.tiny import build_small_models

NAMES = ["__background__", "Platelets", "RBC", "white cell"]


class Result(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The error message, which has to be one line."""
        assert self.status != 0
        assert "Traceback" not in self.err
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        return lines[0]


@pytest.fixture
def run(capfd) -> Callable[..., Result]:
    """Runs a command in this process."""

    def run(*arguments: object) -> Result:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        return Result(status, *capfd.readouterr())

    return run


def random_variables(model, seed: int = 0) -> dict:
    """Variables under which an FCOS finds things: drawn by numpy, which is quicker than compiling an init."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        names = [entry.key for entry in path]
        if names[-1] == "kernel":
            kernel = rng.standard_normal(leaf.shape, np.float32) / np.sqrt(np.prod(leaf.shape[:-1]), dtype=np.float32)
            if names[-2] == "cls_logits":  # all classes alike, although features after a ReLU have a mean
                kernel = 2 * (kernel - kernel.mean(axis=(0, 1, 2)))
            return kernel
        if names[-1] in ("scale", "var"):
            return np.full(leaf.shape, 0.5 if names[-2] == "bn3" else 1, np.float32)
        return np.full(leaf.shape, -4 if names[-2] == "cls_logits" else 0, np.float32)

    abstract = jax.eval_shape(functools.partial(initial_variables, model), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, abstract)


def save_cells(folder: Path) -> Path:
    """Saves an FCOS of 4 classes in our own format, with small images and names of classes in its metadata."""
    model = registry.make_model("fcos_resnet50_fpn", num_classes=4, min_size=96, max_size=160)
    path = folder / "cells.safetensors"
    flaxdet.save(path, model, random_variables(model), categories=NAMES)
    return path


@pytest.fixture(scope="session")
def real_weights(tmp_path_factory) -> Path:
    """On the builder's ResNet-50."""
    return save_cells(tmp_path_factory.mktemp("real_weights"))


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """Of a small model, which commands can read where ``small_builders`` is in force."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        build_small_models(monkeypatch)
        return save_cells(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def small_builders(monkeypatch):
    """Commands build and read small models."""
    build_small_models(monkeypatch)


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The checkpoint files that a command reads whole, in order."""
    files, read = [], checkpoint.read

    def noted(path, **options):
        files.append(str(path))
        return read(path, **options)

    monkeypatch.setattr(checkpoint, "read", noted)
    return files


@pytest.fixture
def quick(small_builders, monkeypatch):
    """Small models, and the same weights with the same options are loaded only once in the session."""
    monkeypatch.setattr(options, "load_model", _load_model)


_load_model = functools.cache(options.load_model)


@pytest.fixture
def write_photo() -> Callable[..., Path]:
    """Writes a photo of 60x80 pixels, which a model of 96x160 resizes to one canvas of 96x128."""

    def write(path: Path, seed: int = 0) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(seed)
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        image = coarse.resize((80, 60), Image.Resampling.BICUBIC)
        options = {"quality": 95} if path.suffix == ".jpg" else {}
        image.save(path, **options)
        return path

    return write


@pytest.fixture
def out(tmp_path):
    return tmp_path / "results"


@pytest.fixture
def photo(tmp_path, write_photo):
    return write_photo(tmp_path / "photos" / "photo.jpg")


def results(out) -> dict:
    return json.loads((out / "detections.json").read_text())


def files(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
