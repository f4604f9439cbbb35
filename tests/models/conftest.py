"""For tests of the builders: models drawn once, a server instead of downloads, nothing initialised."""

from __future__ import annotations

import types
from typing import Any

import pytest

from flaxdet import builders
from flaxdet.convert.state_dict import abstract_variables
from flaxdet.weights import WeightsEnum
from tests.drawn import drawn


@pytest.fixture(scope="module")
def drawn_models():
    """(model, variables) by (builder, classes, frozen), drawn once."""
    made: dict[Any, Any] = {}

    def get(name: str, num_classes: int = 91, frozen: bool = False):
        key = (name, num_classes, frozen)
        if key not in made:
            model = builders.make_model(name, num_classes=num_classes, frozen_bn=frozen)
            made[key] = model, drawn(abstract_variables(model))
        return made[key]

    return get


@pytest.fixture
def server(monkeypatch):
    """Instead of a download: `server.files[member]` is the state_dict, `server.asked` what was asked for."""

    server = types.SimpleNamespace(files={}, asked=[])

    def get_state_dict(self, progress=True):
        server.asked.append((self, progress))
        return server.files[self]

    monkeypatch.setattr(WeightsEnum, "get_state_dict", get_state_dict)
    return server


@pytest.fixture
def abstract_init(monkeypatch):
    """Nothing is initialised, only shaped: the rules under test don't depend on it."""
    monkeypatch.setattr(builders, "initial_variables", lambda model, key: abstract_variables(model))
