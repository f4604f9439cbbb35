"""The builders by name, one worker for each, and equality to the bit."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from tests.parity.sides import FCOS_NAME, V2_NAME

NAMES = pytest.mark.parametrize(
    "name",
    [
        pytest.param(FCOS_NAME, marks=pytest.mark.xdist_group("fcos_files")),
        pytest.param(V2_NAME, marks=pytest.mark.xdist_group("v2_files")),
    ],
)


def equal(found: Any, expected: Any) -> None:
    """Bit for bit, and of the same dtypes."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
