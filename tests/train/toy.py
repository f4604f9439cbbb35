"""A model of two dense layers around which the train step can be checked by hand."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flaxdet.nn import BatchNorm
from flaxdet.train import batch_inputs, create_state, make_train_step
from tests.tolerances import HAND_F32, STEP_FLOOR_F32
from tests.train.cases import random_batch


class Toy(nn.Module):
    """As much of a detector as the step knows of, with two losses that can be worked out by hand."""

    backbone: Any = None
    trainable_backbone_layers: int = 5
    box_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, targets, *, train=False):
        x = BatchNorm(name="bn")(images.pixels.reshape(-1, 3), train=train)
        x = nn.Dense(2, name="first")(x)
        x = nn.Dense(1, name="second")(x)
        noise = jax.random.normal(self.make_rng("sampling"), ())
        return {"fit": jnp.mean(jnp.square(x - targets.boxes.mean())), "noise": noise * jnp.mean(x[::3])}


@functools.cache
@jax.jit
def toy_variables() -> Any:
    batch = random_batch(2, size=8)
    keys = {"params": jax.random.key(0), "sampling": jax.random.key(1)}
    return Toy().init(keys, *batch_inputs(Toy(), batch), train=False)


def only_second(params):
    return {name: dict.fromkeys(leaves, name == "second") for name, leaves in params.items()}


def copied(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.device_put(leaf, may_alias=False), tree)


def run(tx, steps=3, *, variables=None, key=None, trainable=None, ema=None, **options):
    variables = toy_variables() if variables is None else variables
    key = jax.random.key(2) if key is None else key
    state = create_state(Toy(), variables, tx, key=key, trainable=trainable, ema=ema is not None)
    train_step = make_train_step(Toy(), tx, trainable=trainable, ema_decay=ema, **options)
    states, metrics = [state], []
    for i in range(steps):
        before = copied(states[-1])  # a copy: the step donates its own
        states[-1] = before
        state, found = train_step(copied(before), random_batch(2, size=8, seed=i))
        states.append(state)
        metrics.append({name: float(value) for name, value in found.items()})
    return states, metrics


def gradients_at(state, seed, weights=None):
    """((loss, (losses, batch_stats)), gradients) of the step's batch, by jax's own means."""
    batch = random_batch(2, size=8, seed=seed)
    del batch["image_id"]  # int64, of the pipeline alone
    weights = {"fit": 1.0, "noise": 1.0} | (weights or {})
    return _gradients(state.params, state.batch_stats, state.key, state.step, batch, weights)


@jax.jit  # one program for all seeds and weights
def _gradients(params, batch_stats, key, step, batch, weights):
    images, targets = batch_inputs(Toy(), batch)
    key = jax.random.fold_in(jax.random.wrap_key_data(key), step)

    def total(params):
        variables = {"params": params, "batch_stats": batch_stats}
        options = {"train": True, "rngs": {"sampling": key}, "mutable": ["batch_stats"]}
        losses, updates = Toy().apply(variables, images, targets, **options)
        return weights["fit"] * losses["fit"] + weights["noise"] * losses["noise"], (losses, updates["batch_stats"])

    return jax.value_and_grad(total, has_aux=True)(params)


def assert_trees_close(actual, expected, rtol=HAND_F32, atol=STEP_FLOOR_F32):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), actual, expected)


def assert_trees_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
