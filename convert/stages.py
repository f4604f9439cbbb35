"""The stages of flaxdet's and torchvision's detector, under the same names and in the same layouts.

Needs the extra ``torch``. The names are the names under which flaxdet's models sow the stages: pixels, c2..c5, the
levels of the pyramid, head outputs, proposals, RoI features. Maps are [B, h, w, C]. Proposals and later stages have
only the rows of valid proposals, image after image.
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
from flaxdet.inference.detect import ImageDetections, unpad
from flaxdet.models.detector import Detector
from flaxdet.structures import Detections, ImageBatch, Proposals

Stages = dict[str, np.ndarray]

# Stages with one row per proposal, and the stage with the image number of each row.
OF_PROPOSALS = ("proposals", "roi_features", "class_logits", "box_regression", "class_scores")
PROPOSAL_IMAGE = "proposal_image"


@functools.partial(jax.jit, static_argnums=0)
def _apply(model: Detector, variables: Any, batch: ImageBatch) -> tuple[Detections, dict[str, Any]]:
    """Detections in the pixels of the original images, and the stages that the model sows."""
    detections, state = model.apply(variables, batch, mutable=["intermediates"])
    sown = {name: value[0] for name, value in state["intermediates"].items() if isinstance(value, tuple)}
    return to_original(detections, batch), sown


def run(model: Detector, variables: Any, batch: ImageBatch) -> tuple[list[ImageDetections], Stages]:
    """Runs flaxdet's model. BatchNorm is not folded, so that every stage is equal to torchvision's up to rounding.

    Args:
        model: flaxdet's model.
        variables: the variables of the model.
        batch: the result of ``flaxdet.transform``.

    Returns:
        Detections in the pixels of the original images, and stages.
    """
    detections, sown = jax.device_get(_apply(model, variables, batch))
    proposals: Proposals | None = sown.pop("proposals", None)
    stages = {"pixels": np.asarray(batch.pixels)} | sown
    if proposals is not None:
        valid = np.asarray(proposals.valid)
        stages |= {name: value[valid] for name, value in sown.items() if name in OF_PROPOSALS}
        stages |= {"proposals": np.asarray(proposals.boxes)[valid], PROPOSAL_IMAGE: np.nonzero(valid)[0]}
    return unpad(detections), stages


def run_reference(
    model: torch.nn.Module, images: list[np.ndarray], *, keep_stages: bool = True
) -> tuple[list[ImageDetections], Stages]:
    """Runs torchvision's model, with exact per-class NMS and the RoI scales of an ordinary photo.

    Args:
        model: torchvision's model, in evaluation mode, on any device.
        images: [H, W, 3] uint8, or floats in [0, 1].
        keep_stages: whether to record stages.

    Returns:
        Detections, and stages with flaxdet's names and layouts (NHWC), in the order of computation.
    """
    parameter = next(model.parameters())
    dtype, tensors = parameter.dtype, []
    for image in images:
        tensor = torch.from_numpy(np.array(image)).to(parameter.device).permute(2, 0, 1)
        tensors.append(tensor.to(dtype) / 255 if image.dtype == np.uint8 else tensor.to(dtype))
    reference.see_ordinary_photo(model)
    recorded: Stages = {}
    recording = _recording(model, recorded) if keep_stages else contextlib.nullcontext()
    with torch.no_grad(), reference.exact_nms(), recording:
        outputs = model(tensors)
    detections = [{name: output[name].cpu().numpy() for name in ("boxes", "scores", "labels")} for output in outputs]
    return detections, recorded


def channels_last(x: torch.Tensor) -> np.ndarray:
    """Converts torch's [B, C, h, w] to numpy's [B, h, w, C]."""
    return x.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def record_map(recorded: Stages, name: str) -> Callable[..., None]:
    """A forward hook that stores the output of a module, as [B, h, w, C], in ``recorded[name]``."""

    def hook(_: Any, __: Any, output: torch.Tensor) -> None:
        recorded[name] = channels_last(output)

    return hook


@contextlib.contextmanager
def _recording(model: Any, recorded: Stages) -> Iterator[None]:
    """Within the block, the model stores stages in ``recorded``, under flaxdet's names."""

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
