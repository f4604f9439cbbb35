"""Training with optax, on one device or many."""

import functools
from typing import Any

from flaxdet import registry
from flaxdet.train.checkpoints import Checkpoints
from flaxdet.train.loop import InterruptedTrainingError, NonFiniteLossError, evaluation_variables, fit
from flaxdet.train.mask import decay_mask, merge, norm_mask, split, trainable_mask
from flaxdet.train.recipes import (
    Recipe,
    recipe,
    sgd,
    warmup_cosine_schedule,
    warmup_multistep_schedule,
)
from flaxdet.train.sharding import replicate, shard_batch
from flaxdet.train.state import TrainState, create_state, split_trainable
from flaxdet.train.step import batch_inputs, loss_and_gradients, make_loss_step, make_train_step
from flaxdet.xla.mesh import make_mesh

__all__ = [
    "Checkpoints",
    "InterruptedTrainingError",
    "NonFiniteLossError",
    "Recipe",
    "TrainState",
    "batch_inputs",
    "create_state",
    "decay_mask",
    "evaluation_variables",
    "fit",
    "loss_and_gradients",
    "make_loss_step",
    "make_mesh",
    "make_train_step",
    "merge",
    "norm_mask",
    "recipe",
    "replicate",
    "sgd",
    "shard_batch",
    "split",
    "split_trainable",
    "trainable_mask",
    "warmup_cosine_schedule",
    "warmup_multistep_schedule",
]


def __getattr__(name: str) -> Any:
    """A recipe by the name that its architecture has for it."""
    for architecture in registry.architectures():
        if name == architecture.training.alias:
            return functools.partial(recipe, architecture.name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
