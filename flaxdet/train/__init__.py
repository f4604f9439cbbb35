"""Training with optax, on one device or many."""

from flaxdet.train.checkpoints import Checkpoints
from flaxdet.train.loop import InterruptedTrainingError, NonFiniteLossError, evaluation_variables, fit
from flaxdet.train.mask import decay_mask, merge, norm_mask, split, trainable_mask
from flaxdet.train.recipes import (
    Recipe,
    fasterrcnn_v2_recipe,
    fcos_recipe,
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
    "fasterrcnn_v2_recipe",
    "fcos_recipe",
    "fit",
    "loss_and_gradients",
    "make_loss_step",
    "make_mesh",
    "make_train_step",
    "merge",
    "norm_mask",
    "replicate",
    "sgd",
    "shard_batch",
    "split",
    "split_trainable",
    "trainable_mask",
    "warmup_cosine_schedule",
    "warmup_multistep_schedule",
]
