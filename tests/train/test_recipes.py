"""Learning rates at every iteration, and SGD's trajectories, against torch's; the recipes' figures."""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flaxdet.train import (
    fasterrcnn_v2_recipe,
    fcos_recipe,
    sgd,
    warmup_cosine_schedule,
    warmup_multistep_schedule,
)
from tests.tolerances import HAND_F32, LR_F64, RATE_F32, SGD_F64


def torch_rates(steps_per_epoch: int, epochs: int, peak: float, make_main) -> list[float]:
    """The rate of every iteration of torchvision's detection reference (train.py and engine.py)."""
    torch = pytest.importorskip("torch")
    schedulers = torch.optim.lr_scheduler
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    main, rates = make_main(schedulers, optimizer), []
    for epoch in range(epochs):
        warmup = None
        if epoch == 0:
            count = min(1000, steps_per_epoch - 1)
            warmup = schedulers.LinearLR(optimizer, start_factor=1.0 / 1000, total_iters=count)
        for _ in range(steps_per_epoch):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if warmup is not None:
                warmup.step()
        main.step()
    return rates


@pytest.mark.parametrize("steps_per_epoch", [2, 7, 1100])
@pytest.mark.parametrize("kind", ["multistep", "cosine"])
def test_every_rate(steps_per_epoch, kind, x64):
    epochs, peak = 6, 0.02
    if kind == "multistep":
        schedule = warmup_multistep_schedule(peak, steps_per_epoch, [4, 2])
        expected = torch_rates(steps_per_epoch, epochs, peak, lambda s, o: s.MultiStepLR(o, [2, 4], 0.1))
    else:
        schedule = warmup_cosine_schedule(peak, steps_per_epoch, epochs, per_epoch=True)
        expected = torch_rates(steps_per_epoch, epochs, peak, lambda s, o: s.CosineAnnealingLR(o, epochs))
    found = jax.jit(jax.vmap(schedule))(jnp.arange(len(expected), dtype=jnp.int32))
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, expected, rtol=LR_F64)


def test_schedules_by_hand():
    schedule = warmup_multistep_schedule(1.0, 10, [3], warmup_steps=4, warmup_factor=0.2)
    rate = jax.jit(schedule)
    found = [float(rate(step)) for step in (0, 1, 3, 4, 29, 30, 1000)]
    np.testing.assert_allclose(found, [0.2, 0.4, 0.8, 1, 1, 0.1, 0.1], rtol=HAND_F32)
    cosine = jax.jit(warmup_cosine_schedule(1.0, 10, 2, end_lr=0.5, warmup_steps=0))
    np.testing.assert_allclose(
        [float(cosine(step)) for step in (0, 5, 10, 20, 99)],
        [1, 0.75 + math.cos(math.pi / 4) / 4, 0.75, 0.5, 0.5],
        rtol=HAND_F32,
    )
    # an epoch of one step has no warm-up: torch's would stay at a thousandth for ever
    assert float(warmup_multistep_schedule(1.0, 1, [])(0)) == 1
    assert schedule(jnp.int32(3)).dtype == jnp.float32
    for bad in (
        lambda: warmup_multistep_schedule(1.0, 0, []),
        lambda: warmup_cosine_schedule(1.0, 5, 0),
        lambda: warmup_multistep_schedule(1.0, 5, [], warmup_steps=-1),
    ):
        with pytest.raises(ValueError, match="should"):
            bad()


OPTIONS = {
    "plain": {"momentum": 0.0},
    "momentum": {},
    "decay": {"weight_decay": 0.1},
    "nesterov": {"weight_decay": 0.1, "nesterov": True, "momentum": 0.8},
    "norms decay otherwise": {"weight_decay": 0.1, "norm_weight_decay": 0.02},
    "norms don't decay": {"weight_decay": 0.1, "norm_weight_decay": 0.0},
    "only norms decay": {"norm_weight_decay": 0.3},
}

SCHEDULE = warmup_multistep_schedule(0.1, 10, [2])
rate_of = jax.jit(SCHEDULE)  # compiled once for all cases


@pytest.mark.parametrize("case", OPTIONS)
def test_sgd_is_torchs(case, x64):
    """Thirty steps down a stiff quadratic, on torch's rates."""
    torch = pytest.importorskip("torch")
    options = OPTIONS[case]
    rng = np.random.default_rng(0)
    start = {
        "dense": {"kernel": rng.normal(size=(5, 3)), "bias": rng.normal(size=3)},
        "norm": {"scale": rng.normal(size=3), "bias": rng.normal(size=3)},
    }
    pull = jax.tree.map(lambda x: rng.uniform(0.1, 3, x.shape), start)

    tensors = jax.tree.map(lambda x: torch.nn.Parameter(torch.tensor(x)), start)
    decay = options.get("weight_decay", 0.0)
    norm_decay = options.get("norm_weight_decay", decay)
    groups = [
        {"params": list(tensors["dense"].values()), "weight_decay": decay},
        {"params": list(tensors["norm"].values()), "weight_decay": norm_decay},
    ]
    rest = {"momentum": 0.9} | {key: value for key, value in options.items() if key in ("momentum", "nesterov")}
    optimizer = torch.optim.SGD(groups, lr=0.1, **rest)

    tx = sgd(SCHEDULE, **options)

    @jax.jit
    def update(params, state):
        gradients = jax.tree.map(lambda c, p: 2 * c * (p - 1), pull, params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params: Any = jax.tree.map(jnp.asarray, start)
    state = tx.init(params)
    for step in range(30):
        for group in optimizer.param_groups:
            group["lr"] = float(rate_of(step))
        optimizer.zero_grad()
        loss = sum((torch.tensor(pull[a][b]) * (tensors[a][b] - 1) ** 2).sum() for a in start for b in start[a])
        loss.backward()
        optimizer.step()
        params, state = update(params, state)
    for a, b in itertools.chain.from_iterable([(a, b) for b in start[a]] for a in start):
        assert params[a][b].dtype == jnp.float64
        np.testing.assert_allclose(params[a][b], tensors[a][b].detach().numpy(), rtol=SGD_F64)
        assert not np.allclose(params[a][b], start[a][b])


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": -1},
        {"weight_decay": -1},
        {"norm_weight_decay": -1.0},
        {"nesterov": True, "momentum": 0.0},
        {"learning_rate": -1},
    ],
)
def test_sgd_refuses(options):
    with pytest.raises(ValueError, match=r"should not be negative|needs a momentum"):
        sgd(**{"learning_rate": 0.1, **options})


def test_reference_recipes():
    coco = 117_266  # train2017 without the images that have no boxes
    fcos, v2 = fcos_recipe(coco), fasterrcnn_v2_recipe(coco)
    assert (fcos.batch_size, fcos.epochs, fcos.steps_per_epoch, fcos.steps) == (16, 26, 7330, 26 * 7330)
    assert (v2.batch_size, v2.epochs, v2.steps_per_epoch) == (64, 400, 1833)
    for recipe, lr, first, second in ((fcos, 0.01, 16, 22), (v2, 0.1, 352, 384)):
        n = recipe.steps_per_epoch
        steps = [0, 1000, first * n - 1, first * n, second * n - 1, second * n, recipe.steps - 1]
        expected = [lr / 1000, lr, lr, lr / 10, lr / 10, lr / 100, lr / 100]
        np.testing.assert_allclose([float(recipe.schedule(step)) for step in steps], expected, rtol=RATE_F32)
    assert fcos.data == {"flip": 0.5}
    assert v2.data["crop"] == (1024, 1024)
    with pytest.raises(TypeError):
        fcos.data["flip"] = 0  # pyright: ignore[reportIndexIssue]

    # the rate of another batch size is the user's, unless scaling is asked for
    assert float(fcos_recipe(1000, batch_size=2).schedule(999)) == pytest.approx(0.01)
    assert float(fcos_recipe(1000, batch_size=2, scale_lr=True).schedule(999)) == pytest.approx(0.01 / 8)
    assert float(fasterrcnn_v2_recipe(1000, batch_size=2, scale_lr=True).schedule(999)) == pytest.approx(0.1 / 32)
    with pytest.raises(ValueError, match="should be at least 1, got 5 and 0"):
        fcos_recipe(5, batch_size=0)


def test_recipes_decay():
    """The weight decay of each recipe, seen in the first update of a parameter without gradient."""
    params = {"layer": {"kernel": jnp.ones(2)}, "norm": {"scale": jnp.ones(2), "bias": jnp.ones(2)}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    for recipe, decay in ((fcos_recipe(16), 1e-4), (fasterrcnn_v2_recipe(64, norm_weight_decay=0.0), 4e-5)):
        updates, _ = recipe.tx.update(zeros, recipe.tx.init(params), params)
        lr = float(recipe.schedule(0))
        np.testing.assert_allclose(updates["layer"]["kernel"], -lr * decay, rtol=HAND_F32)
        of_norm = 0 if decay == 4e-5 else -lr * decay
        np.testing.assert_allclose(updates["norm"]["scale"], of_norm, rtol=HAND_F32)
