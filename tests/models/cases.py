"""The builders by name, one worker for each, outside of CI one builder of each class; and equality to the bit."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from flaxdet import registry


def _case(name: str) -> Any:
    last = [other for other in registry.names() if registry.get(other).kind is registry.get(name).kind][-1]
    return pytest.param(
        name, marks=[pytest.mark.xdist_group(f"{name} files"), *([] if name == last else [pytest.mark.ci])]
    )


NAMES = pytest.mark.parametrize("name", [_case(name) for name in registry.names()])


def equal(found: Any, expected: Any) -> None:
    """Bit for bit, and of the same dtypes."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
