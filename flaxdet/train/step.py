"""One step of training, jitted: losses, gradients of the parameters that train, the optimiser's update."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from flaxdet.nn.layers import at_least_float32
from flaxdet.structures import ImageBatch, Targets
from flaxdet.train.extra_args import with_value
from flaxdet.train.first_batch import CheckedStep
from flaxdet.train.mask import Params, Tree, merge
from flaxdet.train.sharding import BATCH_KEYS
from flaxdet.train.state import Trainable, TrainState, split_trainable
from flaxdet.xla import routes
from flaxdet.xla.barriers import wait_for_all
from flaxdet.xla.jit import JitBySize
from flaxdet.xla.mesh import by_rows, on_mesh, replicated

Batch = Mapping[str, Any]
Metrics = dict[str, jax.Array]
Losses = dict[str, jax.Array]


def make_train_step(
    model: Any,
    tx: optax.GradientTransformation | optax.MultiSteps,
    *,
    mesh: Mesh | None = None,
    ema_decay: float | None = None,
    loss_weights: Mapping[str, float] | None = None,
    trainable: Trainable | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Makes the function that trains one step.

    Gradients are computed only for the parameters that train: layers before the first of these have no backward pass.

    Args:
        model: the detector. Computes in ``model.dtype`` (e.g. bfloat16); parameters and optimiser state are in
            ``model.param_dtype``.
        tx: the optax transform (or ``optax.MultiSteps``) given to ``create_state``. If its ``update`` takes the extra
            argument ``value`` (``optax.contrib.reduce_on_plateau``, ``optax.polyak_sgd``), it gets the weighted loss of
            the step's batch. A transform that requires another argument (``optax.lbfgs``) is refused.
        mesh: the result of ``make_mesh``; the state must then be replicated (``replicate``) and batches divided
            (``shard_batch``) on the mesh.
        ema_decay: in [0, 1), decay of the moving averages of parameters and statistics, which the state must have.
        loss_weights: factor of each named loss in the sum that is minimised; default 1.
        trainable: as in ``create_state``.

    Returns:
        ``step(state, batch) -> (state, metrics)``. The batch is a dict of arrays (with the data pipeline's names). The
        state is donated: its arrays can't be used after the call. Metrics are scalars, float32 (float64 in a float64
        model): each loss before weighting; "loss", the weighted sum; and "grad_norm", the norm of the whole gradient
        before any clipping. A label outside ``model.target_labels`` raises an error in the first batch, and makes
        losses and gradients NaN in later batches.

    Raises:
        ValueError: for a decay outside [0, 1), or a ``tx`` that requires another argument than ``value``, which the
            message names. The step raises it for averages without a decay or a decay without averages, an unknown loss
            in ``loss_weights``, a missing key in the batch, or a label in the first batch that the model doesn't allow,
            naming image and box.
    """
    if ema_decay is not None and not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay should be from 0 to below 1, got {ema_decay}")
    update = with_value(tx, model, trainable).update

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if (ema_decay is None) != (state.ema is None):
            given = "a state with averages and no ema_decay" if ema_decay is None else "ema_decay and no averages"
            raise ValueError(f"create_state(ema=True) and make_train_step(ema_decay=...) go together, got {given}")
        trained, frozen = split_trainable(model, state.params, trainable)
        images, targets = batch_inputs(model, batch)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        (loss, (losses, batch_stats)), gradients = loss_and_gradients(
            model, trained, frozen, state.batch_stats, images, targets, key, loss_weights=loss_weights
        )
        if routes.platform() == "cpu":  # else XLA copies each parameter that a gradient might yet read
            gradients = wait_for_all(gradients)
        updates, opt_state = update(gradients, state.opt_state, trained, value=loss)
        updated: Any = optax.apply_updates(trained, updates)  # optax's type: any tree
        params = merge(updated, frozen)
        new = dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            ema=None if ema_decay is None else _moved(state.ema, params, batch_stats, ema_decay),
        )
        metrics = {**losses, "loss": loss, "grad_norm": _norm(gradients)}
        return new, {name: value.astype(model.box_dtype) for name, value in metrics.items()}

    options: dict[str, Any] = {"donate_argnums": 0}
    if mesh is not None:
        whole, rows = replicated(mesh), by_rows(mesh)
        options |= {"in_shardings": (whole, rows), "out_shardings": whole}
    return CheckedStep(step, JitBySize(on_mesh(step, mesh), model.box_dtype, **options), model)


def make_loss_step(
    model: Any, *, mesh: Mesh | None = None, loss_weights: Mapping[str, float] | None = None
) -> Callable[[Mapping[str, Any], Batch], Metrics]:
    """Makes the function that computes validation losses.

    BatchNorm uses running statistics, and the RPN the numbers of candidates of inference. Sampling always uses the same
    key, so that losses of different steps can be compared.

    Args:
        model: the detector.
        mesh: as in ``make_train_step``.
        loss_weights: as in ``make_train_step``.

    Returns:
        ``loss_step(variables, batch) -> metrics``: each loss, and "loss", the weighted sum. Labels are checked as by
        the step of ``make_train_step``.

    Raises:
        ValueError: raised by the step for an unknown loss in ``loss_weights``, a missing key in the batch, or a label
            in the first batch that the model doesn't allow.
    """

    def loss_step(variables: Mapping[str, Any], batch: Batch) -> Metrics:
        images, targets = batch_inputs(model, batch)
        losses = model.apply(variables, images, targets, train=False, rngs={"sampling": jax.random.key(0)})
        metrics = {**losses, "loss": _weighted_sum(losses, loss_weights)}
        return {name: value.astype(model.box_dtype) for name, value in metrics.items()}

    options: dict[str, Any] = {}
    if mesh is not None:
        options = {"in_shardings": (replicated(mesh), by_rows(mesh)), "out_shardings": replicated(mesh)}
    return CheckedStep(loss_step, JitBySize(on_mesh(loss_step, mesh), model.box_dtype, **options), model)


def loss_and_gradients(
    model: Any,
    trainable: Params,
    frozen: Params,
    batch_stats: Params,
    images: ImageBatch,
    targets: Targets,
    key: jax.Array,
    *,
    loss_weights: Mapping[str, float] | None = None,
) -> tuple[tuple[jax.Array, tuple[Losses, Tree]], Tree]:
    """The part of the train step before the optimiser, for custom training steps.

    Args:
        model: the detector.
        trainable: the parameters to differentiate with respect to (see ``split``).
        frozen: the other parameters.
        batch_stats: the model's BatchNorm statistics.
        images: images of the batch.
        targets: targets of the batch.
        key: random key of the step.
        loss_weights: as in ``make_train_step``.

    Returns:
        ((loss, (losses by name, new batch_stats)), gradients), as of ``jax.value_and_grad``; losses are scalars.
    """

    def total(trainable: Params) -> tuple[jax.Array, tuple[Losses, Tree]]:
        losses, updates = model.apply(
            {"params": merge(trainable, frozen), "batch_stats": batch_stats},
            images,
            targets,
            train=True,
            rngs={"sampling": key, "dropout": jax.random.fold_in(key, 1)},  # dropout: only custom parts use it
            mutable=["batch_stats"],
        )
        return _weighted_sum(losses, loss_weights), (losses, updates.get("batch_stats", batch_stats))

    return jax.value_and_grad(total, has_aux=True)(trainable)


def batch_inputs(model: Any, batch: Batch) -> tuple[ImageBatch, Targets]:
    """The model's arguments, from a data pipeline's dict of arrays.

    Args:
        model: the detector; boxes are cast to ``model.box_dtype``.
        batch: {"pixels": [B, H, W, 3] normalised, "size", "original_size" and (only where some canvas is smaller than
            the bucket) "canvas": [B, 2] int32, "boxes": [B, G, 4] xyxy in pixels of
            the resized images, "labels": [B, G] int32, "valid": [B, G] bool}.

    Returns:
        The images and the targets.

    Raises:
        ValueError: if a key is missing; names all missing keys.
    """
    missing = [name for name in BATCH_KEYS if name not in batch and name != "canvas"]
    if missing:
        raise ValueError(f"the batch lacks {', '.join(missing)}; it has {', '.join(batch)}")
    images = ImageBatch(
        pixels=batch["pixels"],
        size=batch["size"],
        original_size=batch["original_size"],
        canvas=batch.get("canvas"),
    )
    boxes = jnp.asarray(batch["boxes"]).astype(model.box_dtype)
    return images, Targets(boxes=boxes, labels=batch["labels"], valid=batch["valid"])


def _weighted_sum(losses: Losses, weights: Mapping[str, float] | None) -> jax.Array:
    weights = weights or {}
    if unknown := sorted(weights.keys() - losses.keys()):
        raise ValueError(f"loss_weights has {', '.join(unknown)}; the model's losses are {', '.join(losses)}")
    weighted = [value if name not in weights else weights[name] * value for name, value in losses.items()]
    return sum(weighted[1:], weighted[0])


def _norm(tree: Tree) -> jax.Array:
    """Norm of all leaves together; the dtypes of the leaves may differ."""
    squares = [jnp.sum(jnp.square(leaf.astype(at_least_float32(leaf.dtype)))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(jnp.sum(jnp.stack([square.astype(jnp.result_type(float)) for square in squares])))


def _moved(averages: Any, params: Tree, batch_stats: Tree, decay: float) -> dict[str, Tree]:
    # Like optax.incremental_update, but in a form that leaves the averages of frozen parameters unchanged to the bit.
    new = {"params": params, "batch_stats": batch_stats}
    return jax.tree.map(lambda average, value: average + (1 - decay) * (value - average), averages, new)
