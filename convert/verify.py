"""Runs torchvision's detector and flaxdet's detector on the same photos, and compares every stage.

Needs the extra ``torch``. The stages have the names under which flaxdet's models sow the stages: pixels, c2..c5, the
levels of the pyramid, head outputs, proposals, RoI features. So the first stage that differs locates a wrong layer.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from flaxdet import registry
from flaxdet.convert import from_torchvision, reference
from flaxdet.convert.stages import OF_PROPOSALS, PROPOSAL_IMAGE, Stages, run, run_reference
from flaxdet.files.models import ModelFile, read_model
from flaxdet.images.transform import transform
from flaxdet.inference.detect import ImageDetections, jitted_detect, unpad
from flaxdet.models.detector import Detector

# Tolerances of equal detections: of a box (pixels), and of a score. torchvision's results in float32 and in float64
# differ by up to .022 px and 1.3e-4. In float64 only the order of sums differs.
TOLERANCES = {"float32": (0.05, 5e-4), "float64": (1e-6, 1e-9)}
# Tolerances of equal stages, relative to the largest value of the stage: hundreds of times the effect of rounding. A
# wrong layer is found by the stages even if there are no detections.
STAGE_TOLERANCES = {"float32": 1e-3, "float64": 1e-8}


@dataclass(frozen=True)
class Stage:
    """One stage, compared.

    Attributes:
        name: name under which flaxdet's model sows the stage.
        shape: shape of torchvision's array, [B, h, w, C] for maps.
        error: largest absolute difference; ``inf`` if shapes differ.
        scale: largest absolute value in torchvision's array.
    """

    name: str
    shape: tuple[int, ...]
    error: float
    scale: float

    @property
    def relative(self) -> float:
        """Error over scale."""
        return self.error / self.scale if self.scale else self.error


@dataclass(frozen=True)
class Match:
    """The detections of one image, matched.

    Attributes:
        count: number of torchvision's detections.
        ours: number of flaxdet's detections.
        matched: number of pairs: same label, and box and score within the tolerances.
        box_error: largest difference of a coordinate in a pair, in pixels of the original image.
        score_error: largest difference of scores in a pair.
    """

    count: int
    ours: int
    matched: int
    box_error: float
    score_error: float

    @property
    def same(self) -> bool:
        """True if every detection of torchvision and of flaxdet is in a pair."""
        return self.count == self.ours == self.matched


@dataclass(frozen=True)
class Comparison:
    """The comparison on one batch.

    Attributes:
        stages: the compared stages, in the order of computation.
        matches: the matched detections of each image.
        ours: flaxdet's detections of each image.
        theirs: torchvision's detections of each image.
        seconds: flaxdet's run time; 0 if not timed.
        their_seconds: torchvision's run time; 0 if not timed.
        stage_tolerance: largest relative error of equal stages.
    """

    stages: list[Stage]
    matches: list[Match]
    ours: list[ImageDetections]
    theirs: list[ImageDetections]
    seconds: float = field(default=0.0)
    their_seconds: float = field(default=0.0)
    stage_tolerance: float = STAGE_TOLERANCES["float32"]

    @property
    def first_difference(self) -> str | None:
        """The first stage that differs. A wrong layer lies between this stage and the stage before.

        Only stages before the first selection count: if two proposals have nearly the same score, rounding may decide
        which proposal is selected, and later stages are then stages of different proposals.
        """
        for stage in self.stages:
            if stage.name == "proposals":
                break
            if not stage.relative <= self.stage_tolerance:  # True for NaN
                return stage.name
        return None

    @property
    def same(self) -> bool:
        """True if no stage differs and all detections match."""
        return self.first_difference is None and all(match.same for match in self.matches)


def match_detections(
    ours: ImageDetections, theirs: ImageDetections, box_tolerance: float, score_tolerance: float
) -> Match:
    """Matches the detections of one image: each with the nearest box of the same label.

    The order of detections is irrelevant, since detections with equal scores may come in any order.

    Args:
        ours: flaxdet's detections, {"boxes": [N, 4] xyxy, "scores": [N], "labels": [N]}.
        theirs: torchvision's detections, in the same form.
        box_tolerance: largest difference of a coordinate, in pixels.
        score_tolerance: largest difference of a score.

    Returns:
        The numbers of detections and pairs, and the errors of the pairs.
    """
    free = np.ones(len(ours["scores"]), bool)
    matched, box_error, score_error = 0, 0.0, 0.0
    for box, score, label in zip(theirs["boxes"], theirs["scores"], theirs["labels"], strict=True):
        candidates = np.flatnonzero(free & (ours["labels"] == label))
        if not candidates.size:
            continue
        gaps = np.abs(ours["boxes"][candidates].astype(np.float64) - box.astype(np.float64)).max(axis=1)
        score_gaps = np.abs(ours["scores"][candidates].astype(np.float64) - np.float64(score))
        near = np.flatnonzero((gaps <= box_tolerance) & (score_gaps <= score_tolerance))
        if near.size:
            best = near[gaps[near].argmin()]
            free[candidates[best]] = False
            matched += 1
            box_error, score_error = max(box_error, float(gaps[best])), max(score_error, float(score_gaps[best]))
    return Match(len(theirs["scores"]), len(ours["scores"]), matched, box_error, score_error)


def compare(
    model: Detector,
    variables: Any,
    reference_model: torch.nn.Module,
    images: list[np.ndarray],
    *,
    timed: bool = False,
) -> Comparison:
    """Runs flaxdet and torchvision on one batch, with torchvision's padding, and compares. BatchNorm is not folded.

    Args:
        model: flaxdet's model.
        variables: variables converted from torchvision's weights.
        reference_model: torchvision's model, in evaluation mode, of the same dtype.
        images: [H, W, 3] uint8, or floats in [0, 1].
        timed: also measures run times, in a second run of each model, after compilation.

    Returns:
        The comparison; the tolerances depend on ``model.dtype``.
    """
    batch = transform(images, model.transform, canvas="batch", dtype=model.box_dtype)
    theirs, their_stages = run_reference(reference_model, images)
    ours, our_stages = run(model, variables, batch)
    seconds = their_seconds = 0.0
    if timed:
        # The program without stages is another program: compile it and run it once before the measurement.
        jax.block_until_ready(jitted_detect(model, variables, batch))
        start = time.perf_counter()
        batch = transform(images, model.transform, canvas="batch", dtype=model.box_dtype)
        ours = unpad(jitted_detect(model, variables, batch))
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        theirs, _ = run_reference(reference_model, images, keep_stages=False)
        their_seconds = time.perf_counter() - start
    precision = jnp.dtype(model.box_dtype).name
    matches = [match_detections(a, b, *TOLERANCES[precision]) for a, b in zip(ours, theirs, strict=True)]
    return Comparison(
        compare_stages(our_stages, their_stages),
        matches,
        ours,
        theirs,
        seconds,
        their_seconds,
        STAGE_TOLERANCES[precision],
    )


def compare_stages(ours: Stages, theirs: Stages) -> list[Stage]:
    """The errors of every stage that is in both arguments, in the order of computation.

    First, each of torchvision's proposals is matched with flaxdet's nearest proposal in the same image, and the rows of
    all later stages are reordered in the same way: two proposals whose objectness is equal up to rounding may come in
    any order.
    """
    order = _pair_proposals(ours, theirs)
    stages = []
    for name, expected in theirs.items():
        if name not in ours or name == PROPOSAL_IMAGE:
            continue
        scale = float(np.abs(expected).max(initial=0.0))
        if ours[name].shape != expected.shape:
            stages.append(Stage(name, expected.shape, float("inf"), scale))
        else:
            mine = ours[name] if order is None or name not in OF_PROPOSALS else ours[name][order]
            gap = np.abs(mine.astype(np.float64) - expected.astype(np.float64))
            stages.append(Stage(name, expected.shape, float(gap.max(initial=0.0)), scale))
    return stages


def _pair_proposals(ours: Stages, theirs: Stages) -> np.ndarray | None:
    """The row of flaxdet's proposal for each of torchvision's; None without proposals, or if the numbers differ."""
    if "proposals" not in theirs or ours["proposals"].shape != theirs["proposals"].shape:
        return None
    free = np.ones(len(ours["proposals"]), bool)
    order = np.zeros(len(free), np.int64)
    for i, (box, image) in enumerate(zip(theirs["proposals"], theirs[PROPOSAL_IMAGE], strict=True)):
        rows = np.flatnonzero(free & (ours[PROPOSAL_IMAGE] == image))
        if not rows.size:
            return None
        order[i] = rows[np.abs(ours["proposals"][rows] - box).max(axis=1).argmin()]
        free[order[i]] = False
    return order


def both_sides(
    name: str,
    weights: str | ModelFile,
    *,
    dtype: Any = np.float32,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> tuple[Detector, Any, torch.nn.Module, list[str] | None]:
    """One detector, built in flaxdet and in torchvision with equal weights.

    Args:
        name: name of the builder.
        weights: "random" (lively, see ``lively.make_lively``), the name of published weights, the name of a file, or
            the content of a file from ``flaxdet.files.models.read_model``.
        dtype: float32 or float64, for flaxdet and torchvision.
        seed: seed of random weights.
        progress: shows a progress bar while downloading.
        **options: options of flaxdet's and torchvision's model, under torchvision's names.

    Returns:
        flaxdet's model, the variables, torchvision's model in evaluation mode, and the names of the labels, or None.
    """
    architecture, enum = registry.get(name), registry.get(name).weights
    categories: list[str] | None = None
    state_dict: dict[str, Any] | None = None
    model_options: dict[str, Any] = {"num_classes": registry.NUM_COCO_CLASSES, "frozen_bn": architecture.freezable}
    source = weights.path if isinstance(weights, ModelFile) else weights
    if isinstance(weights, str) and enum is not None and weights.removeprefix(f"{enum.__name__}.") in enum.__members__:
        member: Any = enum.verify(weights)
        state_dict, categories = member.get_state_dict(progress=progress), member.meta["categories"]
        model_options |= member.options
    elif weights != "random":
        file = read_model(weights) if isinstance(weights, str) else weights
        state_dict, categories = file.state_dict, file.categories
        model_options |= {
            option: file.options[option] for option in (*model_options, "norm_eps") if option in file.options
        }
    model = registry.make_model(name, **model_options, dtype=dtype, precision=jax.lax.Precision.HIGHEST, **options)
    frozen, classes = model_options.pop("frozen_bn"), model_options.pop("num_classes")
    theirs = reference.build(name, frozen=frozen, num_classes=classes, **model_options, **options)
    if state_dict is None:
        from flaxdet.convert.lively import make_lively  # needs torch

        make_lively(theirs, seed)
        variables = from_torchvision(model, theirs.state_dict())
    else:
        variables = from_torchvision(model, state_dict, source=source)  # first, for the clearer error
        theirs.load_state_dict({key: _tensor(value) for key, value in state_dict.items()})
    return model, variables, theirs.to(torch.float64 if dtype == np.float64 else torch.float32), categories


def _tensor(array: Any) -> torch.Tensor:
    """A torch tensor; floating point becomes float32, since torch can't read numpy's bfloat16."""
    array = np.array(array)
    return torch.from_numpy(array.astype(np.float32) if jnp.issubdtype(array.dtype, jnp.floating) else array)
