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


@pytest.fixture(
    params=[
        pytest.param(FCOS_NAME, marks=pytest.mark.xdist_group("fcos")),
        pytest.param(V2_NAME, marks=pytest.mark.xdist_group("v2")),
    ]
)
def name(request) -> str:
    """The builder's name; tests of one model run in one worker and share what it has compiled."""
    return request.param
