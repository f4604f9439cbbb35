"""The builders by name, one worker for each, and equality to the bit."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from flaxdet import registry

NAMES = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.xdist_group(f"{name} files")) for name in registry.names()]
)


def equal(found: Any, expected: Any) -> None:
    """Bit for bit, and of the same dtypes."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
