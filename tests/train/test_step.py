"""The train step: what it changes and what it leaves alone, any optax chain, keys, averages, bfloat16."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flaxdet.train import (
    batch_inputs,
    create_state,
    decay_mask,
    make_loss_step,
    make_mesh,
    make_train_step,
    sgd,
    shard_batch,
)
from tests.parity.sides import flax_detector
from tests.tiny import FCOS_NAME, V2_NAME, tiny_model, tiny_variables
from tests.tolerances import (
    CLIPPED_F32,
    DEVICES_LOSS_F32,
    GRADIENT_NORM_BF16,
    HAND_F32,
    LOSS_BF16,
    STEP_F32,
)
from tests.train.cases import random_batch
from tests.train.toy import Toy, assert_trees_close, assert_trees_equal, gradients_at, only_second, run, toy_variables


def by_sgd(params, gradients, rate=0.1):
    return jax.tree.map(lambda p, g: p - rate * g, *jax.device_get((params, gradients)))


def test_metrics_and_update():
    states, metrics = run(optax.sgd(0.1), 2)
    for before, after, found, seed in zip(states[:-1], states[1:], metrics, (0, 1), strict=True):
        (loss, (losses, batch_stats)), gradients = gradients_at(before, seed)
        assert found.keys() == {"fit", "noise", "loss", "grad_norm"}
        assert found["loss"] == pytest.approx(found["fit"] + found["noise"], rel=HAND_F32)
        assert found["loss"] == pytest.approx(float(loss), rel=STEP_F32)
        assert found["noise"] == pytest.approx(float(losses["noise"]), rel=STEP_F32)
        norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(gradients)))
        assert found["grad_norm"] == pytest.approx(norm, rel=STEP_F32)
        assert_trees_close(after.params, by_sgd(before.params, gradients), 1e-5)
        assert_trees_close(after.batch_stats, batch_stats, 1e-5)
    assert [int(state.step) for state in states] == [0, 1, 2]


def test_frozen_parameters_are_left_alone():
    tx = sgd(0.1, weight_decay=0.1)
    states, _ = run(tx, 3, trainable=only_second, ema=0.9)
    for name in ("first", "bn"):
        assert_trees_equal(states[-1].params[name], states[0].params[name])
        assert_trees_equal(states[-1].ema["params"][name], states[0].params[name])
    assert not np.array_equal(states[-1].params["second"]["kernel"], states[0].params["second"]["kernel"])
    assert not np.array_equal(states[-1].batch_stats["bn"]["mean"], states[0].batch_stats["bn"]["mean"])
    assert len(jax.tree.leaves(states[0].opt_state)) == 2  # the momentum of second/kernel and second/bias
    mask = only_second(states[0].params)  # a tree does as well as a function
    assert_trees_equal(run(tx, 3, trainable=mask)[0][-1].params, states[-1].params)


@pytest.mark.ci  # traces two whole steps; the test above shows that frozen layers stay
def test_frozen_layers_have_no_backward_pass():
    """Arithmetic of the whole step, as JAX hands it to XLA; maps are too small for Winograd's form with less of it."""
    model = flax_detector(FCOS_NAME, 4)
    variables = jax.eval_shape(lambda: tiny_variables(model))
    batch = random_batch(2, size=96)
    flops = []
    for layers in (5, 0):
        model = model.clone(trainable_backbone_layers=layers)
        tx = sgd(0.1)
        state = jax.eval_shape(lambda v, m=model, t=tx: create_state(m, v, t, key=jax.random.key(0)), variables)
        flops.append(make_train_step(model, tx).lower(state, shard_batch(batch, None)).cost_analysis()["flops"])
    body = 2 * 2 * 0.89e9 * 96**2 / 224**2  # two images through ResNet-10, two operations a multiplication
    # gradients of weights and (not the stem's) of inputs: twice the forward pass
    assert flops[0] - flops[1] > 1.6 * body


def test_state_is_donated_and_variables_are_not():
    variables = toy_variables()
    tx = optax.sgd(0.1)
    state = create_state(Toy(), variables, tx, key=jax.random.key(0))
    kept = jax.tree.map(np.array, variables)
    make_train_step(Toy(), tx)(state, random_batch(2, size=8))
    assert_trees_equal(variables, kept)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_keys():
    """Draws depend on the key and the step, and a state that went through numpy goes on in the same bits."""
    states, metrics = run(optax.sgd(0.1), 3)
    again, same = run(optax.sgd(0.1), 3, key=jax.random.key_data(jax.random.key(2)))
    assert same == metrics
    assert_trees_equal(again[-1].params, states[-1].params)
    _, other = run(optax.sgd(0.1), 3, key=jax.random.key(3))
    assert other[0]["fit"] == metrics[0]["fit"]
    assert other[0]["noise"] != metrics[0]["noise"]
    step = make_train_step(Toy(), optax.sgd(0.1))
    stored = jax.tree.map(np.asarray, states[1])
    one, _ = step(batch=random_batch(2, size=8, seed=1), state=jax.tree.map(jnp.asarray, stored))
    assert_trees_equal(one.params, states[2].params)
    for bad in (jax.random.split(jax.random.key(0)), jax.random.key(0, impl="rbg"), 7):
        with pytest.raises(ValueError, match=r"one random key as jax.random.key\(seed\) makes"):
            create_state(Toy(), toy_variables(), optax.sgd(0.1), key=bad)


def test_averages():
    states, _ = run(optax.sgd(0.5), 3, ema=0.75)
    expected = {"params": states[0].params, "batch_stats": states[0].batch_stats}
    moved = jax.jit(optax.incremental_update)
    for state in states[1:]:
        new = {"params": state.params, "batch_stats": state.batch_stats}
        expected = moved(new, expected, 0.25)
    assert_trees_close(states[-1].ema, expected)
    with pytest.raises(ValueError, match="go together, got ema_decay and no averages"):
        make_train_step(Toy(), optax.sgd(0.1), ema_decay=0.9)(run(optax.sgd(0.1), 0)[0][0], random_batch(2, size=8))
    with pytest.raises(ValueError, match="go together, got a state with averages and no ema_decay"):
        make_train_step(Toy(), optax.sgd(0.1))(states[0], random_batch(2, size=8))
    with pytest.raises(ValueError, match="from 0 to below 1, got 1"):
        make_train_step(Toy(), optax.sgd(0.1), ema_decay=1)


def test_loss_weights():
    states, metrics = run(optax.sgd(0.1), 1, loss_weights={"noise": 0.0, "fit": 3.0})
    assert metrics[0]["loss"] == pytest.approx(3 * metrics[0]["fit"], rel=HAND_F32)
    assert metrics[0]["noise"] != 0
    _, gradients = gradients_at(states[0], 0, {"noise": 0.0, "fit": 3.0})
    assert_trees_close(states[1].params, by_sgd(states[0].params, gradients), 1e-5)
    with pytest.raises(ValueError, match="loss_weights has fits; the model's losses are fit, noise"):
        run(optax.sgd(0.1), 1, loss_weights={"fits": 1.0})


def test_accumulation():
    """MultiSteps updates every second step, by the mean of the two gradients."""
    with jax.numpy_dtype_promotion("standard"):
        states, _ = run(optax.MultiSteps(sgd(0.1), 2), 2)
    assert_trees_equal(states[1].params, states[0].params)
    gradients = [gradients_at(state, seed)[1] for seed, state in enumerate(states[:2])]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *jax.device_get(gradients))
    assert_trees_close(states[2].params, by_sgd(states[0].params, mean), 1e-5)


def test_clipping():
    states, metrics = run(optax.chain(optax.clip_by_global_norm(0.01), sgd(1.0, momentum=0)), 1)
    assert metrics[0]["grad_norm"] > 0.02
    moved = by_sgd(states[1].params, states[0].params, 1)
    assert float(jax.jit(optax.tree.norm)(moved)) == pytest.approx(0.01, rel=CLIPPED_F32)


CHAINS = {
    "adamw": lambda: optax.adamw(0.01, weight_decay=0.1, mask=decay_mask),
    "clip, adam": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.01)),
    "by part": lambda: optax.multi_transform(
        {"slow": sgd(0.001), "fast": optax.adam(0.01), "still": optax.set_to_zero()},
        {"bn": "still", "first": "slow", "second": "fast"},
    ),
    "hyperparameters in the state": lambda: optax.inject_hyperparams(sgd)(learning_rate=0.1, weight_decay=0.01),
    "lion": lambda: optax.lion(0.001),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_any_optax_chain(chain):
    with jax.numpy_dtype_promotion("standard"):
        states, metrics = run(CHAINS[chain](), 4)
    assert all(np.isfinite(found["loss"]) for found in metrics)
    assert not np.array_equal(states[-1].params["second"]["kernel"], states[0].params["second"]["kernel"])
    if chain == "by part":
        assert_trees_equal(states[-1].params["bn"], states[0].params["bn"])
    if chain.startswith("hyper"):
        assert float(states[-1].opt_state.hyperparams["learning_rate"]) == pytest.approx(0.1)


@pytest.mark.ci  # tests/nn has the parts, parity/test_gradients_bfloat16 an FCOS
@pytest.mark.parametrize("name", [V2_NAME])
def test_training_detectors_in_bfloat16(name):
    """bfloat16 computes, float32 stores; losses are those of float32 but for 8 bits, and both fall."""
    losses, norms = {}, {}
    batch = shard_batch(random_batch(4, canvases=True), None)
    tx = sgd(0.02, momentum=0.5)
    for dtype in (jnp.bfloat16, jnp.float32):
        model = tiny_model(name, dtype=dtype)
        state = create_state(model, tiny_variables(tiny_model(name)), tx, key=jax.random.key(0))
        train_step = make_train_step(model, tx)
        history = []
        for _ in range(8):
            state, metrics = train_step(state, batch)
            history.append(metrics)
        assert {leaf.dtype.name for leaf in jax.tree.leaves((state.params, state.batch_stats))} == {"float32"}
        assert {value.dtype.name for found in history for value in found.values()} == {"float32"}
        losses[dtype] = [float(found["loss"]) for found in history]
        norms[dtype] = float(history[0]["grad_norm"])
        assert losses[dtype][-1] < 0.97 * losses[dtype][0]
    assert losses[jnp.bfloat16][0] == pytest.approx(losses[jnp.float32][0], rel=LOSS_BF16)
    assert norms[jnp.bfloat16] == pytest.approx(norms[jnp.float32], rel=GRADIENT_NORM_BF16)


@pytest.mark.ci  # two programs of a whole detector; tests/cli/test_train.py looks at the losses that are logged
def test_validation_losses():
    """Those of the model itself, which samples by the key 0; weights count in the sum alone."""
    model = tiny_model(V2_NAME)
    variables = tiny_variables(model)
    batch = random_batch(2)
    found = make_loss_step(model, loss_weights={"loss_objectness": 2.0})(variables, batch)
    inputs = batch_inputs(model, batch)
    expected = jax.jit(lambda: model.apply(variables, *inputs, rngs={"sampling": jax.random.key(0)}))()
    assert found.keys() == expected.keys() | {"loss"}
    for key, value in expected.items():
        assert float(found[key]) == pytest.approx(float(value), rel=DEVICES_LOSS_F32), key
    total = sum(float(value) * (2 if key == "loss_objectness" else 1) for key, value in expected.items())
    assert float(found["loss"]) == pytest.approx(total, rel=DEVICES_LOSS_F32)


def test_bad_input():
    batch = random_batch(2)
    del batch["labels"], batch["size"]
    with pytest.raises(ValueError, match="the batch lacks size, labels; it has pixels, "):
        batch_inputs(Toy(), batch)
    with pytest.raises(ValueError, match="no parameter trains"):
        create_state(
            Toy(),
            toy_variables(),
            optax.sgd(0.1),
            key=jax.random.key(0),
            trainable=lambda params: jax.tree.map(lambda _: False, params),
        )
    with pytest.raises(ValueError, match="the mask should have the structure of the parameters"):
        create_state(Toy(), toy_variables(), optax.sgd(0.1), key=jax.random.key(0), trainable={"bn": True})


@pytest.mark.parametrize("name", [FCOS_NAME, V2_NAME])
def test_labels_of_the_first_batch(name):
    """It stops before the step is compiled, whichever way the batch comes."""
    model = tiny_model(name)
    steps: list[Any] = [make_train_step(model, sgd(0.1)), make_train_step(model, sgd(0.1), mesh=make_mesh())]
    batch = random_batch(2)
    batch["labels"][1, 2] = 4
    for step in [*steps, make_loss_step(model)]:
        for _ in range(2):  # and again
            with pytest.raises(ValueError, match=r"^image_id 1099511627777, box 2: label 4 should be from \d to 3"):
                step(None, batch)
            with pytest.raises(ValueError, match=r"^image 1, box 2: label 4 should be"):
                step(None, batch=shard_batch(batch, None))


@pytest.mark.ci  # a copy would cost memory and change no result
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what XLA:CPU would copy")
def test_parameters_are_updated_in_place():
    """XLA copied nearly each, since a gradient might still have read it after its update."""
    model, tx = tiny_model(FCOS_NAME), sgd(0.1, momentum=0.9)
    state = create_state(model, tiny_variables(model), tx, key=jax.random.key(0))
    program: Any = make_train_step(model, tx)
    text = program.lower(state, random_batch(2)).compile().as_text()
    assert len(re.findall(r"%state_params\S* = \S+ parameter", text)) == len(jax.tree.leaves(state.params))
    assert not re.findall(r"copy\(%state_params\S*", text)


def test_losses_inside_a_users_own_jit():
    """jax takes options of the compiler at the outermost jit alone; the arrays are closed over."""
    variables, batch = toy_variables(), shard_batch(random_batch(2, size=8), None)
    loss_step = make_loss_step(Toy())
    found = jax.jit(lambda: loss_step(variables, batch))()
    images, targets = batch_inputs(Toy(), batch)
    apply = jax.jit(Toy().apply, static_argnames="train")
    expected = apply(variables, images, targets, train=False, rngs={"sampling": jax.random.key(0)})
    assert_trees_close(found, {**expected, "loss": expected["fit"] + expected["noise"]})
