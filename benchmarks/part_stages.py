"""Each stage of the models, from backbone to detections; run by ``python benchmarks/parts.py --only stages``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import lively_weights, measure_short, photo, show, wait
from contenders import load_flaxdet, load_torch
from part_common import Run, jitted, ready, tensors, with_ratio

import flaxdet
from flaxdet.images.transform import transform
from flaxdet.models.detector import call_part
from flaxdet.models.levels import level_shapes


def our_stages(weights: Path, options: Any) -> dict[str, Run]:
    """flaxdet's stages, each on the output of the one before."""
    model, variables = flaxdet.fold_batch_norm(*load_flaxdet(weights, dtype="float32", min_size=options.min_size))
    batch = transform([photo()], model.transform)
    stages: dict[str, Run] = {}

    def stage(name: str, function: Callable[..., Any], *args: Any) -> Any:
        run = jitted(lambda variables, *args: model.apply(variables, *args, method=function))
        stages[name] = ready(run, variables, *args)
        return stages[name]()

    features = stage("backbone", lambda m, batch: m.features(batch), batch)
    shapes = level_shapes(features)
    if isinstance(model, flaxdet.FCOS):
        outputs = stage("head", lambda m, x: call_part(m.head, x, role="head"), features)
        stage("postprocess", lambda m, x, batch: m.postprocess(x, batch, shapes), outputs, batch)
    else:
        outputs = stage("rpn head", lambda m, x, batch: m.rpn(x, batch), features, batch)
        proposals = stage("proposals", lambda m, x, batch: m.filter_proposals(*x, batch, shapes), outputs, batch)
        answers = stage("roi pool and box head", lambda m, *args: m.box(*args), features, proposals, batch)
        stage("postprocess", lambda m, x, *args: m.postprocess(*x, *args), answers, proposals, batch)
    return stages


def torch_stages(name: str, weights: Path, mode: str, options: Any) -> dict[str, Run]:
    """torchvision's stages, each on the output of the one before; anchors count to what follows the head."""
    from torchvision.models.detection.rpn import concat_box_prediction_layers

    model = load_torch(name, weights, mode, dtype="float32", min_size=options.min_size)
    tensor = tensors(photo()).permute(2, 0, 1).float() / 255
    stages: dict[str, Run] = {}

    def stage(name: str, function: Callable[..., Any], *args: Any) -> Any:
        def run() -> Any:
            with torch.no_grad():
                return wait(function(*args))

        stages[name] = run
        return run()

    images, _ = model.transform([tensor])
    pixels = images.tensors
    if mode == "torchvision channels_last":
        pixels = pixels.to(memory_format=torch.channels_last)
    features = stage("backbone", model.backbone, pixels)
    maps = list(features.values())
    if name == "fcos_resnet50_fpn":

        def fcos_postprocess(outputs: Any) -> Any:
            cells = [x.shape[2] * x.shape[3] for x in maps]
            anchors = [list(x.split(cells)) for x in model.anchor_generator(images, maps)]
            split = {key: list(value.split(cells, dim=1)) for key, value in outputs.items()}
            return model.postprocess_detections(split, anchors, images.image_sizes)

        stage("postprocess", fcos_postprocess, stage("head", model.head, maps))
        return stages

    rpn, heads = model.rpn, model.roi_heads

    def propose(objectness: Any, deltas: Any) -> Any:
        anchors = rpn.anchor_generator(images, maps)
        cells = [x[0].numel() for x in objectness]
        objectness, deltas = concat_box_prediction_layers(objectness, deltas)
        boxes = rpn.box_coder.decode(deltas, anchors).view(len(anchors), -1, 4)
        return rpn.filter_proposals(boxes, objectness, images.image_sizes, cells)[0]

    def box(proposals: Any) -> Any:
        pooled = heads.box_roi_pool(features, proposals, images.image_sizes)
        return heads.box_predictor(heads.box_head(pooled))

    proposals = stage("proposals", propose, *stage("rpn head", rpn.head, maps))
    answers = stage("roi pool and box head", box, proposals)
    stage("postprocess", heads.postprocess_detections, *answers, proposals, images.image_sizes)
    return stages


def stages_benchmark(options: Any) -> dict[str, Any]:
    """Every stage of every model."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.safetensors"
        for name in options.model:
            lively_weights(name, weights)
            modes = ("torchvision eager", "torchvision channels_last")
            sides = {"flaxdet": our_stages(weights, options)}
            sides |= {mode: torch_stages(name, weights, mode, options) for mode in modes}
            results[name] = {}
            for stage in sides["flaxdet"]:
                functions = {side: stages[stage] for side, stages in sides.items()}
                seconds = measure_short(functions, options.repeats)
                results[name][stage] = with_ratio(show(f"{name}, {stage}", seconds, "ms"))
            print()
    return results
