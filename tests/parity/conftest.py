"""Parity tests need torch and torchvision; without them they are skipped, not failed."""

from __future__ import annotations

import importlib.util

import pytest

collect_ignore_glob: list[str] = []
if importlib.util.find_spec("torch") is None or importlib.util.find_spec("torchvision") is None:
    collect_ignore_glob.append("test_*.py")
else:
    import torch

    torch.set_num_threads(1)  # as XLA in conftest.py: one thread a worker

FCOS_NAME, V2_NAME = "fcos_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``name`` is the builder's; of each file, the tests of one model run in one worker and share what it compiled."""
    if "name" in metafunc.fixturenames:
        file = metafunc.module.__name__.rpartition(".")[2]
        groups = {name: pytest.mark.xdist_group(f"{file} {name}") for name in (FCOS_NAME, V2_NAME)}
        metafunc.parametrize("name", [pytest.param(name, marks=group) for name, group in groups.items()])
