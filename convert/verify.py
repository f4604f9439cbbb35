"""Runs torchvision's detector and ours on the same photos and compares them, stage by stage.

Needs the extra ``torch``. The stages have the names under which our models sow them: pixels, c2..c5, the pyramid's
levels, head outputs, proposals, RoI features; so the first one that differs names the layer at fault.
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
from flaxdet.convert.stages import OF_PROPOSALS, PROPOSAL_IMAGE, Detection, Stages, run, run_reference
from flaxdet.files.models import ModelFile, read_model
from flaxdet.images.transform import transform
from flaxdet.inference.detect import jitted_detect, unpad
from flaxdet.models.detector import Detector

# What counts as the same answer: largest difference of a box (pixels) and of a score. torchvision in float32 differs
# from itself in float64 by up to .022 px and 1.3e-4; in float64 only the order of sums is left.
TOLERANCES = {"float32": (0.05, 5e-4), "float64": (1e-6, 1e-9)}
# The same of a stage, relative to its largest value, hundreds of times what rounding does: so that a difference shows
# also where nothing is detected.
STAGE_TOLERANCES = {"float32": 1e-3, "float64": 1e-8}


@dataclass(frozen=True)
class Stage:
    """One stage on both sides.

    Attributes:
        name: as sown.
        shape: of the compared array, [B, h, w, C] for maps.
        error: largest absolute difference; ``inf`` if shapes differ.
        scale: largest absolute value of torchvision's.
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
    """Detections of one image, paired.

    Attributes:
        count: torchvision's detections.
        ours: our detections.
        matched: pairs with the same label and boxes and scores within tolerance.
        box_error: largest difference of a coordinate among pairs, in pixels of the original image.
        score_error: largest difference of a score among pairs.
    """

    count: int
    ours: int
    matched: int
    box_error: float
    score_error: float

    @property
    def same(self) -> bool:
        """Whether every detection of either side has its counterpart."""
        return self.count == self.ours == self.matched


@dataclass(frozen=True)
class Comparison:
    """Everything found on one batch."""

    stages: list[Stage]
    matches: list[Match]
    ours: list[Detection]
    theirs: list[Detection]
    seconds: float = field(default=0.0)
    their_seconds: float = field(default=0.0)
    stage_tolerance: float = STAGE_TOLERANCES["float32"]

    @property
    def first_difference(self) -> str | None:
        """The first stage that is not the same; the layer at fault is between it and the one before.

        Only stages before the first selection count: where two proposals' scores nearly tie, rounding may decide
        which of them is kept, and what follows is of another one.
        """
        for stage in self.stages:
            if stage.name == "proposals":
                break
            if not stage.relative <= self.stage_tolerance:  # NaN is no match
                return stage.name
        return None

    @property
    def same(self) -> bool:
        """The verdict."""
        return self.first_difference is None and all(match.same for match in self.matches)


def match_detections(ours: Detection, theirs: Detection, box_tolerance: float, score_tolerance: float) -> Match:
    """Pairs the detections of one image, each with the nearest of its label.

    Args:
        ours: {"boxes": [N, 4] xyxy, "scores": [N], "labels": [N]}.
        theirs: the same of torchvision.
        box_tolerance: largest difference of a coordinate, in pixels.
        score_tolerance: largest difference of a score.

    Returns:
        The pairs' number and errors. Order doesn't count: equal scores may come in any.
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
    """Runs both sides on one batch, padded as torchvision pads it; BatchNorm is not folded on either side.

    Args:
        model: ours.
        variables: converted from torchvision's.
        reference_model: torchvision's, in evaluation mode, in the same dtype.
        images: [H, W, 3] uint8, or floats in [0, 1].
        timed: run each side once more and take the time, compiled and warm.

    Returns:
        The comparison; ``model.dtype`` chooses the tolerances.
    """
    batch = transform(images, model.transform, canvas="batch", dtype=model.box_dtype)
    theirs, their_stages = run_reference(reference_model, images)
    ours, our_stages = run(model, variables, batch)
    seconds = their_seconds = 0.0
    if timed:
        # without the stages it is another program, which is compiled here, and must have run before the clock starts
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
    """The errors of every stage that both sides have, in the order of computation.

    Proposals are paired first, each with the nearest of its image: where two objectness scores are equal up to
    rounding, their order is nobody's fault, and the rows of the stages after them follow it.
    """
    order = _pair_proposals(ours, theirs)
    found = []
    for name, expected in theirs.items():
        if name not in ours or name == PROPOSAL_IMAGE:
            continue
        scale = float(np.abs(expected).max(initial=0.0))
        if ours[name].shape != expected.shape:
            found.append(Stage(name, expected.shape, float("inf"), scale))
        else:
            mine = ours[name] if order is None or name not in OF_PROPOSALS else ours[name][order]
            gap = np.abs(mine.astype(np.float64) - expected.astype(np.float64))
            found.append(Stage(name, expected.shape, float(gap.max(initial=0.0)), scale))
    return found


def _pair_proposals(ours: Stages, theirs: Stages) -> np.ndarray | None:
    """For each of their proposals the row of ours; None where there are none or their numbers differ."""
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
    """The same detector with the same weights on both sides.

    Args:
        name: the builder's.
        weights: "random" (lively, see ``lively.make_lively``), the name of published weights, or a file: its name, or
            what ``flaxdet.files.models.read_model`` has read.
        dtype: float32 or float64, of both sides.
        seed: of random weights.
        progress: bar while downloading.
        **options: of both models, under torchvision's names.

    Returns:
        Our model, its variables, torchvision's model in evaluation mode, and the names of the labels if known.
    """
    architecture, enum = registry.get(name), registry.get(name).weights
    categories: list[str] | None = None
    state_dict: dict[str, Any] | None = None
    made: dict[str, Any] = {"num_classes": registry.NUM_COCO_CLASSES, "frozen_bn": architecture.freezable}
    source = weights.path if isinstance(weights, ModelFile) else weights
    if isinstance(weights, str) and enum is not None and weights.removeprefix(f"{enum.__name__}.") in enum.__members__:
        member: Any = enum.verify(weights)
        state_dict, categories = member.get_state_dict(progress=progress), member.meta["categories"]
        made |= member.options
    elif weights != "random":
        file = read_model(weights) if isinstance(weights, str) else weights
        state_dict, categories = file.state_dict, file.categories
        made |= {option: file.options[option] for option in (*made, "norm_eps") if option in file.options}
    model = registry.make_model(name, **made, dtype=dtype, precision=jax.lax.Precision.HIGHEST, **options)
    frozen, classes = made.pop("frozen_bn"), made.pop("num_classes")
    theirs = reference.build(name, frozen=frozen, num_classes=classes, **made, **options)
    if state_dict is None:
        from flaxdet.convert.lively import make_lively  # which needs torch

        make_lively(theirs, seed)
        variables = from_torchvision(model, theirs.state_dict())
    else:
        variables = from_torchvision(model, state_dict, source=source)  # its report of faults is the clearer one
        theirs.load_state_dict({key: _tensor(value) for key, value in state_dict.items()})
    return model, variables, theirs.to(torch.float64 if dtype == np.float64 else torch.float32), categories


def _tensor(array: Any) -> torch.Tensor:
    """A torch tensor, float32 where it is floating: numpy's bfloat16 is unknown to torch."""
    array = np.array(array)
    return torch.from_numpy(array.astype(np.float32) if jnp.issubdtype(array.dtype, jnp.floating) else array)
