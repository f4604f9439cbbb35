"""torch's SGD and schedules out of optax's parts, and torchvision's reference recipes.

A schedule is optax's: a function of the number of updates made so far. None of this is needed: the train step takes
any ``optax.GradientTransformation``, such as

    optax.chain(optax.clip_by_global_norm(10.0), sgd(schedule, weight_decay=1e-4))    # clipping, after all gradients
    optax.MultiSteps(sgd(schedule), every_k_schedule=4)                               # gradients of 4 steps, averaged
    optax.adamw(schedule, weight_decay=0.05, mask=decay_mask)                         # no decay of norms

Averaged weights (EMA) are an option of ``create_state`` and ``make_train_step``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flaxdet import registry
from flaxdet.train.mask import norm_mask

Schedule = Callable[[Any], Any]

WARMUP_ITERATIONS = 1000
WARMUP_FACTOR = 1 / 1000


def sgd(
    learning_rate: float | Schedule,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    norm_weight_decay: float | None = None,
    nesterov: bool = False,
) -> optax.GradientTransformation:
    """``torch.optim.SGD``: weight decay joins the gradient before the momentum, the rate multiplies after it.

    Args:
        learning_rate: a number or a schedule.
        momentum: share of the last direction in the next.
        weight_decay: of every parameter, biases too, unless ``norm_weight_decay`` is given.
        norm_weight_decay: of normalisation layers; ``None`` for the same as others, 0 for none (``norm_weight_decay``
            of torchvision's references).
        nesterov: Nesterov's momentum.

    Returns:
        The optax transform.

    Raises:
        ValueError: for a negative number, or ``nesterov`` without momentum.
    """
    numbers = {"learning_rate": learning_rate, "momentum": momentum, "weight_decay": weight_decay}
    for name, value in {**numbers, "norm_weight_decay": norm_weight_decay}.items():
        if isinstance(value, (int, float)) and value < 0:
            raise ValueError(f"{name} should not be negative, got {value}")
    if nesterov and _is_zero(momentum):
        raise ValueError("nesterov=True needs a momentum above 0")
    decays = [(weight_decay, None)]
    if norm_weight_decay is not None:
        decays = [(weight_decay, _not_norm), (norm_weight_decay, norm_mask)]
    parts = [optax.add_decayed_weights(decay, mask=mask) for decay, mask in decays if not _is_zero(decay)]
    if not _is_zero(momentum):
        parts.append(optax.trace(momentum, nesterov=nesterov))
    return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))


def _is_zero(number: Any) -> bool:
    return isinstance(number, (int, float)) and number == 0  # no array: optax.inject_hyperparams traces them


def _not_norm(params: Any) -> Any:
    return jax.tree.map(lambda of_norm: not of_norm, norm_mask(params))


def warmup_multistep_schedule(
    peak_lr: float,
    steps_per_epoch: int,
    milestones: Sequence[int],
    *,
    gamma: float = 0.1,
    warmup_steps: int | None = None,
    warmup_factor: float = WARMUP_FACTOR,
) -> Schedule:
    """Linear warm-up, then a decay at every milestone, as torchvision's detection reference trains.

    The reference runs two of torch's schedulers on one optimiser: LinearLR once an iteration in the first epoch,
    MultiStepLR once an epoch. Each multiplies the rate that it finds, so the result is their product.

    Args:
        peak_lr: the rate after the warm-up.
        steps_per_epoch: updates in an epoch.
        milestones: epochs at whose beginning the rate is multiplied by ``gamma``.
        gamma: of each decay.
        warmup_steps: updates from ``warmup_factor * peak_lr`` to ``peak_lr``; default min(1000, steps_per_epoch - 1),
            the reference's. (Of an epoch of a single step torch's never leaves the factor; here 0 steps are none.)
        warmup_factor: share of ``peak_lr`` at the first update.

    Returns:
        updates made so far -> rate, a scalar of jax's default float; traceable.

    Raises:
        ValueError: for no steps in an epoch, or a negative number of warm-up steps.
    """
    warmup = _warmup(steps_per_epoch, warmup_steps, warmup_factor)
    boundaries = [milestone * steps_per_epoch for milestone in sorted(milestones)]

    def schedule(step: Any) -> jax.Array:
        rate = peak_lr * warmup(step)
        for boundary in boundaries:
            rate = jnp.where(jnp.asarray(step) >= boundary, rate * gamma, rate)
        return rate

    return schedule


def warmup_cosine_schedule(
    peak_lr: float,
    steps_per_epoch: int,
    epochs: int,
    *,
    end_lr: float = 0.0,
    per_epoch: bool = False,
    warmup_steps: int | None = None,
    warmup_factor: float = WARMUP_FACTOR,
) -> Schedule:
    """Linear warm-up, then half a cosine down to ``end_lr``.

    Args:
        peak_lr: the rate after the warm-up.
        steps_per_epoch: updates in an epoch.
        epochs: until ``end_lr`` is reached, and kept.
        end_lr: the last rate.
        per_epoch: moves the cosine once an epoch, as torch's CosineAnnealingLR in torchvision's detection reference
            (``--lr-scheduler cosineannealinglr``), and not at every update.
        warmup_steps: as in ``warmup_multistep_schedule``; the cosine runs from the first update on, and the warm-up
            multiplies it.
        warmup_factor: share of ``peak_lr`` at the first update.

    Returns:
        updates made so far -> rate, a scalar of jax's default float; traceable.

    Raises:
        ValueError: for no epochs, no steps in an epoch, or a negative number of warm-up steps.
    """
    if epochs < 1:
        raise ValueError(f"epochs should be at least 1, got {epochs}")
    warmup = _warmup(steps_per_epoch, warmup_steps, warmup_factor)

    def schedule(step: Any) -> jax.Array:
        step = jnp.asarray(step)
        done = _float(step // steps_per_epoch if per_epoch else step)
        share = jnp.minimum(done / (epochs if per_epoch else epochs * steps_per_epoch), 1)
        return warmup(step) * (end_lr + (peak_lr - end_lr) * (1 + jnp.cos(math.pi * share)) / 2)

    return schedule


def _warmup(steps_per_epoch: int, steps: int | None, factor: float) -> Schedule:
    """Share of the rate after so many updates: ``factor`` at the first, 1 from the ``steps``-th on."""
    if steps_per_epoch < 1:
        raise ValueError(f"steps_per_epoch should be at least 1, got {steps_per_epoch}")
    count = min(WARMUP_ITERATIONS, steps_per_epoch - 1) if steps is None else steps
    if count < 0:
        raise ValueError(f"warmup_steps should not be negative, got {steps}")
    if not count:
        return lambda step: _float(jnp.ones_like(jnp.asarray(step)))
    return lambda step: factor + (1 - factor) * jnp.minimum(_float(step) / count, 1)


def _float(x: Any) -> jax.Array:
    return jnp.asarray(x).astype(jnp.result_type(float))


@dataclass(frozen=True)
class Recipe:
    """A way to train.

    Attributes:
        tx: the optimiser, its schedule within.
        schedule: updates made so far -> learning rate.
        steps_per_epoch: updates in an epoch of ``train_batches``, which fills up the last batch (torchvision's loader
            leaves that batch out).
        epochs: how many.
        batch_size: images of an update, on all devices together.
        data: options of ``flaxdet.data.train_batches`` that make the recipe's augmentation.
    """

    tx: optax.GradientTransformation
    schedule: Schedule
    steps_per_epoch: int
    epochs: int
    batch_size: int
    data: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def steps(self) -> int:
        """Updates in all."""
        return self.steps_per_epoch * self.epochs


def recipe(
    name: str,
    num_images: int,
    *,
    batch_size: int | None = None,
    scale_lr: bool = False,
    lr: float | None = None,
    epochs: int | None = None,
    milestones: Sequence[int] | None = None,
    weight_decay: float | None = None,
    norm_weight_decay: float | None = None,
) -> Recipe:
    """torchvision's recipe of an architecture's published weights (``Training`` in ``flaxdet/registry.py``).

    Args:
        name: of the builder. "fcos_resnet50_fpn": 8 devices of 2 images, flips, mixed precision, which is the model's
            (``dtype=jnp.bfloat16``). "fasterrcnn_resnet50_fpn_v2": 32 devices of 2 images, large-scale jitter into a
            fixed crop of 1024x1024, flips, and BatchNorm over the global batch, which a sharded train step always has
            (torch's SyncBatchNorm).
        num_images: in the training set.
        batch_size: images of an update, on all devices together; default the recipe's, as in all that follow.
        scale_lr: multiplies ``lr`` by batch_size / the recipe's, the linear rule that torchvision's references go by.
        lr: the rate after the warm-up, for the recipe's batch.
        epochs: of training.
        milestones: epochs before which the rate is divided by 10.
        weight_decay: of every parameter, biases and norms too.
        norm_weight_decay: of normalisation layers, if another.

    Returns:
        The recipe.

    Raises:
        ValueError: for an unknown name, no images, or an empty batch.
    """
    training = registry.get(name).training
    size = training.batch_size if batch_size is None else batch_size
    if num_images < 1 or size < 1:
        raise ValueError(f"num_images and batch_size should be at least 1, got {num_images} and {size}")
    steps_per_epoch = -(-num_images // size)
    peak = training.lr if lr is None else lr
    schedule = warmup_multistep_schedule(
        peak * size / training.batch_size if scale_lr else peak,
        steps_per_epoch,
        training.milestones if milestones is None else milestones,
    )
    decay = training.weight_decay if weight_decay is None else weight_decay
    tx = sgd(schedule, weight_decay=decay, norm_weight_decay=norm_weight_decay)
    count = training.epochs if epochs is None else epochs
    return Recipe(tx, schedule, steps_per_epoch, count, size, MappingProxyType(dict(training.data)))
