"""Many draws of ``balanced_sample`` and of torchvision's sampler: as many chosen each time, each as often.

A sample of k of n candidates holds each with the probability p = k/n. Of D draws, the number that hold a candidate is
binomial, with the variance D p (1 - p). That any two candidates exclude each other a little makes the covariance of all
n numbers D p (1 - p) n / (n - 1) (I - 1/n), so the sum of their squared deviations over D p (1 - p) n / (n - 1) follows
chi-square with n - 1 degrees of freedom. Both the largest deviation and this sum have to lie where all but one in a
million samplings do.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from flaxdet.ops import balanced_sample
from tests.ops.cases import torchvision

DRAWS = 5000
RARE = 1e-6  # the share of fair samplers that a bound would refuse, were the keys not fixed

# (positives, negatives, ignored), (batch size, share of positives); 250 labels each, for which XLA compiles once
REGIMES = {
    "plenty": ((50, 190, 10), (32, 0.5)),
    "plenty, odd": ((50, 190, 10), (31, 0.3)),
    "few positives": ((3, 200, 47), (32, 0.5)),
    "few negatives": ((80, 5, 165), (32, 0.5)),
    "no positives": ((0, 200, 50), (32, 0.25)),
    "no negatives": ((80, 0, 170), (32, 0.25)),
    "few of both": ((4, 6, 240), (32, 0.5)),
    "none": ((0, 0, 250), (32, 0.5)),
}


def labels_of(positives: int, negatives: int, ignored: int) -> np.ndarray:
    labels = np.concatenate([np.arange(positives) % 7 + 1, np.zeros(negatives), np.full(ignored, -1)])
    return np.random.default_rng(0).permutation(labels).astype(np.int64)


draw = jax.jit(jax.vmap(balanced_sample, in_axes=(0, None, None, None)), static_argnums=(2, 3))


def ours(labels: np.ndarray, batch_size: int, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Masks [D, N] of the positives and of the negatives chosen."""
    keys = jax.random.split(jax.random.key(0), DRAWS)
    positive, negative = draw(keys, jnp.asarray(labels, jnp.int32), batch_size, fraction)
    return np.asarray(positive), np.asarray(negative)


def theirs(labels: np.ndarray, batch_size: int, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    torchvision()
    import torch
    from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

    with torch.random.fork_rng():
        torch.manual_seed(0)
        masks = BalancedPositiveNegativeSampler(batch_size, fraction)([torch.tensor(labels)] * DRAWS)
    positive, negative = (np.stack([mask.numpy() for mask in side]).astype(bool) for side in masks)
    return positive, negative


def is_uniform(chosen: np.ndarray) -> bool:
    """Whether D samples [D, n], all of the same number of candidates, hold each as often as a fair sampler's do."""
    draws, candidates = chosen.shape
    (size,) = set(chosen.sum(axis=1).tolist())
    share = size / candidates
    held = chosen.sum(axis=0)
    if share in (0, 1):
        return bool(np.all(held == share * draws))
    each = RARE / candidates / 2  # the largest of n deviations, to either side
    low, high = stats.binom.ppf(each, draws, share), stats.binom.isf(each, draws, share)
    variance = draws * share * (1 - share) * candidates / (candidates - 1)
    total = np.sum((held - share * draws) ** 2) / variance
    low_total, high_total = stats.chi2.ppf([RARE / 2, 1 - RARE / 2], candidates - 1)
    return bool(np.all((held >= low) & (held <= high)) and low_total <= total <= high_total)


@pytest.mark.parametrize("regime", REGIMES)
def test_counts_and_frequencies(regime):
    sizes, options = REGIMES[regime]
    labels = labels_of(*sizes)
    for found, expected, candidates in zip(
        ours(labels, *options), theirs(labels, *options), (labels >= 1, labels == 0), strict=True
    ):
        np.testing.assert_array_equal(found.sum(axis=1), expected.sum(axis=1))  # in every single draw
        for chosen in (found, expected):
            assert not chosen[:, ~candidates].any()
            if candidates.any():
                assert is_uniform(chosen[:, candidates])


@pytest.mark.parametrize("kind", ["favours one", "leaves out one", "favours a half", "takes turns"])
def test_unfair_samplers_are_refused(kind):
    """Of 60 candidates 16: one a quarter more often, or never; a half by 5%; or too evenly to be by chance."""
    rng = np.random.default_rng(0)
    tickets = rng.random((DRAWS, 60))
    assert is_uniform(tickets.argsort(axis=1).argsort(axis=1) < 16)  # the fair one
    if kind == "favours one":
        tickets[:, 7] *= 0.8
    elif kind == "leaves out one":
        tickets[:, 7] = 1
    elif kind == "favours a half":
        tickets[:, :30] *= 0.95
    else:
        tickets = (np.arange(60)[None] - 16 * np.arange(DRAWS)[:, None]) % 60
    assert not is_uniform(tickets.argsort(axis=1).argsort(axis=1) < 16)
