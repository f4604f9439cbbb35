"""Parity tests need torch and torchvision; without them they are skipped, not failed."""

from __future__ import annotations

import importlib.util

import pytest

from flaxdet import registry

collect_ignore_glob: list[str] = []
if importlib.util.find_spec("torch") is None or importlib.util.find_spec("torchvision") is None:
    collect_ignore_glob.append("test_*.py")
else:
    import torch

    torch.set_num_threads(1)  # as XLA in conftest.py: one thread a worker


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``name`` is each registered builder's; the tests of a file and a model run in one worker and share programs."""
    if "name" in metafunc.fixturenames:
        file = metafunc.module.__name__.rpartition(".")[2]
        groups = {name: pytest.mark.xdist_group(f"{file} {name}") for name in registry.names(private=True)}
        metafunc.parametrize("name", [pytest.param(name, marks=group) for name, group in groups.items()])
