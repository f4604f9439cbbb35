"""Trains the weights of `flaxdet detect --demo`: the tiny FCOS, from random variables, on the blood cells of BCCD.

    python benchmarks/train_demo.py --data BCCD --out flaxdet/zoo/demo/blood_cells.safetensors

BCCD is a folder with images/, train.json and val.json in COCO's format (https://github.com/Shenggan/BCCD_Dataset).
Needs the extra ``train``. Prints the losses of each epoch, and COCO's figures on val.json as it goes. The weights
written are the last moving averages; the same seed on the same machine gives the same.

40 epochs take a quarter of an hour of one core, and end at AP .465, AP50 .809. 20 epochs end at .474 and .826, with
lower scores and more doubtful boxes in the pictures of the demonstration.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import optax

import flaxdet
from flaxdet.data import read_coco, train_batches
from flaxdet.evaluation.evaluate import evaluate
from flaxdet.models.initial import initial_variables
from flaxdet.registry import make_model
from flaxdet.train import create_state, decay_mask, evaluation_variables, fit, make_train_step, warmup_cosine_schedule
from flaxdet.zoo._tiny import NAME

BATCH = 4
RATE, WARMUP_EPOCHS, DECAY, EMA = 2e-3, 2, 0.01, 0.995


class Printed:
    """A writer of the training loop's log to the terminal."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Prints numbers by name."""
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        print(f"{time.perf_counter() - self.start:6.0f} s, step {step}: {numbers}", flush=True)

    def close(self) -> None:
        """Nothing is left to write."""


def main() -> None:
    """Trains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with images/, train.json and val.json")
    parser.add_argument("--out", type=Path, required=True, help="the file of weights, .safetensors")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--evaluate-every", type=int, default=5, help="in epochs")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    train = read_coco(arguments.data / "images", arguments.data / "train.json", remove_empty=True)
    val = read_coco(arguments.data / "images", arguments.data / "val.json", categories=train.categories)
    model = make_model(NAME, num_classes=len(train.categories))
    key = jax.random.key(arguments.seed)
    variables = initial_variables(model, key)
    size = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    print(f"{NAME}: {size:,} parameters, {', '.join(train.categories[1:])}; {len(train)} images", flush=True)

    per_epoch = -(-len(train) // BATCH)
    steps = per_epoch * arguments.epochs
    schedule = warmup_cosine_schedule(RATE, per_epoch, arguments.epochs, warmup_steps=WARMUP_EPOCHS * per_epoch)
    tx = optax.chain(optax.clip_by_global_norm(10.0), optax.adamw(schedule, weight_decay=DECAY, mask=decay_mask))
    batches = train_batches(train, model.transform, batch_size=BATCH, steps=steps, seed=arguments.seed)

    def report(variables: Any, step: int) -> dict[str, float]:
        flaxdet.save(arguments.out, model, variables, categories=train.categories)
        result = evaluate(model, variables, val, batch_size=BATCH)
        return {"AP": result.ap or 0.0, "AP50": result.ap50 or 0.0}

    state = fit(
        make_train_step(model, tx, ema_decay=EMA),
        create_state(model, variables, tx, key=key, ema=True),
        batches,
        steps=steps,
        schedule=schedule,
        evaluate=report,
        evaluate_every=arguments.evaluate_every * per_epoch,
        writers=[Printed()],
        log_every=per_epoch,
        progress=False,
    )
    variables = evaluation_variables(state)
    flaxdet.save(arguments.out, model, variables, categories=train.categories)
    print(evaluate(model, variables, val).table())
    print(f"{arguments.out}: {arguments.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
