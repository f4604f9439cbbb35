"""Initialisation: every constant exactly torchvision's, every random tensor of the same distribution.

Two samples of the same distribution differ by chance, and by how much is known from their sizes: the bars below
are six standard errors (or, where a statistic isn't normal, what chance exceeds as rarely: 2e-9). Seeds are fixed.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdet.convert import reference, to_torchvision
from flaxdet.models import FCOS, FasterRCNN, FastRCNNConvFCHead, RPNHead
from flaxdet.models.initial import initial_variables

torch = pytest.importorskip("torch")

SIGMAS = 6.0
RARE = 2e-9  # the chance of six standard errors
SAMPLE = 100_000  # values of a tensor that are enough to compare
TAIL = 2.3  # standard deviations: the truncated normal of jax and Flax ends at 2.27 of them
WIDTH = 32  # GroupNorm's groups


def differences(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """What two equally large samples differ by, each relative to its bar: above 1 is no chance.

    The mean; the variance; the whole distribution (Kolmogorov and Smirnov); the tail, which tells a normal from one
    that is cut off; the extremes, where the distribution has an end.
    """
    n = ours.size
    ours, theirs = (np.sort(x.ravel().astype(np.float64)) for x in (ours, theirs))
    both = np.concatenate([ours, theirs])
    variance = both.var()
    kurtosis = ((both - both.mean()) ** 4).mean() / variance**2
    found = {
        "mean": abs(ours.mean() - theirs.mean()) / (SIGMAS * np.sqrt(2 * variance / n)),
        "variance": abs(ours.var() - theirs.var()) / (SIGMAS * variance * np.sqrt(2 * (kurtosis - 1) / n)),
    }
    ranks = [np.searchsorted(x, both, side="right") / n for x in (ours, theirs)]
    found["distribution"] = np.abs(ranks[0] - ranks[1]).max() / np.sqrt(-np.log(RARE / 2) / n)
    tails = [int((np.abs(x - both.mean()) > TAIL * np.sqrt(variance)).sum()) for x in (ours, theirs)]
    found["tail"] = abs(tails[0] - tails[1]) / (SIGMAS * np.sqrt(sum(tails) + 1))
    if kurtosis < 2.1:  # 1.8 is a uniform's; its extreme lies within a few nths of the bound
        extremes = [np.abs(x).max() for x in (ours, theirs)]
        found["extreme"] = abs(extremes[0] - extremes[1]) / (max(extremes) * -np.log(RARE) / n)
    return found


def test_the_bars_tell_distributions_apart():
    """What the comparison is worth: at 2,304 values (the smallest kernel here) each of these shows."""
    rng = np.random.default_rng(0)
    n = 2304
    normal = functools.partial(rng.normal, size=n)
    uniform = functools.partial(rng.uniform, size=n)
    cut = rng.normal(size=3 * n)
    cut = cut[np.abs(cut) < 2][:n] / 0.8796  # Flax's truncated normal, of the same standard deviation
    for a, b in [
        (normal(), normal(0, 1.2)),
        (normal(), normal(0.3, 1)),
        (normal(), uniform(-(3**0.5), 3**0.5)),
        (normal(), np.resize(cut, n)),
        (uniform(-1, 1), uniform(-1.02, 1.02)),
        (uniform(-1, 1), uniform(0, 2)),
    ]:
        assert max(differences(a, b).values()) > 1, differences(a, b)
    for draw in (normal, functools.partial(uniform, -1, 1)):
        assert all(max(differences(draw(), draw()).values()) < 1 for _ in range(100))


def compare(ours: list[dict[str, np.ndarray]], theirs: list[dict[str, np.ndarray]], random: int) -> None:
    """Our state_dicts of several seeds against as many of torchvision's, tensor by tensor."""
    assert list(ours[0]) == list(theirs[0])
    faults, drawn = [], 0
    for key in ours[0]:
        found, expected = (np.stack([np.asarray(state[key]) for state in states]) for states in (ours, theirs))
        assert found.shape == expected.shape, key
        if (expected == expected.flat[0]).all():
            if not (found == expected.flat[0]).all():
                faults.append(f"{key}: expected {expected.flat[0]!r}, found {found.min()!r} to {found.max()!r}")
            continue
        drawn += 1
        step = -(-found[0].size // SAMPLE)
        found, expected = (x.reshape(len(x), -1)[:, ::step] for x in (found, expected))
        faults += [
            f"{key} {ours[0][key].shape}: {what} differs by {value:.1f} times the bar"
            for what, value in differences(found, expected).items()
            if not value < 1
        ]
        if len(found) > 1:
            assert not np.array_equal(found[0], found[1]), f"{key}: the same for two keys"
    assert not faults, "\n".join(faults)
    assert drawn == random
    kernels = [value.ravel()[:32] for key, value in ours[0].items() if value.ndim > 1]
    assert len(np.unique(np.stack(kernels), axis=0)) == len(kernels), "two tensors are the same draw"


def initial(model, seeds: int) -> list[dict[str, np.ndarray]]:
    return [to_torchvision(model, initial_variables(model, jax.random.key(i))) for i in range(seeds)]


def torch_initial(build, seeds: int) -> list[dict[str, np.ndarray]]:
    states = []
    with torch.random.fork_rng(devices=[]):
        for seed in range(seeds):
            torch.manual_seed(seed)
            states.append({key: tensor.numpy() for key, tensor in build().state_dict().items()})
    return states


class Maps(nn.Module):
    """A backbone without parameters: here the heads matter."""

    out_channels: int = WIDTH

    def __call__(self, x):
        return {str(i): jnp.zeros((len(x), 2, 2, WIDTH), x.dtype) for i in range(5)}


class TorchMaps(torch.nn.Module):
    out_channels = WIDTH


def fcos():
    detection = reference.torchvision().models.detection
    return FCOS(Maps(), 91), lambda: detection.FCOS(TorchMaps(), 91)


def faster_rcnn():
    rcnn = reference.torchvision().models.detection.faster_rcnn
    return FasterRCNN(Maps(), 91), lambda: rcnn.FasterRCNN(TorchMaps(), 91)


def faster_rcnn_with_convolutions():
    """Version 2's heads, the box head's convolutions with biases for want of a BatchNorm."""
    rcnn = reference.torchvision().models.detection.faster_rcnn
    parts = {
        "rpn_head": RPNHead(WIDTH, 3, conv_depth=2),
        "box_head": FastRCNNConvFCHead((WIDTH, 7, 7), (40, 24), (64, 1024)),
    }

    def theirs():
        rpn_head = rcnn.RPNHead(WIDTH, 3, conv_depth=2)
        box_head = rcnn.FastRCNNConvFCHead((WIDTH, 7, 7), [40, 24], [64, 1024])
        return rcnn.FasterRCNN(TorchMaps(), 91, rpn_head=rpn_head, box_head=box_head)

    return FasterRCNN(Maps(), 91, **parts), theirs


# Without a backbone they are small: several seeds, as the biases of dense layers have few values.
@pytest.mark.parametrize(
    ("both", "random"),
    [
        (fcos, 8 + 3),
        pytest.param(faster_rcnn, 3 + 4 * 2, marks=pytest.mark.ci),
        (faster_rcnn_with_convolutions, 4 + 2 + 4 * 2),
    ],
)
def test_heads(both, random):
    ours, theirs = both()
    seeds = 8
    compare(initial(ours, seeds), torch_initial(theirs, seeds), random)
