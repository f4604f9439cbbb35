"""What training changes from step to step, as one pytree."""

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
        step: updates made so far (with ``optax.MultiSteps``, gradients taken so far), int32.
        params: all parameters, those that don't train too.
        batch_stats: of the model.
        opt_state: of the optimiser, for the parameters that train.
        key: uint32 data of a random key (``jax.random.key_data``). Step i draws from ``fold_in(key, i)`` and image j
            of it from the j-th split of that, so neither a resume nor another number of devices changes a draw.
        ema: moving averages {"params", "batch_stats"} that can be applied as variables, or ``None``.
    """

    step: Int[jax.Array, ""]
    params: Tree
    batch_stats: Tree
    opt_state: Any
    key: UInt32[jax.Array, " _"]
    ema: dict[str, Tree] | None = None

    @property
    def variables(self) -> dict[str, Tree]:
        """What ``model.apply`` takes: the parameters and statistics, not averaged."""
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
        model: the detector; its ``trainable_backbone_layers`` says what trains.
        variables: {"params": ..., "batch_stats": ...}. They are copied: the train step donates the state, and what the
            caller holds must outlive it.
        tx: any optax transform (or ``optax.MultiSteps``); it sees only the parameters that train.
        key: of the randomness in training, ``jax.random.key(seed)`` or its data.
        ema: keeps moving averages of parameters and statistics; ``make_train_step`` needs an ``ema_decay`` then.
        trainable: a tree of bools like the parameters, or a function of them that gives one; overrides
            ``trainable_backbone_layers``. The train step must be given the same.

    Returns:
        The state, on the default device; see ``replicate`` for a mesh.

    Raises:
        ValueError: if nothing trains, for a mask that does not fit, or for a key of another kind than
            ``jax.random.key`` makes by default.
    """
    copy = lambda tree: jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), dict(tree))  # noqa: E731
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
    """Divides parameters into those that train and the rest.

    Args:
        model: the detector.
        params: its parameters.
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
        found = f"{key.dtype}{list(key.shape)}"
        raise ValueError(f"key should be one random key as jax.random.key(seed) makes by default, got {found}")
    return jnp.array(data, copy=True)
