"""Writes nms.npz and roi_align.npz beside this file: the answers of torchvision's own C++ ops.

    python tests/golden/make_ops_golden.py

needs torch and torchvision with working C++ ops (made with 2.13.0 and 0.28.0); the tests then need neither.
Inputs are float32 and run in float32 and, unchanged, in float64; both answers are stored.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torchvision
from torchvision.ops.poolers import LevelMapper

FOLDER = Path(__file__).parent
PRECISIONS = {"float32": torch.float32, "float64": torch.float64}
# Few sizes, so that the tests compile few programs; LARGE needs several chunks and blocks of the algorithm.
SMALL, LARGE = 168, 1300
rng = np.random.default_rng(20240607)


def random_boxes(n, side=(4, 60), canvas=200):
    """[n, 4] boxes of log-uniform sides, some of them partly outside the canvas."""
    centre = rng.uniform(0, canvas, (n, 2))
    size = np.exp(rng.uniform(*np.log(side), (n, 2)))
    return np.concatenate([centre - size / 2, centre + size / 2], axis=1)


def crowd(n, objects):
    """[n, 4] boxes that jitter about few objects, as a detector's do."""
    base = random_boxes(objects, side=(20, 80))
    return base[rng.integers(0, objects, n)] + rng.normal(0, 3, (n, 4))


def integer_boxes(n):
    """[n, 4] integer boxes on a small grid: many IoUs are exactly 1/2, 3/5, 7/10."""
    corner = rng.integers(0, 4, (n, 2))
    return np.concatenate([corner, corner + rng.integers(1, 11, (n, 2))], axis=1)


def chain(n, step):
    """[n, 4] boxes each of which overlaps only its neighbours."""
    x = np.arange(n) * step
    return np.stack([x, 0 * x, x + 10, 0 * x + 10], axis=1)


def with_values(boxes, values, rows):
    boxes = boxes.copy()
    for row in rows:
        boxes[row, rng.integers(0, 4)] = values[row % len(values)]
    return boxes


def nms_cases():
    """Yields (name, boxes, scores, idxs or None, threshold)."""

    def scores(n):
        return rng.uniform(size=n)

    yield "random", random_boxes(SMALL), scores(SMALL), None, 0.5
    yield "many_kept", random_boxes(LARGE, side=(2, 30), canvas=800), scores(LARGE), None, 0.4
    yield "crowd", crowd(LARGE, 12), scores(LARGE), None, 0.7
    yield "chain_best_first", chain(SMALL, 3), np.linspace(1, 0, SMALL), None, 0.5
    yield "chain_best_last", chain(SMALL, 3), np.linspace(0, 1, SMALL), None, 0.5
    yield "chain_shuffled", chain(SMALL, 2), scores(SMALL), None, 0.5
    yield "duplicates", np.repeat(random_boxes(SMALL // 8), 8, axis=0), scores(SMALL), None, 0.9
    yield "ties", crowd(SMALL, 20), rng.integers(0, 4, SMALL) / 4, None, 0.5
    yield "all_tied", crowd(SMALL, 20), np.full(SMALL, 0.5), None, 0.5
    for threshold in (0.5, 0.6, 0.7):
        yield f"integers_{threshold}", integer_boxes(SMALL), scores(SMALL), None, threshold
    yield "threshold_0", random_boxes(SMALL), scores(SMALL), None, 0.0
    yield "threshold_1", np.repeat(random_boxes(SMALL // 3), 3, axis=0), scores(SMALL), None, 1.0
    flat = random_boxes(SMALL)
    flat[::2, 2] = flat[::2, 0]
    flat[1::4] = flat[::4]
    yield "zero_area", flat, scores(SMALL), None, 0.3
    inverted = crowd(SMALL, 8)
    inverted[::3] = inverted[::3][:, [2, 1, 0, 3]]
    inverted[1::3] = inverted[1::3][:, [2, 3, 0, 1]]
    yield "inverted", inverted, scores(SMALL), None, 0.3
    some = range(0, SMALL, 3)
    yield "nan_boxes", with_values(crowd(SMALL, 6), [np.nan], some), scores(SMALL), None, 0.5
    yield "infinite_boxes", with_values(crowd(SMALL, 6), [np.inf, -np.inf], some), scores(SMALL), None, 0.5
    special = scores(SMALL)
    for i, value in enumerate([np.nan, np.inf, -np.inf, 0.0, -0.0, np.nan, -np.inf, np.inf]):
        special[i::11] = value
    yield "special_scores", crowd(SMALL, 40), special, None, 0.5
    yield "one", random_boxes(1), scores(1), None, 0.5
    yield "empty", np.zeros((0, 4)), scores(0), None, 0.5
    yield "classes_few", crowd(SMALL, 3), scores(SMALL), rng.integers(0, 3, SMALL), 0.5
    yield "classes_many", crowd(SMALL, 1), scores(SMALL), rng.integers(-5, 86, SMALL), 0.5
    yield "classes_ties", crowd(SMALL, 3), rng.integers(0, 5, SMALL) / 5, rng.integers(0, 4, SMALL), 0.6
    yield "classes_integers", integer_boxes(SMALL), scores(SMALL), rng.integers(0, 3, SMALL), 0.6


def keep(boxes, scores, idxs, threshold):
    """torchvision's NMS, class by class without the offset trick, in a stable order of score."""
    if idxs is None:
        return torchvision.ops.nms(boxes, scores, threshold)
    kept = torch.zeros(len(boxes), dtype=torch.bool)
    for value in torch.unique(idxs):
        members = torch.where(idxs == value)[0]
        kept[members[torchvision.ops.nms(boxes[members], scores[members], threshold)]] = True
    kept = torch.where(kept)[0]
    return kept[torch.sort(scores[kept], descending=True, stable=True)[1]]


def nms_golden():
    arrays = {}
    for name, boxes, scores, idxs, threshold in nms_cases():
        case = {
            "boxes": boxes.astype(np.float32),
            "scores": scores.astype(np.float32),
            "threshold": threshold,
        }
        if idxs is not None:
            case["idxs"] = idxs.astype(np.int32)
        for precision, dtype in PRECISIONS.items():
            tensors = (torch.tensor(case["boxes"], dtype=dtype), torch.tensor(case["scores"], dtype=dtype))
            classes = None if idxs is None else torch.tensor(idxs)
            case[precision] = keep(*tensors, classes, threshold).numpy().astype(np.int32)
        arrays |= {f"{name}/{key}": np.asarray(value) for key, value in case.items()}
    return arrays


def roi_boxes():
    """[28, 4] boxes in the pixels of a 36x48 image."""
    inside = random_boxes(8, side=(3, 30), canvas=36)
    special = [
        [0, 0, 48, 36],  # the image
        [0, 0, 4, 4],  # one feature pixel
        [5, 5, 5, 5],  # zero size
        [7.3, 2.1, 7.4, 2.15],  # tiny
        [20, 20, 10, 8],  # inverted
        [20, 8, 10, 20],
        [-30, -30, -10, -10],  # outside
        [60, 50, 90, 80],
        [-4, -4, 8, 8],  # over each corner
        [40, 30, 56, 44],
        [44, 32, 48, 36],
        [-2, 30, 12, 40],
        [-1000, -1000, 1000, 1000],  # huge
        [-1e6, 3, 1e6, 9],
        [46, 0, 50, 36],  # over an edge
        [0, 34, 48, 38],
        [47.9, 35.9, 48, 36],
        [-0.5, -0.5, 0.5, 0.5],
        [-6, -6, -2, -2],  # samples between -1 and 0
        [48, 36, 52, 40],
    ]
    return np.concatenate([inside, np.array(special)]).astype(np.float32)


# name: (output size, sampling ratio, aligned)
ROI_CASES = {
    "plain": ((7, 7), 2, False),
    "aligned": ((3, 3), 2, True),
    "one_sample": ((2, 3), 1, False),
    "one_sample_aligned": ((3, 2), 1, True),
    "tall": ((5, 2), 2, False),
    "three_samples": ((2, 4), 3, False),
    "three_samples_aligned": ((2, 2), 3, True),
}


def cotangent(shape):
    """[N, h, w, C] a fixed gradient of the output; the test computes the same."""
    return np.cos(np.arange(np.prod(shape))).reshape(shape)


def to_torch(features, dtype):
    return torch.tensor(features, dtype=dtype).permute(2, 0, 1)[None]


def roi_align_golden():
    features = rng.normal(size=(9, 12, 2)).astype(np.float32)
    boxes = roi_boxes()
    arrays = {"features": features, "boxes": boxes}
    for name, (size, samples, aligned) in ROI_CASES.items():
        arrays |= {f"{name}/output_size": np.array(size), f"{name}/sampling_ratio": np.array(samples)}
        arrays[f"{name}/aligned"] = np.array(aligned)
        for precision, dtype in PRECISIONS.items():
            leaf = to_torch(features, dtype).requires_grad_()
            rois = torch.cat([torch.zeros(len(boxes), 1, dtype=dtype), torch.tensor(boxes, dtype=dtype)], 1)
            out = torchvision.ops.roi_align(leaf, rois, size, 0.25, samples, aligned).permute(0, 2, 3, 1)
            out.backward(torch.tensor(cotangent(out.shape), dtype=dtype))
            arrays[f"{name}/{precision}"] = out.detach().numpy()
            if precision == "float64":
                assert leaf.grad is not None
                arrays[f"{name}/gradient"] = leaf.grad[0].permute(1, 2, 0).numpy()
    return arrays | multiscale_golden() | level_golden()


def multiscale_golden():
    """The pyramid of a 96x128 image; with canonical scale 32 at level 3, small boxes reach every level."""
    pyramid = [rng.normal(size=(96 >> k, 128 >> k, 2)).astype(np.float32) for k in (2, 3, 4, 5)]
    edges = np.array([[0, 0, s, s] for s in (8, 16, 32, 64, 112, 224, 448, 1000)])
    odd = np.array([[9, 9, 9, 9], [30, 30, 20, 20], [50, 10, 20, 60], [0, 0, 128, 96]])  # no area, inverted
    boxes = np.concatenate([random_boxes(24, side=(4, 120), canvas=110), edges, odd]).astype(np.float32)
    arrays = {"pyramid/boxes": boxes} | {f"pyramid/features_{k}": level for k, level in enumerate(pyramid)}
    for name, levels, scale, level in (
        ("pyramid_224", 4, 224, 4),
        ("pyramid_32", 4, 32, 3),
        ("single", 1, 224, 4),
    ):
        for precision, dtype in PRECISIONS.items():
            names = [str(k) for k in range(levels)]
            pool = torchvision.ops.MultiScaleRoIAlign(names, 3, 2, canonical_scale=scale, canonical_level=level)
            features = {k: to_torch(pyramid[int(k)], dtype) for k in names}
            out = pool(features, [torch.tensor(boxes, dtype=dtype)], [(96, 128)])
            arrays[f"{name}/{precision}"] = out.permute(0, 2, 3, 1).numpy()
    return arrays


def level_golden():
    """Sides a few floats around each step of the level, and the level of squares of these sides."""
    arrays = {}
    for name, scale, level in (("levels_224", 224, 4), ("levels_100", 100, 3)):
        steps = np.float32(scale) * np.float32(2.0) ** np.arange(-3, 4, dtype=np.float32)
        around = np.arange(-24, 9, dtype=np.int32)
        sides = (steps.view(np.int32)[:, None] + around).reshape(-1).view(np.float32)
        boxes = np.stack([0 * sides, 0 * sides, sides, sides], axis=1)
        arrays[f"{name}/sides"] = sides
        for precision, dtype in PRECISIONS.items():
            mapper = LevelMapper(1, 6, canonical_scale=scale, canonical_level=level)
            arrays[f"{name}/{precision}"] = mapper([torch.tensor(boxes, dtype=dtype)]).numpy().astype(np.int32)
    return arrays


if __name__ == "__main__":
    for filename, arrays in (("nms.npz", nms_golden()), ("roi_align.npz", roi_align_golden())):
        np.savez_compressed(FOLDER / filename, **arrays)
        print(f"{filename}: {len(arrays)} arrays, {(FOLDER / filename).stat().st_size / 1000:.0f} kB")
