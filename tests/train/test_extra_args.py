"""Optax transforms whose update takes more than gradients: the loss they are given, and those that are refused."""

from __future__ import annotations

import functools
import operator
from typing import Any

import jax
import numpy as np
import optax
import pytest

from flaxdet.train import create_state, make_train_step
from tests.tiny import FCOS_NAME, tiny_model
from tests.train.cases import random_batch
from tests.train.toy import Toy, assert_trees_close, gradients_at, run, toy_variables


def test_the_loss_is_given_to_transforms_that_take_it():
    """Polyak's step is loss / |gradient|^2; it is of the loss that is minimised, weights included."""
    weights = {"fit": 3.0, "noise": 0.5}
    with jax.numpy_dtype_promotion("standard"):
        states, _ = run(optax.polyak_sgd(max_learning_rate=0.1), 2, loss_weights=weights)
    for before, after, seed in zip(states[:-1], states[1:], (0, 1), strict=True):
        (loss, _), gradients = gradients_at(before, seed, weights)
        square = sum(float(np.sum(np.square(leaf))) for leaf in jax.tree.leaves(gradients))
        rate = min(float(loss) / square, 0.1)
        assert 0 < rate < 0.1
        updates = jax.tree.map(functools.partial(operator.mul, rate), jax.device_get(gradients))
        expected = jax.tree.map(operator.sub, jax.device_get(before.params), updates)
        assert_trees_close(after.params, expected, 1e-5)


@pytest.mark.parametrize("accumulate", [False, True])
def test_a_plateau_is_seen(accumulate):
    """A rate of 0 leaves the loss where it is, which the first update takes for the best: each later one halves."""
    tx = optax.chain(optax.sgd(0.0), optax.contrib.reduce_on_plateau(0.5, patience=1))
    given = optax.MultiSteps(tx, 2).gradient_transformation() if accumulate else tx
    batch = random_batch(2, size=8)
    with jax.numpy_dtype_promotion("standard"):
        state = create_state(Toy(), toy_variables(), given, key=jax.random.key(0))
        step = make_train_step(Toy(), given, loss_weights={"noise": 0.0})
        for _ in range(8 if accumulate else 4):
            state, _ = step(state, batch)
    inner = state.opt_state.inner_opt_state if accumulate else state.opt_state
    assert float(inner[1].scale) == 0.5**3


def by_name(slow: Any, names: list[str]) -> optax.GradientTransformation:
    """One transform for the parameters of the first name, another for the rest."""
    labels = dict.fromkeys(names, "fast") | {names[0]: "slow"}
    return optax.multi_transform({"slow": slow, "fast": optax.sgd(0.1)}, labels)


def test_transforms_that_need_more_are_refused():
    wanted = "tx.update requires grad and value_fn: expected an optax transform that takes gradients"
    model = tiny_model(FCOS_NAME)
    for tx in (optax.lbfgs(), optax.MultiSteps(optax.lbfgs(), 2), optax.chain(optax.clip(1.0), optax.lbfgs())):
        with pytest.raises(ValueError, match=wanted):
            make_train_step(Toy(), tx)
    make_train_step(model, by_name(optax.adam(0.1), ["backbone", "head"]))
    with pytest.raises(ValueError, match=wanted):
        make_train_step(model, by_name(optax.lbfgs(), ["backbone", "head"]))
    with pytest.raises(ValueError, match=r"tx\.update fails on the model's trainable parameters: obj_fn must be"):
        make_train_step(model, optax.contrib.sophia(0.1))

    def update(updates: Any, state: Any, params: Any = None, *, accuracy: Any, **extra: Any) -> Any:
        return updates, state

    with pytest.raises(ValueError, match=r"tx\.update requires accuracy: "):
        make_train_step(model, optax.GradientTransformationExtraArgs(lambda params: (), update))  # pyright: ignore
    # of a model of one's own, only the first step knows the names
    tx = by_name(optax.lbfgs(), ["first", "second", "bn"])
    step = make_train_step(Toy(), tx)
    state = create_state(Toy(), toy_variables(), tx, key=jax.random.key(0))
    with jax.numpy_dtype_promotion("standard"), pytest.raises(ValueError, match=wanted):
        step(state, random_batch(2, size=8))
