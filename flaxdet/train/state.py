"""The state of training, which changes from step to step, as one pytree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Int, UInt32

from flaxdet.structures import exportable
from flaxdet.train.mask import Params, Tree, split, trainable_mask

Trainable = Mapping[str, Any] | Callable[[Params], Mapping[str, Any]]


@exportable
@struct.dataclass
class TrainState:
    """Everything that a step reads and writes; arrays only, so that any checkpointer can store it.

    Attributes:
        step: number of updates so far (with ``optax.MultiSteps``, number of gradients so far), int32.
        params: all parameters, including frozen ones.
        batch_stats: the model's BatchNorm statistics.
        opt_state: the optimiser's state, for the parameters that train.
        key: uint32 data of a random key (``jax.random.key_data``). Step i uses the key ``fold_in(key, i)``, and image j
            of the batch the j-th split of this key. So random numbers don't depend on a resume or on the number of
            devices.
        ema: moving averages {"params", "batch_stats"}, usable as variables, or ``None``.
    """

    step: Int[jax.Array, ""]
    params: Tree
    batch_stats: Tree
    opt_state: Any
    key: UInt32[jax.Array, " _"]
    ema: dict[str, Tree] | None = None

    @property
    def variables(self) -> dict[str, Tree]:
        """The variables for ``model.apply``: parameters and statistics, not averaged."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def create_state(
    model: Any,
    variables: Mapping[str, Any],
    tx: optax.GradientTransformation | optax.MultiSteps,
    *,
    key: jax.Array,
    ema: bool = False,
    trainable: Trainable | None = None,
) -> TrainState:
    """The state before the first step.

    Args:
        model: the detector; ``trainable_backbone_layers`` decides which parameters train.
        variables: {"params": ..., "batch_stats": ...}. They are copied, since the train step donates the state and must
            not delete the caller's arrays.
        tx: any optax transform (or ``optax.MultiSteps``); it gets only the parameters that train.
        key: random key of the training, ``jax.random.key(seed)`` or the data of such a key.
        ema: if True, keeps moving averages of parameters and statistics; ``make_train_step`` then needs ``ema_decay``.
        trainable: a tree of bools like the parameters, or a function from parameters to such a tree; overrides
            ``trainable_backbone_layers``. The train step needs the same ``trainable``.

    Returns:
        The state, on the default device; see ``replicate`` for a mesh.

    Raises:
        ValueError: if no parameter trains, for a mask that does not fit, or for a key of another kind than the default
            of ``jax.random.key``.
    """
    # jnp.array(leaf, copy=True) would compile a program for each shape
    copy = lambda tree: jax.tree.map(lambda leaf: jax.device_put(leaf, may_alias=False), dict(tree))  # noqa: E731
    params, batch_stats = copy(variables["params"]), copy(variables.get("batch_stats", {}))
    trained, _ = split_trainable(model, params, trainable)
    if not trained:
        raise ValueError("no parameter trains: the mask is False everywhere")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=tx.init(trained),
        key=_key_data(key),
        ema=copy({"params": params, "batch_stats": batch_stats}) if ema else None,
    )


def split_trainable(model: Any, params: Params, trainable: Trainable | None = None) -> tuple[Tree, Tree]:
    """Divides parameters into trainable and frozen ones.

    Args:
        model: the detector.
        params: the detector's parameters.
        trainable: as in ``create_state``.

    Returns:
        (trainable, frozen), as ``split``.

    Raises:
        ValueError: as ``trainable_mask``, or if the mask is of another structure than the parameters.
    """
    if trainable is None:
        mask: Mapping[str, Any] = trainable_mask(model, params)
    else:
        mask = trainable(params) if callable(trainable) else trainable
    return split(params, mask)


def _key_data(key: Any) -> jax.Array:
    key = jnp.asarray(key)
    data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    expected = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    if data.shape != expected.shape or data.dtype != expected.dtype:
        given = f"{key.dtype}{list(key.shape)}"
        raise ValueError(f"key should be one random key as jax.random.key(seed) makes by default, got {given}")
    return jax.device_put(data, may_alias=False)
