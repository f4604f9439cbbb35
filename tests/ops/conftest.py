"""The precision that a test of this folder runs in."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests.ops.cases import DTYPES


@pytest.fixture(params=DTYPES, ids=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(request.param is np.float64):
        yield request.param
