"""The parts of both detectors, flaxdet against torchvision: NMS, RoIAlign, resize, and each stage of the models.

    python benchmarks/parts.py [--only nms roi_align resize stages] [--model MODEL ...] [--repeats 7] [--json FILE]

- NMS as the detectors call it, on seeded boxes in overlapping groups, for 1 and 16 images: the RPN's (5 levels of 1000
  boxes to 1000), FCOS's (5000 to 100), Faster R-CNN's (1000 proposals x 90 classes, those above .05, to 100).
  torchvision's C++ runs with one thread and with its default, since more threads can be slower; the better one counts.
- RoIAlign of 1000 boxes on 256 channels and four levels of 800x1088, forward and backward to the features.
- Resize and normalisation of a 480x640 photo to 800x1066, uint8 to a padded batch.
- Stages of the models on one photo, each on the output of the stage before, flaxdet's BatchNorm folded as in
  ``Predictor``, torchvision eager and channels_last.

Prints medians and ratios, and how far both sides' answers agree; writes them as JSON.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from common import (
    describe_machine,
    json_path,
    lively_weights,
    measure_short,
    photo,
    share_gpu,
    show,
    wait,
    write,
)
from contenders import MODELS, geometry, load_flaxdet, load_torch, torch_device

import flaxdet
from flaxdet.models.detector import call_part, level_shapes
from flaxdet.ops import batched_nms, multiscale_roi_align
from flaxdet.structures import TransformConfig
from flaxdet.transform import resize_image, transform

Run = Callable[[], Any]
ROWS, COLUMNS = 800, 1066  # of the resized photo; its canvas is 800x1088
SCORE = 0.05  # Faster R-CNN's threshold
NMS_IMAGES = (1, 16)


def jitted(function: Callable[..., Any]) -> Any:
    """Compiled as flaxdet compiles its own."""
    return jax.jit(function, compiler_options=flaxdet.compiler_options())


def ready(function: Callable[..., Any], *args: Any) -> Run:
    """A call that waits for its result."""
    return lambda: jax.block_until_ready(function(*args))


def tensors(tree: Any) -> Any:
    """numpy arrays as torch tensors on torch's device."""
    return jax.tree.map(lambda x: torch.from_numpy(np.array(x)).to(torch_device()), tree)


def with_threads(count: int, function: Run) -> Run:
    """A torch function run with a number of threads."""

    def run() -> Any:
        torch.set_num_threads(count)
        return wait(function())

    return run


# NMS


def grouped_boxes(rng: np.random.Generator, count: int, objects: int, small: float, large: float) -> np.ndarray:
    """[count, 4] boxes around some objects, as a detector proposes them: near ones often, shifted and stretched."""
    side = np.exp(rng.uniform(np.log(small), np.log(large), (objects, 1)))
    size = side * np.exp(rng.normal(0, 0.4, (objects, 2)))
    centre = rng.uniform(0, (COLUMNS, ROWS), (objects, 2))
    of = rng.integers(objects, size=count)
    centre = centre[of] + rng.normal(0, 0.15, (count, 2)) * size[of]
    size = size[of] * np.exp(rng.normal(0, 0.2, (count, 2)))
    boxes = np.concatenate([centre - size / 2, centre + size / 2], axis=1)
    return boxes.clip(0, (COLUMNS, ROWS, COLUMNS, ROWS)).astype(np.float32)


def distinct_scores(rng: np.random.Generator, low: float, count: int) -> np.ndarray:
    """[count] from low to 1 in any order; no two alike, as torchvision does not say which of them goes first."""
    return rng.permutation(np.linspace(low, 1, count, dtype=np.float32))


def rpn_case(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes, scores and levels of the RPN's 5 x 1000 candidates."""
    sides = [(32 * 2**level / 1.5, 32 * 2**level * 1.5) for level in range(5)]
    boxes = np.concatenate([grouped_boxes(rng, 1000, 120, *side) for side in sides])
    return boxes, distinct_scores(rng, 0.3, 5000), np.repeat(np.arange(5), 1000)


def fcos_case(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes, scores and labels of FCOS's 5 x 1000 candidates, all above its threshold."""
    boxes = np.concatenate([grouped_boxes(rng, 1000, 60, 16 * 2**level, 32 * 2**level) for level in range(5)])
    return boxes, distinct_scores(rng, 0.201, 5000), rng.integers(0, 20, 5000)


def faster_rcnn_case(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes, scores and labels of 1000 proposals x 90 classes; one in two proposals is of some class."""
    proposals = grouped_boxes(rng, 1000, 60, 24, 500)
    shifts = rng.normal(0, 2, (1000, 90, 4))
    boxes = (proposals[:, None] + shifts).reshape(-1, 4).clip(0, (COLUMNS, ROWS, COLUMNS, ROWS)).astype(np.float32)
    scores = rng.uniform(0, SCORE / 2, (1000, 90))
    scores[np.arange(500), rng.integers(0, 20, 500)] = distinct_scores(rng, SCORE + 0.001, 500)
    return boxes, scores.reshape(-1).astype(np.float32), np.tile(np.arange(1, 91), 1000)


# name: (candidates, IoU, kept, lowest score)
NMS = {
    "RPN, 5 x 1000 -> 1000, iou .7": (rpn_case, 0.7, 1000, 0.0),
    "FCOS, 5000 -> 100, iou .6": (fcos_case, 0.6, 100, 0.2),
    "Faster R-CNN, 90,000 -> 100, iou .5": (faster_rcnn_case, 0.5, 100, SCORE),
}


def our_nms(threshold: float, kept: int, lowest: float, *arrays: Any) -> Any:
    """Indices kept, of boxes, scores and labels [B, N, ...]."""

    def one(boxes: Any, scores: Any, labels: Any) -> Any:
        return batched_nms(boxes, scores, labels, threshold, max_output=kept, valid=scores > lowest)

    return jax.vmap(one)(*arrays)


def their_nms(threshold: float, kept: int, lowest: float, images: Any) -> list[torch.Tensor]:
    """Indices kept, of boxes, scores and labels of each image."""
    from torchvision.ops import boxes as torch_boxes

    found = []
    for boxes, scores, labels in images:
        (candidates,) = torch.where(scores > lowest)
        keep = torch_boxes.batched_nms(boxes[candidates], scores[candidates], labels[candidates], threshold)
        found.append(candidates[keep[:kept]])
    return found


def nms_benchmark(options: Any) -> dict[str, Any]:
    """All cases, for one image and several."""
    default_threads = torch.get_num_threads()
    results: dict[str, Any] = {}
    for case, (make, *numbers) in NMS.items():
        for count in NMS_IMAGES:
            title = f"{case}, {count} image{'s' * (count > 1)}"
            images = [make(np.random.default_rng(i)) for i in range(count)]
            boxes, scores, labels = (np.stack(arrays) for arrays in zip(*images, strict=True))
            arrays = jax.device_put((boxes, scores, labels.astype(np.int32)))
            ours = ready(jitted(functools.partial(our_nms, *numbers)), *arrays)
            theirs = functools.partial(their_nms, *numbers, tensors(images))
            functions = {"flaxdet": ours}
            for threads in sorted({1, default_threads}):
                functions[f"torchvision, {threads} thread{'s' * (threads > 1)}"] = with_threads(threads, theirs)
            result = with_ratio(show(f"NMS, {title}", measure_short(functions, options.repeats), "ms"))
            torch.set_num_threads(default_threads)
            pairs = zip(np.asarray(ours()), theirs(), strict=True)
            result["images_that_agree"] = sum(np.array_equal(a[a >= 0], b.cpu().numpy()) for a, b in pairs)
            print(f"  the same boxes kept, in the same order, in {result['images_that_agree']} of {count}\n")
            results[title] = result
    return results


def with_ratio(result: dict[str, Any]) -> dict[str, Any]:
    """Adds how many times as fast as torchvision's better mode flaxdet is, and prints it."""
    best = min((value, name) for name, value in result["median"].items() if name != "flaxdet")
    result["compared_with"], result["times_as_fast"] = best[1], best[0] / result["median"]["flaxdet"]
    print(f"  flaxdet is {result['times_as_fast']:.2f} times as fast as {best[1]}", flush=True)
    return result


# RoIAlign


def roi_align_benchmark(options: Any) -> dict[str, Any]:
    """Forward, and backward to the features."""
    from torchvision.ops import MultiScaleRoIAlign

    rng = np.random.default_rng(0)
    rows, columns = options.min_size, round(options.min_size * 1088 / 800)
    maps = [rng.standard_normal((rows // s, columns // s, 256), np.float32) for s in (4, 8, 16, 32)]
    boxes = grouped_boxes(rng, 1000, 120, 16, 600) * np.float32(rows / ROWS)
    cotangent = rng.standard_normal((1000, 7, 7, 256), np.float32)

    align = functools.partial(
        multiscale_roi_align, output_size=7, scales=[1 / 4, 1 / 8, 1 / 16, 1 / 32], sampling_ratio=2
    )
    ours_maps, ours_boxes, ours_cotangent = jax.device_put((maps, boxes, cotangent))
    forward = ready(jitted(lambda maps, boxes: align(maps, boxes)), ours_maps, ours_boxes)

    def gradient(maps: Any, boxes: Any, cotangent: Any) -> Any:
        return jax.vjp(lambda maps: align(maps, boxes), maps)[1](cotangent)  # what the forward computed is not needed

    backward = ready(jitted(gradient), ours_maps, ours_boxes, ours_cotangent)

    torch_maps = {str(i): x.permute(2, 0, 1)[None].contiguous().requires_grad_() for i, x in enumerate(tensors(maps))}
    torch_boxes = [tensors(boxes)]
    torch_cotangent = tensors(cotangent).permute(0, 3, 1, 2).contiguous()
    pool = MultiScaleRoIAlign(list(torch_maps), 7, 2)
    size = [(rows, round(rows * COLUMNS / ROWS))]

    def their_forward() -> torch.Tensor:
        with torch.no_grad():
            return wait(pool(torch_maps, torch_boxes, size))

    pooled = pool(torch_maps, torch_boxes, size)

    def their_backward() -> Any:
        return wait(torch.autograd.grad(pooled, list(torch_maps.values()), torch_cotangent, retain_graph=True))

    results = {}
    title = f"RoIAlign, 1000 boxes, 256 channels, four levels of {rows}x{columns}"
    for direction, ours, theirs in (("forward", forward, their_forward), ("backward", backward, their_backward)):
        functions = {"flaxdet": ours, "torchvision": theirs}
        result = with_ratio(show(f"{title}, {direction}", measure_short(functions, options.repeats), "ms"))
        pairs = [(ours(), theirs())] if direction == "forward" else zip(ours()[0], theirs(), strict=True)
        result["largest_difference"] = max(
            float(np.abs(np.moveaxis(np.asarray(a), -1, -3) - b.detach().cpu().numpy()).max()) for a, b in pairs
        )
        print(f"  largest difference {result['largest_difference']:.1e}\n")
        results[direction] = result
    return results


# resize


def resize_benchmark(options: Any) -> dict[str, Any]:
    """From uint8 to a normalised, padded batch of one."""
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    config = TransformConfig(**geometry(options.min_size))
    image = photo()
    batch = transform([image], config)
    raw = np.zeros((1, 640, 640, 3), np.uint8)
    raw[0, :480] = image
    resize = functools.partial(
        resize_image,
        bucket=batch.pixels.shape[1:3],
        mean=config.image_mean,  # pyright: ignore[reportArgumentType]
        std=config.image_std,  # pyright: ignore[reportArgumentType]
        dtype=jnp.float32,
    )
    ours = ready(jitted(jax.vmap(resize)), jax.device_put(raw), batch.original_size, batch.size)
    prepare = GeneralizedRCNNTransform(
        **geometry(options.min_size),
        image_mean=list(config.image_mean or ()),
        image_std=list(config.image_std or ()),
    ).eval()
    tensor = tensors(image).permute(2, 0, 1).contiguous()

    def theirs() -> torch.Tensor:
        with torch.no_grad():
            return wait(prepare([tensor.float() / 255])[0].tensors)

    rows, columns = (int(side) for side in batch.size[0])
    title = f"resize and normalise, 480x640 to {rows}x{columns}"
    seconds = measure_short({"flaxdet": ours, "torchvision": theirs}, options.repeats)
    result = with_ratio(show(title, seconds, "ms"))
    result["largest_difference"] = float(np.abs(np.moveaxis(np.asarray(ours()), -1, 1) - theirs().cpu().numpy()).max())
    print(f"  largest difference {result['largest_difference']:.1e}\n")
    return {title: result}


# stages


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


PARTS = {
    "nms": nms_benchmark,
    "roi_align": roi_align_benchmark,
    "resize": resize_benchmark,
    "stages": stages_benchmark,
}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--min-size", type=int, default=800)
    parser.add_argument("--json", type=Path, help="default: benchmarks/parts.json")
    options = parser.parse_args()

    share_gpu()
    machine = describe_machine()
    print(f"float32, shorter side {options.min_size}: median (smallest to largest)\n")
    results: dict[str, Any] = {"min_size": options.min_size}
    for part in options.only:
        results[part] = PARTS[part](options)
        write(options.json or json_path("parts"), machine, results)


if __name__ == "__main__":
    main()
