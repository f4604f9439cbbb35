"""A real fine-tune, flaxdet against torchvision: the same weights, the same batches, the same schedule.

    python benchmarks/finetune.py OUT [--side flaxdet|torchvision|both] [--json FILE] -- OPTIONS OF flaxdet train

flaxdet trains by `flaxdet train` (a run that is already in OUT is only evaluated). torchvision starts from the same
variables, converted, gets the same pixels and boxes from the same pipeline, and steps by torch.optim.SGD at the same
learning rates. Each library then evaluates its model on the validation images, one at a time, at their original size,
and torchvision evaluates flaxdet's model too. Prints COCO AP before and after; writes them as JSON, with the time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import tyro
from tqdm import tqdm

from flaxdet import registry
from flaxdet.cli.main import main as command
from flaxdet.cli.train import Train
from flaxdet.convert import reference, to_torchvision
from flaxdet.evaluation.coco_metrics import evaluate_results
from flaxdet.evaluation.evaluate import coco_results, evaluate
from flaxdet.files.models import load
from flaxdet.train import trainable_mask

BUILDERS = {"FCOS": "fcos_resnet50_fpn", "FasterRCNN": "fasterrcnn_resnet50_fpn_v2"}
FIGURES = ("ap", "ap50", "ap75")


def torch_model(model: Any, variables: Any) -> Any:
    """torchvision's model with the same weights and the same trainable parameters."""
    geometry = {"min_size": model.transform.min_size, "max_size": model.transform.max_size}
    theirs = reference.build(BUILDERS[type(model).__name__], num_classes=model.num_classes, **geometry)
    theirs.load_state_dict({key: torch.from_numpy(value) for key, value in to_torchvision(model, variables).items()})
    mask = jax.tree.map(np.asarray, trainable_mask(model, variables["params"]))
    chosen = jax.tree.map(lambda m, p: np.full(p.shape, m), mask, variables["params"])
    trains = to_torchvision(model, {**variables, "params": chosen})
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(bool(trains[name].all()))
    return theirs


def torch_evaluate(theirs: Any, val: Any) -> dict[str, float]:
    """COCO's figures of torchvision's own detections, one image at a time."""
    theirs.eval()
    found = []
    with torch.no_grad():
        for i in tqdm(range(len(val)), desc="torchvision on val"):
            reference.see_ordinary_photo(theirs)
            tensor = torch.from_numpy(val.read_image(i).copy()).permute(2, 0, 1).float() / 255
            (detections,) = theirs([tensor])
            found.append({name: value.numpy() for name, value in detections.items()})
    rows = coco_results(found, [val[i].image_id for i in range(len(val))], val.category_ids)
    result = evaluate_results(rows, val.annotations)
    return {name: getattr(result, name) for name in FIGURES}


def torch_train(options: Train, model: Any, theirs: Any, train: Any) -> float:
    """torchvision's training on flaxdet's batches; seconds."""
    steps_per_epoch = math.ceil(len(train) / options.batch_size)
    steps = options.epochs * steps_per_epoch
    batches = options.batches(model, train, steps)
    _, schedule = options.optimiser(registry.nearest(model).training, steps_per_epoch)
    parameters = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    sgd = torch.optim.SGD(parameters, lr=1.0, momentum=options.momentum, weight_decay=options.weight_decay)
    theirs.to(memory_format=torch.channels_last).train()
    if options.pretrained if options.freeze_bn is None else options.freeze_bn:
        for module in theirs.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()
    image_list = reference.torchvision().models.detection.image_list.ImageList
    start = time.perf_counter()
    for step in (bar := tqdm(range(steps), desc="torchvision trains")):
        batch = next(batches)
        sizes = [(int(rows), int(columns)) for rows, columns in batch["size"]]
        images = image_list(torch.from_numpy(batch["pixels"]).permute(0, 3, 1, 2), sizes)
        rows = zip(batch["boxes"], batch["labels"], batch["valid"], strict=True)
        targets = [{"boxes": torch.from_numpy(b[v]), "labels": torch.from_numpy(k[v]).long()} for b, k, v in rows]
        # the batch has been through the transform: the same resize as torchvision's, by flaxdet
        theirs.transform.forward = lambda given, targets, images=images: (images, targets)
        for group in sgd.param_groups:
            group["lr"] = float(schedule(step))
        sgd.zero_grad()
        loss = sum(theirs(list(images.tensors), targets).values())
        loss.backward()  # pyright: ignore[reportAttributeAccessIssue]
        sgd.step()
        bar.set_postfix(loss=f"{float(loss):.3f}")
    del theirs.transform.forward
    return time.perf_counter() - start


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--side", choices=("flaxdet", "torchvision", "both"), default="both")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/finetune.json"))
    ours = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    arguments, given = parser.parse_args(sys.argv[1:ours]), sys.argv[ours + 1 :]
    options = dataclasses.replace(tyro.cli(Train, args=given), out=arguments.out / "flaxdet")
    model, variables, train, val = options.starting_point()
    assert val is not None
    report = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    report["machine"] = {
        "processor": platform.processor() or platform.machine(),
        "device": jax.devices()[0].device_kind,
        "torch_threads": torch.get_num_threads(),
        "torchvision_ops": reference.ops_kind(),
        **{package: version(package) for package in ("jax", "flax", "optax", "torch", "torchvision")},
    }
    report["options"] = {**options.config(), "weights": Path(options.weights).name}
    trained = options.out / "model.safetensors"

    def note(side: str, moment: str, value: Any) -> None:
        report.setdefault(side, {})[moment] = value
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")

    if arguments.side != "torchvision":
        before = evaluate(model, variables, val)
        note("flaxdet", "before", {name: getattr(before, name) for name in FIGURES})
        if not trained.exists():
            start = time.perf_counter()
            if status := command(["train", *given, "--out", str(options.out)]):
                sys.exit(status)
            note("flaxdet", "seconds", time.perf_counter() - start)
        after = evaluate(*load(trained), val)
        note("flaxdet", "after", {name: getattr(after, name) for name in FIGURES})
    if arguments.side != "flaxdet":
        theirs = torch_model(model, variables)
        note("torchvision", "before", torch_evaluate(theirs, val))
        note("torchvision", "seconds", torch_train(options, model, theirs, train))
        note("torchvision", "after", torch_evaluate(theirs, val))
        if trained.exists():
            theirs.load_state_dict(torch.load(trained.with_suffix(".pth"), weights_only=True), strict=True)
            note("flaxdet", "after, handed back to torchvision", torch_evaluate(theirs, val))
    for side in ("flaxdet", "torchvision"):
        for moment, figures in report.get(side, {}).items():
            if moment != "seconds":
                print(f"{side} {moment}:", *(f"{name} {value:.4f}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
