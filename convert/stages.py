"""The stages of a detector on both sides, under the same names and in the same layouts.

Needs the extra ``torch``. Names are those under which our models sow them: pixels, c2..c5, the pyramid's levels, head
outputs, proposals, RoI features. Maps are [B, h, w, C]; of proposals and what follows only the valid ones, image after
image.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import torch

from flaxdet.convert import reference
from flaxdet.images.transform import to_original
from flaxdet.inference.detect import unpad
from flaxdet.models.detector import Detector
from flaxdet.structures import Detections, ImageBatch, Proposals

Detection = dict[str, np.ndarray]
Stages = dict[str, np.ndarray]

# Stages with a row a proposal, and the number of each row's image.
OF_PROPOSALS = ("proposals", "roi_features", "class_logits", "box_regression", "class_scores")
PROPOSAL_IMAGE = "proposal_image"


@functools.partial(jax.jit, static_argnums=0)
def _apply(model: Detector, variables: Any, batch: ImageBatch) -> tuple[Detections, dict[str, Any]]:
    """Detections in the original images, and what the model sows."""
    detections, state = model.apply(variables, batch, mutable=["intermediates"])
    sown = {name: value[0] for name, value in state["intermediates"].items() if isinstance(value, tuple)}
    return to_original(detections, batch), sown


def run(model: Detector, variables: Any, batch: ImageBatch) -> tuple[list[Detection], Stages]:
    """Runs our model as it is given: BatchNorm is not folded, so that every stage is torchvision's but for rounding.

    Args:
        model: ours.
        variables: its variables.
        batch: from ``flaxdet.transform``.

    Returns:
        Detections in the pixels of the original images, and stages.
    """
    detections, sown = jax.device_get(_apply(model, variables, batch))
    proposals: Proposals | None = sown.pop("proposals", None)
    found = {"pixels": np.asarray(batch.pixels)} | sown
    if proposals is not None:
        valid = np.asarray(proposals.valid)
        found |= {name: value[valid] for name, value in sown.items() if name in OF_PROPOSALS}
        found |= {"proposals": np.asarray(proposals.boxes)[valid], PROPOSAL_IMAGE: np.nonzero(valid)[0]}
    return unpad(detections), found


def run_reference(
    model: torch.nn.Module, images: list[np.ndarray], *, keep_stages: bool = True
) -> tuple[list[Detection], dict[str, np.ndarray]]:
    """Runs torchvision's model, with exact per-class NMS and the RoI scales of an ordinary photo.

    Args:
        model: torchvision's, in evaluation mode, on any device.
        images: [H, W, 3] uint8, or floats in [0, 1].
        keep_stages: record the stages.

    Returns:
        Detections, and stages in our names and layouts (NHWC), in the order of computation.
    """
    parameter = next(model.parameters())
    dtype, tensors = parameter.dtype, []
    for image in images:
        tensor = torch.from_numpy(np.array(image)).to(parameter.device).permute(2, 0, 1)
        tensors.append(tensor.to(dtype) / 255 if image.dtype == np.uint8 else tensor.to(dtype))
    reference.see_ordinary_photo(model)
    recorded: dict[str, np.ndarray] = {}
    recording = _recording(model, recorded) if keep_stages else contextlib.nullcontext()
    with torch.no_grad(), reference.exact_nms(), recording:
        outputs = model(tensors)
    detections = [{name: output[name].cpu().numpy() for name in ("boxes", "scores", "labels")} for output in outputs]
    return detections, recorded


def channels_last(x: torch.Tensor) -> np.ndarray:
    """A map [B, C, h, w] of torch as [B, h, w, C]."""
    return x.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def record_map(recorded: dict[str, np.ndarray], name: str) -> Callable[..., None]:
    """A forward hook that writes a module's map into ``recorded`` under a name, as [B, h, w, C]."""

    def hook(_: Any, __: Any, output: torch.Tensor) -> None:
        recorded[name] = channels_last(output)

    return hook


@contextlib.contextmanager
def _recording(model: Any, recorded: dict[str, np.ndarray]) -> Iterator[None]:
    """While it lasts, the model's stages are written into ``recorded`` under our names."""

    def pixels(_: Any, __: Any, output: Any) -> None:
        recorded["pixels"] = channels_last(output[0].tensors)

    def pyramid(_: Any, __: Any, output: dict[str, torch.Tensor]) -> None:
        finest = int(next(iter(body.return_layers)).removeprefix("layer")) + 1
        for i, (name, x) in enumerate(output.items()):
            recorded[name if name in ("p6", "p7", "pool") else f"p{finest + i}"] = channels_last(x)

    body = model.backbone.body
    hooks = [(model.transform, pixels)]
    hooks += [(body[f"layer{i}"], record_map(recorded, f"c{i + 1}")) for i in range(1, 5)]
    hooks += [(model.backbone, pyramid), *reference.comparison_of(model).hooks(model, recorded)]
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
