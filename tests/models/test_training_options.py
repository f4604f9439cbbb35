"""``freeze_bn`` and ``remat`` as options of the builders, through files and back."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

import flaxdet
from flaxdet import registry
from flaxdet.convert.state_dict import abstract_variables
from flaxdet.zoo import build
from tests.drawn import drawn
from tests.parity.sides import FCOS_NAME, V2_NAME
from tests.tiny import build_small_models

NAMES = pytest.mark.parametrize("name", [FCOS_NAME, V2_NAME])
OPTIONS = pytest.mark.parametrize(
    "options",
    [
        pytest.param({"freeze_bn": True}, marks=pytest.mark.ci),
        pytest.param({"remat": True}, marks=pytest.mark.ci),
        {"freeze_bn": True, "remat": True},
    ],
)


def options_of(model: Any) -> dict[str, bool]:
    """The options in force, agreed on by all parts that have them."""
    parts = [model.backbone.body, *([model.backbone.fpn, model.box_head] if hasattr(model, "box_head") else [])]
    (freeze_bn,) = {part.freeze_bn for part in parts}
    return {"freeze_bn": freeze_bn, "remat": model.backbone.body.remat}


@NAMES
@OPTIONS
def test_builders(name, options, monkeypatch):
    """They reach every part that has BatchNorm, and change no variable."""
    monkeypatch.setattr(build, "initial_variables", lambda model, key: abstract_variables(model))
    plain, variables = getattr(flaxdet, name)(weights_backbone=None, num_classes=3)
    model, found = getattr(flaxdet, name)(weights_backbone=None, num_classes=3, **options)
    assert options_of(plain) == {"freeze_bn": False, "remat": False}
    assert options_of(model) == {"freeze_bn": False, "remat": False} | options
    assert found == variables
    assert model == registry.make_model(name, num_classes=3, **options) != plain


@pytest.mark.parametrize("name", [FCOS_NAME, pytest.param(V2_NAME, marks=pytest.mark.ci)])
def test_files(name, tmp_path, monkeypatch):
    """A .safetensors carries both; a .pth neither; `load` overrules either."""
    if name == FCOS_NAME:  # the keys that are left would be those of v1 too
        build_small_models(monkeypatch)
    both = {"freeze_bn": True, "remat": True}
    model = registry.make_model(name, num_classes=3, **both)
    variables = drawn(abstract_variables(model))
    path = tmp_path / "model.safetensors"
    try:
        flaxdet.save(path, model, variables)
        loaded, found = flaxdet.load(path)
        assert loaded == model
        jax.tree.map(np.testing.assert_array_equal, found, variables)
        assert options_of(flaxdet.load(path, remat=False)[0]) == {"freeze_bn": True, "remat": False}
        path.unlink()
        path = tmp_path / "model.pth"
        flaxdet.save(path, model, variables)
        assert options_of(flaxdet.load(path, freeze_bn=True)[0]) == {"freeze_bn": True, "remat": False}
    finally:
        path.unlink(missing_ok=True)  # 150 MB
