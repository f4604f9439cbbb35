"""Training learns: eight synthetic images by heart, from random weights, in the loop that users run."""

from __future__ import annotations

import jax
import optax
import pytest

from flaxdet.data import read_coco, train_batches
from flaxdet.evaluation.evaluate import evaluate
from flaxdet.train import create_state, evaluation_variables, fit, make_train_step
from tests.tiny import FCOS_NAME, V2_NAME, tiny_model, tiny_variables, write_coco

STEPS = 150


@pytest.mark.release  # in CI a notebook trains a detector to AP50 of .85
@pytest.mark.parametrize("name", [FCOS_NAME, V2_NAME])
def test_eight_images(name, tmp_path):
    dataset = read_coco(*write_coco(tmp_path, count=8))
    model = tiny_model(name, **({"score_thresh": 0.05} if name == FCOS_NAME else {}))
    schedule = optax.cosine_decay_schedule(3e-3 if name == FCOS_NAME else 2e-3, STEPS)
    with jax.numpy_dtype_promotion("standard"):  # optax's adam
        tx = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(schedule))
        state = create_state(model, tiny_variables(model), tx, key=jax.random.key(0))
        untrained = evaluate(model, evaluation_variables(state), dataset, batch_size=8)
        batches = train_batches(dataset, model.transform, batch_size=8, steps=STEPS)
        state = fit(make_train_step(model, tx), state, batches, steps=STEPS, progress=False)
    trained = evaluate(model, evaluation_variables(state), dataset, batch_size=8)
    assert untrained.ap50 is not None
    assert trained.ap50 is not None
    assert untrained.ap50 < 0.1
    assert trained.ap50 >= 0.9
    assert trained.images == 8
