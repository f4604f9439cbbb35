"""Seeded weights for torchvision's detectors with which a comparison detects every error of conversion."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from flaxdet.convert.reference import comparison_of

Calibration = tuple[float, float]  # (mean, standard deviation) that every channel of a prediction gets


@torch.no_grad()
def make_lively(model: Any, seed: int = 0) -> Any:
    """Gives a detector of torchvision seeded weights under which every tensor matters.

    A comparison of freshly initialised detectors proves little: BatchNorms are identities, biases are zero, every
    score is about 0.01 and NMS has nothing to do, so that two swapped tensors give the same answer. Here,
    from one seed:

    - Every convolution and linear layer gets random weights (normal, smooth in space). Each filter sums to zero,
      so that the detections depend on the picture and not on the mean of the features. Every bias is random.
    - Every BatchNorm, live or frozen, gets the mean and variance of the layer's input on a seeded synthetic
      picture, changed at random by up to 30 %, a weight between 0.7 and 1.3 (0.15 to 0.35 at the end of a
      residual branch) and a bias; every GroupNorm gets such weights and biases too. So features neither vanish
      nor explode over 50 layers, and rounding is amplified about ten times instead of fifty.
    - The prediction layers are scaled channel by channel on the same picture. A few hundred candidates at
      256 x 320, of many classes and in overlapping groups, have class scores above the threshold and below
      saturation. Box deltas make neighbouring boxes overlap, and few boxes touch the border.

    On photos of 192 px (short side) FCOS then has 100 to 800 candidates above the threshold and Faster R-CNN
    about 1,000 proposals and 300 to 3,500 candidates, of which NMS drops between a third and a half. The detections
    are insensitive to rounding: torchvision's agree in float32 and float64, within .02 px and 1.5e-4.

    Args:
        model: built by torchvision, in float32 (call ``.double()`` afterwards for float64); changed in place.
        seed: seed of all random numbers; torch's global generator is left unchanged.

    Returns:
        The model, in evaluation mode.

    Raises:
        TypeError: if the model is of no registered kind.
    """
    comparison = comparison_of(model)
    model.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _draw(model)
        picture = _picture(256, 320)
        mean, std = (torch.tensor(v)[:, None, None] for v in (model.transform.image_mean, model.transform.image_std))
        picture = ((picture - mean) / std)[None].to(next(model.parameters()).dtype)
        with _calibrating_stages(model):
            comparison.calibrate(model, model.backbone(picture))
    return model


def _draw(model: nn.Module) -> None:
    """Draws weights and biases of all layers and norms; statistics and scales are calibrated later."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = torch.randn_like(module.weight)
            if weight.dim() == 4 and weight.shape[-1] > 1:
                weight = 0.3 * weight + weight.mean((2, 3), keepdim=True) * weight.shape[-1] * _bell(weight.shape[-1])
            module.weight.copy_(weight - weight.flatten(1).mean(1).reshape(-1, *[1] * (weight.dim() - 1)))
            if module.bias is not None:
                module.bias.copy_(0.2 * torch.randn_like(module.bias))
        elif _is_norm(module):
            norm: Any = module
            # The last norm of a residual branch is weaker, so that the sum does not grow from block to block.
            low, high = (0.15, 0.35) if ".body.layer" in name and _ends_branch(model, name) else (0.7, 1.3)
            norm.weight.copy_(torch.empty_like(norm.weight).uniform_(low, high))
            norm.bias.copy_(0.2 * torch.randn_like(norm.bias))


def _bell(size: int) -> torch.Tensor:
    """A smooth kernel [size, size], so that neighbouring locations get similar features, boxes and scores."""
    line = torch.exp(-0.5 * (torch.linspace(-1, 1, size) / 0.7) ** 2)
    return line[:, None] * line


def _is_norm(module: Any) -> bool:
    return isinstance(module, nn.GroupNorm) or _is_batch_norm(module)


def _is_batch_norm(module: Any) -> bool:
    return hasattr(module, "running_mean") and hasattr(module, "running_var")


def _ends_branch(model: nn.Module, name: str) -> bool:
    block, _, last = name.rpartition(".")
    return last == ("bn3" if hasattr(model.get_submodule(block), "bn3") else "bn2")


def _picture(height: int, width: int) -> torch.Tensor:
    """A picture [3, height, width] in [0, 1] that resembles photos: detail at every scale, edges, flat areas."""
    picture = torch.zeros(1, 3, height, width)
    for scale in (3, 6, 12, 24, 48, 96):
        noise = torch.randn(1, 1, scale, scale) + 0.4 * torch.randn(1, 3, scale, scale)
        picture += nn.functional.interpolate(noise, (height, width), mode="bilinear") * scale**-0.4
    for _ in range(40):
        top, left = (int(torch.randint(0, n - 16, ())) for n in (height, width))
        rows, columns = (int(v) for v in torch.randint(8, 90, (2,)))
        picture[..., top : top + rows, left : left + columns] += torch.randn(()) + 0.3 * torch.randn(3, 1, 1)
    picture = picture[0] - picture.mean()
    return (0.45 + 0.33 * picture / picture.std()).clamp(0, 1)


_PREDICTIONS = ("cls_logits", "bbox_reg", "bbox_ctrness", "bbox_pred", "cls_score")


@contextlib.contextmanager
def _calibrating_stages(model: nn.Module) -> Iterator[None]:
    """Within the block, each layer is calibrated on its first input, before the layer's output is used."""
    calibrated: set[nn.Module] = set()
    handles = []

    def first(hook: Callable[..., Any]) -> Callable[..., Any]:
        def once(module: nn.Module, *args: Any) -> Any:
            if module not in calibrated:
                calibrated.add(module)
                return hook(module, *args)
            return None

        return once

    def scale(module: Any, _: Any, output: torch.Tensor) -> torch.Tensor:
        """Scales a layer's weight so that the output without the bias has a standard deviation of 1."""
        bias = 0.0 if module.bias is None else module.bias.reshape(-1, *[1] * (output.dim() - 2))
        factor = 1 / (output - bias).std()
        module.weight.mul_(factor)
        return (output - bias) * factor + bias

    def statistics(module: Any, inputs: tuple[torch.Tensor]) -> None:
        """Gives a BatchNorm the statistics of the layer's input, changed at random."""
        axes = [0, *range(2, inputs[0].dim())]
        variance = inputs[0].var(dim=axes) + 1e-3
        module.running_mean.copy_(inputs[0].mean(dim=axes) + 0.3 * variance.sqrt() * _noise(variance))
        module.running_var.copy_(variance * (1 + 0.3 * _noise(variance)))

    for name, module in model.named_modules():
        if _is_batch_norm(module):
            handles.append(module.register_forward_pre_hook(first(statistics)))
        elif isinstance(module, nn.Conv2d | nn.Linear) and name.rpartition(".")[2] not in _PREDICTIONS:
            handles.append(module.register_forward_hook(first(scale)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _noise(like: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(like).uniform_(-1, 1)


def set_channels(layer: Any, inputs: list[torch.Tensor], target: Calibration) -> torch.Tensor:
    """Scales a prediction layer so that each channel has about the target's mean and spread over `inputs`.

    Returns:
        The layer's outputs over all inputs, [positions, channels].
    """
    output = torch.cat(
        [layer(x).flatten(2).permute(0, 2, 1).flatten(0, 1) if x.dim() > 2 else layer(x) for x in inputs]
    )
    mean, spread = target
    # No two channels have equal statistics, so that swapped channels change the detections.
    wanted_mean = mean + 0.3 * spread * torch.randn_like(layer.bias)
    factor = spread * (1 + 0.2 * _noise(layer.bias)) / output.std(dim=0)
    shift = wanted_mean - factor * output.mean(dim=0)
    layer.weight.mul_(factor.reshape(-1, *[1] * (layer.weight.dim() - 1)))
    layer.bias.copy_(layer.bias * factor + shift)
    return output * factor + shift
