"""torchvision's side of accelerator.py: inference and training steps. Imports no jax where its C++ operators load."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerator_common import SIZE, Notes, peak_resident, sizes, timed, weights_file
from accelerator_kernels import torch_kernels
from contenders import load_torch, torch_contender, torch_context, torch_device, torch_training
from photos import photos, training_examples

Run = Callable[[], Any]
RATE = 1e-6  # as accelerator_ours has it
POOLED = 1000

# The contenders of a case, each with the dtype that it computes in: bfloat16 is autocast. In a bfloat16 case eager mode
# runs with TF32, which is what torchvision does by default but for products.
CONTENDERS = {
    "bfloat16": {
        "eager": ("torchvision eager", "tf32"),
        "AMP": ("torchvision eager", "bfloat16"),
        "AMP, channels_last": ("torchvision channels_last", "bfloat16"),
        "AMP, compiled": ("torchvision compiled", "bfloat16"),
    },
    **{
        dtype: {
            "eager": ("torchvision eager", dtype),
            "channels_last": ("torchvision channels_last", dtype),
            "compiled": ("torchvision compiled", dtype),
        }
        for dtype in ("tf32", "float32")
    },
}


def wait(result: Any = None) -> Any:
    """Waits for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result


def inference(options: dict[str, Any], notes: Notes) -> str:
    """Images/s: from pixels to detections, on the device alone, and the network alone."""
    return _run_all(_inference, "inference", {"size": sizes(options)["min_size"]}, options, notes)


def training(options: dict[str, Any], notes: Notes) -> str:
    """Images/s of a training step."""
    rows, columns = options.get("shape") or (sizes(options)["rows"], sizes(options)["columns"])
    return _run_all(_training, "training", {"size": rows, "columns": columns}, options, notes)


def _run_all(make: Any, task: str, shape: dict[str, Any], options: dict[str, Any], notes: Notes) -> str:
    torch.backends.cudnn.benchmark = True
    found = []
    for model in options["models"]:
        for contender in options["contenders"]:
            for batch in sorted(options["batches"]):
                case = {**shape, "task": task, "model": model, "dtype": options["dtype"], "batch": batch}
                case |= {"contender": contender}
                with notes.attempt(**case):
                    found += _one(make, case, options, notes)
                _let_go()
    return ", ".join(found) or "nothing measured"


def _one(make: Any, case: dict[str, Any], options: dict[str, Any], notes: Notes) -> list[str]:
    """Measures one case; what is not measured with gradients holds none."""
    mode, dtype = CONTENDERS[case["dtype"]][case["contender"]]
    start = time.perf_counter()
    runs: dict[str, Run] = make(case, mode, dtype, options)
    first = next(iter(runs))
    wait(runs[first]())
    notes.add("compiled", seconds=time.perf_counter() - start, **case)  # to the end of the first call
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    found = []
    for what, run in runs.items():
        times = timed(run, wait, options)
        rate = case["batch"] / times["median"]
        loss = {"loss": run().item()} if what == "step" else {}
        notes.add("rate", what=what, images_per_second=rate, **times, **loss, **case)
        if what == first:
            peak = torch.cuda.max_memory_allocated() / 1024**2 if torch.cuda.is_available() else peak_resident()
            notes.add("memory", mib=peak, **case)
            found = [f"{case['model'].split('_')[0]} {case['contender']} {rate:.1f}"]
    if case["contender"] in options.get("profile", ()):
        profiled = runs.get("device", runs[first])
        notes.add("kernels", **torch_kernels(lambda: wait(profiled())), **case)
    if options.get("count") and "network" in runs and case["contender"] == options["contenders"][0]:
        with notes.attempt(what="counting operations", **case):
            notes.add("gflop", gflop=_count(runs["network"]), **case)
    return found


def _inference(case: dict[str, Any], mode: str, dtype: str, options: dict[str, Any]) -> dict[str, Run]:
    model = load_torch(case["model"], weights_file(options, case["model"]), mode, dtype=dtype, min_size=case["size"])
    pictures = photos(case["batch"], *SIZE)
    contender = torch_contender(model, dtype=dtype)
    tensors = [torch.from_numpy(np.array(x)).permute(2, 0, 1).contiguous().to(torch_device()) for x in pictures]
    heads: Any = getattr(model, "roi_heads", None)
    boxes = case["batch"] * (8 if options["small"] else POOLED)

    @functools.cache  # made when first used, since their memory counts
    def inputs() -> Any:
        pixels = model.transform([x.float() / 255 for x in tensors])[0].tensors
        if mode != "torchvision eager":
            pixels = pixels.to(memory_format=torch.channels_last)
        return pixels, None if heads is None else torch.rand(boxes, 256, 7, 7, device=torch_device())

    def device() -> Any:
        with torch_context(dtype):
            return model([x.float() / 255 for x in tensors])

    def network() -> Any:
        with torch_context(dtype):
            pixels, pooled = inputs()
            maps = list(model.backbone(pixels).values())
            if pooled is None:
                return model.head(maps)
            return model.rpn.head(maps), heads.box_predictor(heads.box_head(pooled))

    return {"pixels": lambda: contender(pictures), "device": device, "network": network}


def _training(case: dict[str, Any], mode: str, dtype: str, options: dict[str, Any]) -> dict[str, Run]:
    geometry = {"min_size": case["size"], "max_size": case["columns"]}
    model = load_torch(case["model"], weights_file(options, case["model"]), mode, dtype=dtype, train=True, **geometry)
    examples = training_examples(case["batch"], case["size"], case["columns"])
    return {"step": torch_training(model, *examples, RATE, dtype=dtype)}


def _count(run: Run) -> float:
    """GFLOP of a call, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e9


def _let_go() -> None:
    """Gives the device's memory back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
