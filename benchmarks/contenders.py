"""Both sides of the comparison, ready to run. Each imports its own library alone, so that a process can hold one.

A contender is a function from a list of photos, [H, W, 3] uint8 in host memory, to detections in host memory: the
transfer, the resize and the normalisation count on both sides. Both read their weights from the same .safetensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MODELS = ("fcos_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2")
TORCH_MODES = ("torchvision eager", "torchvision channels_last", "torchvision compiled")
CONTENDERS = ("flaxdet", *TORCH_MODES)
DTYPES = ("float32", "tf32", "bfloat16")  # tf32: float32 whose products may take TF32; on a CPU it is float32

# what torchvision computes between backbone and NMS, as attributes of its models
_COMPILED_PARTS = ("backbone", "head", "rpn.head", "roi_heads.box_head", "roi_heads.box_predictor")

Contender = Callable[[list[np.ndarray]], Any]


def geometry(min_size: int) -> dict[str, Any]:
    """torchvision's 800 and 1333 in proportion."""
    return {"min_size": min_size, "max_size": round(min_size * 1333 / 800)}


def load_flaxdet(weights: str | Path, *, dtype: str, min_size: int) -> tuple[Any, Any]:
    """flaxdet's model and variables."""
    import jax
    import jax.numpy as jnp

    import flaxdet

    # a GPU takes TF32 for float32 unless told otherwise
    exact = {"precision": jax.lax.Precision.HIGHEST} if dtype == "float32" and jax.default_backend() != "cpu" else {}
    computes = jnp.bfloat16 if dtype == "bfloat16" else jnp.float32
    return flaxdet.load(weights, dtype=computes, **exact, **geometry(min_size))


def make_predictor(weights: str | Path, size: tuple[int, int], *, dtype: str, min_size: int, batch: int) -> Any:
    """flaxdet's ``Predictor`` for photos of one size."""
    import flaxdet
    from flaxdet.transform import canvas_size, resized_size

    model, variables = load_flaxdet(weights, dtype=dtype, min_size=min_size)
    bucket = canvas_size(resized_size(size, model.transform), model.transform)
    return flaxdet.Predictor(model, variables, buckets=[bucket], batch_size=batch, raw_sizes=[max(size)])


def torch_device() -> str:
    """Where torchvision runs."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def allow_tf32(dtype: str) -> None:
    """Lets torch's float32 products take TF32, or not."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype == "tf32"


def load_torch(name: str, weights: str | Path, mode: str, *, dtype: str, min_size: int) -> Any:
    """torchvision's model on its device; compiled, if that is the mode, when it first runs."""
    import torch
    from safetensors.torch import load_file
    from torchvision.models import detection

    allow_tf32(dtype)
    model = getattr(detection, name)(weights=None, weights_backbone=None, **geometry(min_size))
    model.load_state_dict(load_file(weights))
    model = model.eval().to(torch_device())
    if mode != "torchvision eager":
        model = model.to(memory_format=torch.channels_last)
    if mode == "torchvision compiled":
        compile_parts(model)
    return model


def compile_parts(model: Any, *, freezing: bool = True) -> None:
    """torch.compile of backbone and heads, for inference with frozen weights, inductor's best float32 mode."""
    import torch
    import torch._inductor.config as inductor

    inductor.freezing = freezing
    torch._dynamo.reset()
    for path in _COMPILED_PARTS:
        *parents, attribute = path.split(".")
        owner = model
        for parent in parents:
            owner = getattr(owner, parent, None)
        if hasattr(owner, attribute):
            setattr(owner, attribute, torch.compile(getattr(owner, attribute), dynamic=False))


def torch_context(dtype: str) -> contextlib.ExitStack:
    """No gradients, and autocast for bfloat16."""
    import torch

    stack = contextlib.ExitStack()
    stack.enter_context(torch.no_grad())
    if dtype == "bfloat16":
        stack.enter_context(torch.autocast(torch_device(), dtype=torch.bfloat16))
    return stack


def torch_contender(model: Any, *, dtype: str) -> Contender:
    """From photos to detections by torchvision's model."""
    import torch

    device = torch_device()

    def run(photos: list[np.ndarray]) -> Any:
        with torch_context(dtype):
            tensors = [torch.from_numpy(photo).permute(2, 0, 1).contiguous().to(device) for photo in photos]
            found = model([tensor.float() / 255 for tensor in tensors])
            return [{name: value.cpu() for name, value in one.items()} for one in found]

    return run
