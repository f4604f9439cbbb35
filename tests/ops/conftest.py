"""The precision that a test of this folder runs in."""

from __future__ import annotations

import jax
import numpy as np
import pytest


# float64 shows a wrong formula best; what rounding to float32 does is seen in CI, and by the detectors' tests
@pytest.fixture(params=[pytest.param(np.float32, marks=pytest.mark.ci), np.float64], ids=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(request.param is np.float64):
        yield request.param
