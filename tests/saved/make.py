"""Writes what users may hold of an earlier flaxdet: models, a training checkpoint, exported functions.

    python tests/saved/make.py FOLDER

Run once, by the flaxdet whose files are to be kept (tests/saved/0.1.0 is of commit 40b060f,
pytrees.stablehlo in it of a later one); ``test_saved.py`` reads
them with the flaxdet of today. The models are whole ResNet-50 detectors of few classes; their weights are those of
``content``, which compress to some kilobytes, and which the test makes again by the same rule.
"""

from __future__ import annotations

import io
import json
import lzma
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np

NAMES = ["__background__", "red", "green", "blue"]
GEOMETRY: dict[str, Any] = {"min_size": 96, "max_size": 160}
# by folder: builder and options
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "fcos": ("fcos_resnet50_fpn", {"score_thresh": 0.3}),
    "fcos_frozen": ("fcos_resnet50_fpn", {"frozen_bn": True, "trainable_backbone_layers": 3}),
    "v2": ("fasterrcnn_resnet50_fpn_v2", {"box_detections_per_img": 50}),
}
STEP = 7


def content(abstract: Any) -> Any:
    """Arrays for a tree of shapes: the i-th leaf is (i + 1) / 1024 but for its first 64 values, which count up."""
    leaves, structure = jax.tree.flatten(abstract)

    def fill(i: int, leaf: Any) -> np.ndarray:
        array = np.full(leaf.shape, (i + 1) / 1024, leaf.dtype)
        first = array.reshape(-1)[:64]
        first += np.arange(len(first), dtype=leaf.dtype) / leaf.dtype.type(64)
        return array

    return jax.tree.unflatten(structure, [fill(i, leaf) for i, leaf in enumerate(leaves)])


def pytrees() -> list[Any]:
    """One of each class that jax.export writes."""
    import flaxdet
    from flaxdet.train.state import TrainState

    boxes, scores, labels = np.ones((1, 2, 4), np.float32), np.ones((1, 2), np.float32), np.ones((1, 2), np.int32)
    pixels, sizes, valid = np.ones((1, 4, 4, 3), np.float32), np.full((1, 2), 4, np.int32), np.ones((1, 2), bool)
    step, key, params = np.int32(3), np.ones(2, np.uint32), {"kernel": np.ones(2, np.float32)}
    trees: list[Any] = [
        flaxdet.ImageBatch(pixels, sizes, sizes, None),  # pyright: ignore[reportArgumentType]
        flaxdet.ImageBatch(pixels, sizes, sizes, sizes),  # pyright: ignore[reportArgumentType]
        flaxdet.Targets(boxes, labels, valid),  # pyright: ignore[reportArgumentType]
        flaxdet.Proposals(boxes, scores, valid),  # pyright: ignore[reportArgumentType]
        flaxdet.Detections(boxes, scores, labels, valid),  # pyright: ignore[reportArgumentType]
        TrainState(step, params, {}, {"trace": params}, key),  # pyright: ignore[reportArgumentType]
    ]
    return trees


def serialise(tree: Any) -> bytearray:
    """A function that gives back its argument, as jax.export writes it."""
    return jax.export.export(jax.jit(lambda x: x))(tree).serialize()


def compress(source: Path, target: Path) -> None:
    """As .xz."""
    target.write_bytes(lzma.compress(source.read_bytes(), preset=6))


def archive(folder: Path, target: Path) -> None:
    """A folder as .tar.xz, without the time and the owner of its files."""

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.mtime = entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        return entry

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        file.add(folder, arcname=folder.name, filter=plain)
    target.write_bytes(lzma.compress(buffer.getvalue(), preset=9))


def main() -> None:
    """Writes them."""
    import flaxdet
    from flaxdet.convert.state_dict import abstract_variables
    from flaxdet.registry import make_model
    from flaxdet.train import Checkpoints, create_state, sgd
    from tests.tiny import FCOS_NAME, tiny_model, tiny_variables

    jax.config.update("jax_hlo_source_file_canonicalization_regex", ".*/")  # no path of this machine in a file
    out = Path(sys.argv[1])
    out.mkdir(parents=True)
    for kind, (builder, options) in MODELS.items():
        model = make_model(builder, num_classes=len(NAMES), **GEOMETRY, **options)
        variables = content(abstract_variables(model))
        (out / kind).mkdir()
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            for name in ("model.safetensors", "model.pth"):
                flaxdet.save(folder / name, model, variables, categories=NAMES)
                compress(folder / name, out / kind / f"{name}.xz")
            flaxdet.save_pretrained(folder / "hub", model, variables, categories=NAMES)
            same = (folder / "hub" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
            assert same  # so it is kept once
            for name in ("config.json", "README.md"):
                shutil.copy(folder / "hub" / name, out / kind / name)

    model = tiny_model(FCOS_NAME, score_thresh=0.05, head=None)  # FCOS's own head
    variables = tiny_variables(model)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tx = sgd(0.1, momentum=0.9)
        state = create_state(model, content(variables), tx, key=jax.random.key(3), ema=True)
        with Checkpoints(folder / "checkpoints", config={"epochs": 3}) as checkpoints:
            state = state.replace(step=state.step + STEP)  # pyright: ignore[reportAttributeAccessIssue]
            checkpoints.save(state, {"epoch": 1, "next": 2}, metrics={"AP": 0.25}, wait=True)
        archive(folder / "checkpoints", out / "checkpoints.tar.xz")

        (out / "pytrees.stablehlo").write_bytes(serialise(pytrees()))
        flaxdet.export(folder / "exported", model, variables, buckets=[(64, 96)], raw_size=128, categories=NAMES)
        archive(folder / "exported", out / "exported.tar.xz")
        image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
        (found,) = flaxdet.load_exported(folder / "exported")([image])
        assert len(found["scores"]) > 10
        answer = {name: value.tolist() for name, value in found.items()}
        answer |= {"jax": jax.__version__, "written": "2026-11-26"}
        (out / "exported.json").write_text(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
