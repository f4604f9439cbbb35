from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdet.ops import balanced_sample
from flaxdet.xla.routes import routes_for
from tests.ops.cases import torchvision


def labels_of(positives: int, negatives: int, ignored: int) -> np.ndarray:
    labels = np.concatenate((np.arange(positives) % 3 + 1, np.zeros(negatives), np.full(ignored, -1)))
    return np.random.default_rng(0).permutation(labels).astype(np.int32)


sample = jax.jit(balanced_sample, static_argnums=(2, 3))


@pytest.mark.parametrize(
    ("positives", "negatives", "ignored"),
    # 280 labels in each case but the last, so that XLA compiles one program for these cases
    [(50, 200, 30), (5, 200, 75), (50, 3, 227), (2, 3, 275), (0, 60, 220), (60, 0, 220), (0, 0, 280), (0, 0, 0)],
)
@pytest.mark.parametrize(("batch_size", "fraction"), [(32, 0.5), (31, 0.25), (16, 1.0), (16, 0.0), (0, 0.5)])
def test_numbers_as_in_torchvision(positives, negatives, ignored, batch_size, fraction):
    torchvision()
    import torch
    from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

    labels = labels_of(positives, negatives, ignored)
    (theirs_positive,), (theirs_negative,) = BalancedPositiveNegativeSampler(batch_size, fraction)(
        [torch.tensor(labels)]
    )
    ours = sample(jax.random.key(1), jnp.asarray(labels), batch_size, fraction)
    for mask, theirs, candidates in zip(
        ours, (theirs_positive, theirs_negative), (labels >= 1, labels == 0), strict=True
    ):
        mask = np.asarray(mask)
        assert mask.dtype == bool
        assert mask.shape == labels.shape
        assert not (mask & ~candidates).any()
        assert mask.sum() == theirs.sum()
        if theirs.sum() == candidates.sum():  # exhaustive: no choice is left
            np.testing.assert_array_equal(mask, theirs.numpy().astype(bool))


def test_every_candidate_is_as_likely_and_pairs_are_independent():
    labels = labels_of(12, 20, 5)
    draws = 4000
    draw = jax.jit(jax.vmap(lambda key: balanced_sample(key, jnp.asarray(labels), 12, 0.5)))
    positive, negative = (np.asarray(m) for m in draw(jax.random.split(jax.random.key(0), draws)))
    for masks, candidates, expected in ((positive, labels >= 1, 6 / 12), (negative, labels == 0, 6 / 20)):
        chosen = masks[:, candidates].astype(float)
        frequency = chosen.mean(axis=0)
        # five standard deviations of a binomial
        bound = 5 * np.sqrt(expected * (1 - expected) / draws)
        np.testing.assert_allclose(frequency, expected, atol=bound)
        # two members of one sample of k out of n exclude each other a little: k(k-1) / n(n-1)
        n, k = chosen.shape[1], 6
        together = (chosen.T @ chosen / draws)[np.triu_indices(n, 1)]
        likely = k * (k - 1) / (n * (n - 1))
        np.testing.assert_allclose(together, likely, atol=5 * np.sqrt(likely * (1 - likely) / draws))
        assert not masks[:, ~candidates].any()
    # which positives were chosen says nothing of the negatives
    crossed = np.corrcoef(positive[:, labels >= 1].T, negative[:, labels == 0].T)[:12, 12:]
    assert np.abs(crossed).max() < 5 / np.sqrt(draws)


def test_equal_keys_choose_equally_and_others_otherwise():
    labels = jnp.asarray(labels_of(100, 300, 0))
    run = jax.jit(partial(balanced_sample, batch_size=64, positive_fraction=0.5))
    first, again, other = (np.concatenate(run(jax.random.key(seed), labels)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_same_choice_in_float64_mode():
    labels = labels_of(40, 60, 3)
    results = []
    for enabled in (False, True):
        with jax.enable_x64(enabled):
            run = jax.jit(partial(balanced_sample, batch_size=20, positive_fraction=0.3))
            results.append(np.concatenate(run(jax.random.key(7), jnp.asarray(labels))))
    np.testing.assert_array_equal(*results)


def test_images_of_a_batch_have_their_own_numbers():
    labels = np.stack((labels_of(50, 30, 0), labels_of(3, 7, 70)))
    draw = jax.jit(jax.vmap(partial(balanced_sample, batch_size=16, positive_fraction=0.5)))
    positive, negative = draw(jax.random.split(jax.random.key(0)), jnp.asarray(labels))
    np.testing.assert_array_equal(positive.sum(axis=1), [8, 3])
    np.testing.assert_array_equal(negative.sum(axis=1), [8, 7])


def test_bad_numbers():
    labels = jnp.zeros(3, jnp.int32)
    with pytest.raises(ValueError, match="batch_size must not be negative, found -1"):
        balanced_sample(jax.random.key(0), labels, -1, 0.5)
    with pytest.raises(ValueError, match=r"positive_fraction must lie in \[0, 1\], found 1.5"):
        balanced_sample(jax.random.key(0), labels, 4, 1.5)


def test_gpus_choose_as_cpus_do():
    """An RPN's anchors, of which a GPU must not sort all: the same key chooses the same elements."""
    labels = jnp.asarray(labels_of(700, 20_000, 5_000))
    masks = []
    for platform in ("cpu", "gpu"):
        with routes_for(platform):
            masks.append(
                jax.jit(partial(balanced_sample, batch_size=256, positive_fraction=0.5))(jax.random.key(3), labels)
            )
    for cpu, gpu in zip(*masks, strict=True):
        assert cpu.sum() == 128
        np.testing.assert_array_equal(gpu, cpu)
