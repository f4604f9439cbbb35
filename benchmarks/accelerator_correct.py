"""Correctness on the device, for accelerator.py: stages and detections against torchvision's, and gradients."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from accelerator_common import Notes, sizes, weights_file
from contenders import allow_tf32, flaxdet_dtype, geometry, load_flaxdet, torch_context, torch_device
from photos import photos, training_examples

from flaxdet.convert import from_torchvision, reference, to_torchvision
from flaxdet.convert.verify import both_sides, compare, match_detections
from flaxdet.images.transform import transform, transform_targets
from flaxdet.inference.detect import jitted_detect, unpad
from flaxdet.registry import make_model
from flaxdet.train import loss_and_gradients

# bfloat16 has 8 bits: what still counts as the same detection, pixels of a coordinate and difference of a score.
WIDE = (8.0, 0.1)
# Sampling on both sides takes all there is, so that no random choice takes part. Of the box head's sample at most a
# quarter is positive, and the 100 proposals and 8 boxes of the ground truth may all be.
EXHAUSTIVE = {
    "rpn_pre_nms_top_n_train": 200,
    "rpn_post_nms_top_n_train": 100,
    "rpn_batch_size_per_image": 1_000_000,
    "box_batch_size_per_image": 440,
}
SHAPE = (320, 448)
NEGLIGIBLE = 1e-5  # of the whole gradient's norm: biases that a norm takes out again have no gradient but rounding


def detections(options: dict[str, Any], notes: Notes) -> str:
    """``flaxdet verify`` on the device in float32, then detections in bfloat16 against those in float32."""
    name = options["model"]
    weights, size = weights_file(options, name), sizes(options)["verify_size"]
    allow_tf32("float32")
    model, variables, theirs, _ = both_sides(name, str(weights), **geometry(size))
    theirs = theirs.to(torch_device())
    images = photos(2)
    pool = ThreadPoolExecutor(1)
    half = pool.submit(_in_bfloat16, weights, size, images)  # compiled meanwhile
    found = compare(model, variables, theirs, images)
    notes.add(
        "verify",
        model=name,
        size=size,
        same=found.same,
        first_difference=found.first_difference,
        stages=[{**dataclasses.asdict(stage), "relative": stage.relative} for stage in found.stages],
        matches=[dataclasses.asdict(match) for match in found.matches],
    )
    with notes.attempt(what="bfloat16 detections", model=name):
        _note_matches(notes, "flaxdet", name, half.result(), found.ours)
    with notes.attempt(what="detections under autocast", model=name):
        _note_matches(notes, "torchvision AMP", name, _under_autocast(theirs, images), found.theirs)
    matched = sum(match.matched for match in found.matches)
    count = sum(match.count for match in found.matches)
    verdict = "same" if found.same else f"NOT THE SAME (first difference: {found.first_difference})"
    return f"{verdict}, {matched} of {count} detections matched"


def _in_bfloat16(weights: Path, size: int, images: list[np.ndarray]) -> list[dict[str, np.ndarray]]:
    model, variables = load_flaxdet(weights, dtype="bfloat16", min_size=size)
    return unpad(jitted_detect(model, variables, transform(images, model.transform, canvas="batch")))


def _under_autocast(model: Any, images: list[np.ndarray]) -> list[dict[str, np.ndarray]]:
    reference.see_ordinary_photo(model)
    tensors = [torch.from_numpy(x).to(torch_device()).permute(2, 0, 1).float() / 255 for x in images]
    with torch_context("bfloat16"), reference.exact_nms():
        found = model(tensors)
    return [{"labels": one["labels"].cpu().numpy()} | _wide(one, "boxes", "scores") for one in found]


def _wide(values: dict[str, torch.Tensor], *names: str) -> dict[str, np.ndarray]:
    return {name: values[name].detach().float().cpu().numpy() for name in names}


def _note_matches(notes: Notes, side: str, model: str, half: list[Any], exact: list[Any]) -> None:
    matches = [match_detections(a, b, *WIDE) for a, b in zip(half, exact, strict=True)]
    notes.add("bfloat16", side=side, model=model, matches=[dataclasses.asdict(match) for match in matches])


def gradients(options: dict[str, Any], notes: Notes) -> str:
    """Each parameter's gradient in bfloat16 against float32, beside torch autocast's; and float32 against torch's."""
    name = options["model"]
    rows, columns = (64, 96) if options["small"] else SHAPE
    exhaustive = EXHAUSTIVE if name == "fasterrcnn_resnet50_fpn_v2" else {}
    given: dict[str, Any] = {"min_size": rows, "max_size": columns, **exhaustive}
    theirs: Any = reference.build(name, **given)
    theirs.load_state_dict(_state_dict(options, name))
    images, targets = training_examples(2, rows, columns)
    with ThreadPoolExecutor(2) as pool:
        jobs = {
            dtype: pool.submit(_ours, name, dtype, theirs.state_dict(), images, targets, given)
            for dtype in ("float32", "bfloat16")
        }
        ours = {dtype: job.result() for dtype, job in jobs.items()}
    exact = _summary(ours["bfloat16"], ours["float32"])
    notes.add("gradients", model=name, side="flaxdet", of="bfloat16", against="float32", **exact)
    torch_side = {}
    for dtype in ("float32", "bfloat16"):
        with notes.attempt(what=f"torchvision's gradients, {dtype}", model=name):
            torch_side[dtype] = _theirs(theirs, dtype, images, targets)
    if len(torch_side) == 2:
        summary = _summary(torch_side["bfloat16"], torch_side["float32"])
        notes.add("gradients", model=name, side="torchvision", of="bfloat16", against="float32", **summary)
    if "float32" in torch_side:
        summary = _summary(ours["float32"], torch_side["float32"])
        notes.add("gradients", model=name, side="flaxdet", of="float32", against="torchvision float32", **summary)
    return f"bfloat16: median error {exact['median']:.3g}, largest {exact['largest']:.3g} ({exact['worst'][0]['name']})"


def _state_dict(options: dict[str, Any], name: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(weights_file(options, name))


def _ours(
    name: str, dtype: str, state_dict: Any, images: list[Any], targets: list[Any], given: dict[str, Any]
) -> dict[str, np.ndarray]:
    """Our gradients under torchvision's names."""
    model: Any = make_model(name, num_classes=91, **flaxdet_dtype(dtype), **given)
    variables = from_torchvision(model, state_dict)
    batch = transform(images, model.transform, canvas="batch")
    padded = transform_targets(targets, batch, model=model, max_boxes=8)

    @jax.jit
    def step(params: Any, batch_stats: Any, batch: Any, padded: Any) -> Any:
        return loss_and_gradients(model, params, {}, batch_stats, batch, padded, jax.random.key(0))[1]

    found = jax.device_get(step(variables["params"], variables["batch_stats"], batch, padded))
    return to_torchvision(model, {"params": found, "batch_stats": jax.device_get(variables["batch_stats"])})


def _theirs(model: Any, dtype: str, images: list[Any], targets: list[Any]) -> dict[str, np.ndarray]:
    device = torch_device()
    allow_tf32("float32")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.to(device).train()
    model.zero_grad()
    reference.see_ordinary_photo(model)
    tensors = [torch.from_numpy(x).permute(2, 0, 1).to(device).float() / 255 for x in images]
    wanted = [{key: torch.from_numpy(value).to(device) for key, value in target.items()} for target in targets]
    with reference.exact_nms(), torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        loss: Any = sum(model(tensors, wanted).values())
    loss.backward()
    found = _wide({key: p.grad for key, p in model.named_parameters() if p.grad is not None}, *_trained(model))
    model.load_state_dict(state)  # BatchNorm's statistics have moved
    return found


def _trained(model: Any) -> list[str]:
    return [key for key, p in model.named_parameters() if p.grad is not None]


def _summary(found: dict[str, np.ndarray], exact: dict[str, np.ndarray], worst: int = 10) -> dict[str, Any]:
    """Relative errors and ratios of norms over all parameters whose gradient is more than rounding.

    Args:
        found: gradients by name.
        exact: what they should be; those that either side lacks are left out.
        worst: how many of the worst to name.

    Returns:
        Number of parameters, those left out as negligible, median and largest relative error, the ratios of norms
        (smallest, median, largest), the worst by name, and [error, ratio] of all by name.
    """
    names = [key for key in exact if key in found and np.issubdtype(exact[key].dtype, np.floating)]
    names = [key for key in names if not key.endswith(("running_mean", "running_var"))]
    norms = {key: float(np.linalg.norm(exact[key])) for key in names}
    floor = NEGLIGIBLE * float(np.linalg.norm(list(norms.values())))
    rows = []
    for key in names:
        if norms[key] > floor:
            gap = float(np.linalg.norm(found[key].astype(np.float64) - exact[key]))
            ratio = float(np.linalg.norm(found[key].astype(np.float64))) / norms[key]
            rows.append({"name": key, "error": gap / norms[key], "ratio": ratio})
    rows.sort(key=lambda row: -row["error"] if np.isfinite(row["error"]) else -np.inf)
    errors, ratios = [row["error"] for row in rows], sorted(row["ratio"] for row in rows)
    return {
        "parameters": len(rows),
        "negligible": len(names) - len(rows),
        "median": float(np.median(errors)),
        "largest": rows[0]["error"],
        "ratios": [ratios[0], float(np.median(ratios)), ratios[-1]],
        "worst": rows[:worst],
        "all": {row["name"]: [row["error"], row["ratio"]] for row in rows},
    }
