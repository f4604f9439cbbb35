"""A stand-in for a detector, with small shapes, and state_dicts for it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from flaxdet.convert import rules
from flaxdet.convert.state_dict import abstract_variables
from flaxdet.nn.names import TorchName


class Tiny:
    """Stands for a detector: some of its modules, with small shapes."""

    def __init__(self, *, frozen: bool = False, dtype=jnp.float32):
        self.frozen, self.dtype = frozen, dtype

    def torch_names(self):
        names = {
            "backbone/body/conv1": "backbone.body.conv1",
            "backbone/body/bn1": "backbone.body.bn1",
            "backbone/fpn/inner_blocks_0/conv": "backbone.fpn.inner_blocks.0.0",
            "rpn_head/conv_0": "rpn.head.conv.0.0",
            "box_head/fc6": "roi_heads.box_head.fc6",
            "box_predictor/cls_score": "roi_heads.box_predictor.cls_score",
        }
        return [TorchName(path, name, flattened=path == "box_head/fc6") for path, name in names.items()]

    def init(self, key, batch):
        assert batch.pixels.ndim == 4
        kernels = {
            "backbone/body/conv1": (7, 7, 3, 4),
            "backbone/fpn/inner_blocks_0/conv": (1, 1, 4, 2),
            "rpn_head/conv_0": (3, 3, 2, 2),
            "box_head/fc6": (7 * 7 * 2, 3),
            "box_predictor/cls_score": (3, 5),
        }
        params, stats, sown = {}, {}, {}

        def put(collection, path, shape):
            *modules, leaf = path.split("/")
            for module in modules:
                collection = collection.setdefault(module, {})
            collection[leaf] = jax.random.normal(key, shape, self.dtype)

        for module, shape in kernels.items():
            put(params, f"{module}/kernel", shape)
            put(params, f"{module}/bias", shape[-1:])
        for leaf in ("scale", "bias", "mean", "var"):
            in_params = leaf in ("scale", "bias") and not self.frozen
            put(params if in_params else stats, f"backbone/body/bn1/{leaf}", (4,))
        put(sown, "backbone/c2", (1, 16, 16, 4))
        return {"params": params, "batch_stats": stats, "intermediates": sown}


def tiny_state(seed: int = 0, dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {row.key: row.shape for row in rules.rules(Tiny(), abstract_variables(Tiny()))}
    return {
        key: np.array(7, np.int64) if key.endswith("tracked") else rng.normal(size=shape).astype(dtype)
        for key, shape in shapes.items()
    }


def renamed(state, old, new):
    return {key.replace(old, new): array for key, array in state.items()}
