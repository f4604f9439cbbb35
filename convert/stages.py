"""The stages of a detector on both sides, under the same names and in the same layouts.

Needs the extra ``torch``. Names are those under which our models sow them: pixels, c2..c5, the pyramid's levels, head
outputs, proposals, RoI features. Maps are [B, h, w, C]; of proposals and what follows only the valid ones, image after
image.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
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


@contextlib.contextmanager
def _recording(model: Any, recorded: dict[str, np.ndarray]) -> Iterator[None]:
    """While it lasts, the model's stages are written into ``recorded`` under our names."""

    def channels_last(x: torch.Tensor) -> np.ndarray:
        return x.permute(0, 2, 3, 1).contiguous().cpu().numpy()

    def flat(x: torch.Tensor, width: int) -> torch.Tensor:  # [B, A * width, h, w] -> [B, hwA, width]
        batch, _, height, columns = x.shape
        x = x.reshape(batch, -1, width, height, columns).permute(0, 3, 4, 1, 2)
        return x.reshape(batch, -1, width)

    def pixels(_: Any, __: Any, output: Any) -> None:
        recorded["pixels"] = channels_last(output[0].tensors)

    def stage(name: str) -> Any:
        def hook(_: Any, __: Any, output: torch.Tensor) -> None:
            recorded[name] = channels_last(output)

        return hook

    def pyramid(_: Any, __: Any, output: dict[str, torch.Tensor]) -> None:
        finest = 3 if is_fcos else 2
        for i, (name, x) in enumerate(output.items()):
            recorded[name if name in ("p6", "p7", "pool") else f"p{finest + i}"] = channels_last(x)

    def fcos_head(_: Any, __: Any, output: dict[str, torch.Tensor]) -> None:
        recorded.update({name: x.cpu().numpy() for name, x in output.items()})

    def rpn_head(_: Any, __: Any, output: tuple[list[torch.Tensor], list[torch.Tensor]]) -> None:
        recorded["objectness"] = torch.cat([flat(x, 1) for x in output[0]], dim=1)[..., 0].cpu().numpy()
        recorded["pred_bbox_deltas"] = torch.cat([flat(x, 4) for x in output[1]], dim=1).cpu().numpy()

    def rpn(_: Any, __: Any, output: tuple[list[torch.Tensor], Any]) -> None:
        recorded["proposals"] = torch.cat(output[0]).cpu().numpy()
        recorded[PROPOSAL_IMAGE] = np.repeat(np.arange(len(output[0])), [len(boxes) for boxes in output[0]])

    def predictor(_: Any, __: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        recorded["class_logits"], recorded["box_regression"] = (x.cpu().numpy() for x in output)
        recorded["class_scores"] = output[0].softmax(dim=-1).cpu().numpy()

    reference.torchvision()
    from torchvision.models import detection

    is_fcos = isinstance(model, detection.FCOS)
    body = model.backbone.body
    hooks = [(model.transform, pixels)]
    hooks += [(body[f"layer{i}"], stage(f"c{i + 1}")) for i in range(1, 5)]
    hooks += [(model.backbone, pyramid)]
    if is_fcos:
        hooks += [(model.head, fcos_head)]
    else:
        heads = model.roi_heads
        hooks += [(model.rpn.head, rpn_head), (model.rpn, rpn)]
        hooks += [(heads.box_roi_pool, stage("roi_features")), (heads.box_predictor, predictor)]
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
