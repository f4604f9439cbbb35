"""For tests of the builders: a server instead of downloads, nothing initialised."""

from __future__ import annotations

import types

import pytest

from flaxdet.convert.state_dict import abstract_variables
from flaxdet.zoo import build
from flaxdet.zoo.weights import WeightsEnum


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
    monkeypatch.setattr(build, "initial_variables", lambda model, key: abstract_variables(model))
