"""Parity tests need torch and torchvision; without them they are skipped, not failed."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import pytest

from flaxdet import registry
from flaxdet.xla.routes import routes_for

collect_ignore_glob: list[str] = []
if importlib.util.find_spec("torch") is None or importlib.util.find_spec("torchvision") is None:
    collect_ignore_glob.append("test_*.py")
else:
    import torch

    torch.set_num_threads(1)  # as XLA in conftest.py: one thread a worker


@pytest.fixture(autouse=True)
def routes() -> Iterator[None]:
    """FLAXDET_ROUTES=gpu or tpu compares that platform's routes with torchvision, on the CPU."""
    platform: Any = os.environ.get("FLAXDET_ROUTES")
    with routes_for(platform):
        yield


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``name`` is each registered builder's; the tests of a file and a model run in one worker and share programs.

    Marks say which detectors run where: see ``markers`` in pyproject.toml.
    """
    if "name" not in metafunc.fixturenames:
        return
    from tests.parity import sides

    file = metafunc.module.__name__.rpartition(".")[2]
    repeated, whole = (metafunc.definition.get_closest_marker(kind) for kind in ("repeated", "whole"))
    cases = []
    for name in sides.whole_names() if whole else sides.NAMES:
        marks = [pytest.mark.xdist_group(f"{file} {name}")]
        if repeated and name != sides.representative(registry.get(name).kind):
            marks.append(pytest.mark.release)
        elif whole or (repeated and name != sides.TINY_NAME):
            marks.append(pytest.mark.ci)
        cases.append(pytest.param(name, marks=marks))
    metafunc.parametrize("name", cases)
