"""Variables of a module drawn by numpy: no compile, unlike its own initialisation, and no tensor idle."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def drawn(abstract: Any, seed: int = 0) -> Any:
    """Random variables of given shapes and dtypes: kernels that keep the variance, moved affine terms and statistics.

    Args:
        abstract: of ``jax.eval_shape(model.init, ...)`` or ``flaxdet.convert.state_dict.abstract_variables``.
        seed: of numpy's generator.
    """
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> Any:
        name = path[-1].key
        value = rng.normal(size=leaf.shape)
        if name == "kernel":
            value = value / np.sqrt(np.prod(leaf.shape[:-1]))
        elif name == "var":
            value = 0.7 + 0.6 * rng.random(leaf.shape)
        else:
            value = 0.2 * value + (name == "scale")
        return jax.device_put(value.astype(leaf.dtype))

    return jax.tree_util.tree_map_with_path(draw, abstract)
