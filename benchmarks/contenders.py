"""The contenders of a comparison, flaxdet and torchvision, ready to run. Each imports only the library it measures.

A contender is a function from a list of photos, [H, W, 3] uint8 in host memory, to detections in host memory, so that
transfer, resize and normalisation count. All contenders read the same .safetensors file of weights.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MODELS = ("fcos_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2")
TINY = "tiny_fcos"  # flaxdet's own small detector, for tests
TORCH_MODES = ("torchvision eager", "torchvision channels_last", "torchvision compiled")
CONTENDERS = ("flaxdet", *TORCH_MODES)
DTYPES = ("float32", "tf32", "bfloat16")  # tf32: float32 whose products may take TF32; on a CPU it is float32

# what torchvision computes between backbone and NMS, as attributes of its models
_COMPILED_PARTS = ("backbone", "head", "rpn.head", "roi_heads.box_head", "roi_heads.box_predictor")

Contender = Callable[[list[np.ndarray]], Any]


def geometry(min_size: int) -> dict[str, Any]:
    """torchvision's 800 and 1333 in proportion."""
    return {"min_size": min_size, "max_size": round(min_size * 1333 / 800)}


def flaxdet_dtype(dtype: str) -> dict[str, Any]:
    """One of ``DTYPES`` as flaxdet's keywords."""
    import jax
    import jax.numpy as jnp

    if dtype == "bfloat16":
        return {"dtype": jnp.bfloat16}
    # a GPU takes TF32 for float32 unless told otherwise
    exact = {"precision": jax.lax.Precision.HIGHEST} if dtype == "float32" and jax.default_backend() != "cpu" else {}
    return {"dtype": jnp.float32, **exact}


def load_flaxdet(weights: str | Path, *, dtype: str, **options: Any) -> tuple[Any, Any]:
    """flaxdet's model and variables; ``options`` as in ``load_torch``.

    In place of a file ``weights`` may be one of ``MODELS`` or ``TINY``, whose variables are then ones: enough to
    compile.
    """
    import flaxdet

    options = options if "max_size" in options else geometry(**options)
    if weights not in (*MODELS, TINY):
        return flaxdet.load(weights, **flaxdet_dtype(dtype), **options)
    import jax
    import jax.numpy as jnp

    from flaxdet.models.initial import initial_variables
    from flaxdet.registry import make_model

    model = make_model(str(weights), num_classes=91, **flaxdet_dtype(dtype), **options)
    shapes = jax.eval_shape(functools.partial(initial_variables, model), jax.random.key(0))
    return model, jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)


def make_predictor(weights: str | Path, size: tuple[int, int], *, dtype: str, min_size: int, batch: int) -> Any:
    """flaxdet's ``Predictor`` for photos of one size."""
    import flaxdet
    from flaxdet.images.transform import canvas_size, resized_size

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


def torchvision_detection() -> Any:
    """``torchvision.models.detection``, also where its C++ operators can't be loaded."""
    try:
        from torchvision.models import detection
    except RuntimeError:  # which has jax imported too, so only then
        from flaxdet.convert import reference

        detection = reference.torchvision().models.detection
    return detection


def load_torch(name: str, weights: str | Path, mode: str, *, dtype: str, train: bool = False, **options: Any) -> Any:
    """torchvision's model on its device; compiled, if that is the mode, when it first runs.

    ``options`` are torchvision's own, or ``min_size`` alone, which the longer side then follows.
    """
    import torch
    from safetensors.torch import load_file

    allow_tf32(dtype)
    options = options if "max_size" in options else geometry(**options)
    if name == TINY:  # flaxdet's own, for tests
        from flaxdet.convert import reference

        model: Any = reference.build(name, **options)
    else:
        model = getattr(torchvision_detection(), name)(weights=None, weights_backbone=None, **options)
    model.load_state_dict(load_file(weights))
    model = model.train(train).to(torch_device())
    if mode != "torchvision eager":
        model = model.to(memory_format=torch.channels_last)
    if mode == "torchvision compiled":
        compile_parts(model, freezing=not train)
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


# What trains: SGD on everything. The rate is small, since what a step costs in time depends on its proposals.
SGD: dict[str, Any] = {"momentum": 0.9, "weight_decay": 1e-4}


def flaxdet_training(
    model: Any, variables: Any, images: list[np.ndarray], targets: list[dict[str, np.ndarray]], rate: float
) -> tuple[Any, Any, Any]:
    """flaxdet's train step, the state that it starts from, and its batch: ``state, metrics = step(state, batch)``."""
    import jax

    from flaxdet.images.transform import transform, transform_targets
    from flaxdet.train import create_state, make_train_step, sgd, shard_batch

    tx = sgd(rate, **SGD)
    batch = transform(images, model.transform)
    padded = transform_targets(targets, batch, model=model, max_boxes=8)
    arrays = shard_batch({**vars(batch), **vars(padded)}, None)
    return make_train_step(model, tx), create_state(model, variables, tx, key=jax.random.key(0)), arrays


def torch_training(
    model: Any, images: list[np.ndarray], targets: list[dict[str, np.ndarray]], rate: float, *, dtype: str
) -> Callable[[], Any]:
    """A function that takes one step of torchvision's model and returns its loss, without waiting for it."""
    import torch

    device = torch_device()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, **SGD)
    tensors = [torch.from_numpy(image.copy()).permute(2, 0, 1).float().to(device) / 255 for image in images]
    wanted = [{key: torch.from_numpy(value).to(device) for key, value in target.items()} for target in targets]

    def step() -> Any:
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            loss: Any = sum(model(tensors, wanted).values())
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step
