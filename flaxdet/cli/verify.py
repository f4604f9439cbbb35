"""``flaxdet verify``: compares flaxdet's detections and stages with torchvision's."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from flaxdet import registry
from flaxdet.cli.options import (
    Key,
    ModelName,
    Quiet,
    check_key,
    check_sizes,
    free_name,
    is_file_name,
    make_folder,
    model_file,
    published,
    read_weights,
)

if TYPE_CHECKING:
    from flaxdet.files.models import ModelFile

_DRAWN = 30  # most detections in a picture: a hundred random boxes would hide the photo


@dataclass(frozen=True)
class Verify:
    """Show that torchvision and flaxdet give the same detections.

    Builds torchvision's model, converts the weights, runs torchvision and flaxdet on photos, and prints the largest
    difference of every stage, the number of matched detections, and the run times (compiled, second run). Saves a
    picture of the detections of torchvision and flaxdet, side by side. Exit status 0: every detection is matched, and
    every stage before the first selection is the same. Exit status 1: some detection or stage differs.

    Random weights (the default, no download) are seeded and lively: random layers and biases, BatchNorm statistics near
    the statistics of real activations, and class scores and box deltas with some 300 overlapping candidates above the
    threshold. So a swapped tensor changes the detections, and NMS has boxes to suppress
    (flaxdet.convert.lively.make_lively documents this).

    Needs torch and torchvision: pip install 'flaxdet[torch]'.
    """

    model: tyro.conf.Positional[Literal["all"] | ModelName] = "all"
    """The detector."""

    weights: str = "random"
    """random, COCO_V1 (downloaded once), a file (.pth or .safetensors) with torchvision's weights, or the folder of a
    run of flaxdet train."""

    key: Key = None
    """Which state_dict in the file: its name there (model_ema), or a prefix of keys (teacher). Default: the only one,
    else model, state_dict or model_state_dict."""

    image: Annotated[tuple[Path, ...], Quiet, tyro.conf.arg(metavar="FILE...")] = ()
    """Photos; each photo runs alone. Default: matplotlib's photo of Grace Hopper."""

    float64: tyro.conf.FlagCreatePairsOff[bool] = False
    """Compute in float64, in torchvision and flaxdet: boxes then agree within 1e-6 pixels (float32: .05)."""

    min_size: int = 800
    """Resize the shorter side to this many pixels; a smaller size is faster."""

    max_size: int = 1333
    """Limit of the longer side after the resize, in pixels."""

    seed: int = 0
    """Seed of the random weights."""

    out: Path = Path()
    """Folder for the pictures verify_MODEL.png."""

    progress: bool = True
    """Show a progress bar while downloading."""

    def run(self) -> int:
        """Runs the command; returns the exit status."""
        import jax

        from flaxdet.convert import reference
        from flaxdet.images.decode import read_image

        check_sizes(self.min_size, self.max_size)
        reference.torchvision()  # raises ImportError for a missing extra before anything is computed
        names, weights = self._weights()
        paths = self.image or (_sample_photo(),)
        images = {path: read_image(path) for path in paths}
        make_folder(self.out)
        print(_versions(reference.ops_kind()))
        same = True
        with jax.enable_x64(True) if self.float64 else contextlib.nullcontext():
            for name in names:
                same &= self._verify(name, weights, images)
        return 0 if same else 1

    def _weights(self) -> tuple[list[str], str | ModelFile]:
        """The names of the models to verify, and the weights: a name, or the content of a file."""
        names = registry.names() if self.model == "all" else [self.model]
        weights: str | ModelFile = self.weights
        if not is_file_name(self.weights):
            check_key(self.weights, self.key)
        if self.weights == "random":
            return names, weights
        if is_file_name(self.weights):
            weights = file = read_weights(model_file(self.weights), self.key)
            builder = file.builder
        elif "." in self.weights:
            builder, _ = published(self.weights)
        else:
            return [published(self.weights, name)[0] for name in names], weights
        if builder not in names:
            raise ValueError(f"{self.weights}: expected weights of {names[0]}, found {builder}")
        return [builder], weights

    def _verify(self, name: str, weights: str | ModelFile, images: dict[Path, Any]) -> bool:
        import numpy as np
        from PIL import Image

        from flaxdet.convert import verify
        from flaxdet.files import checkpoint
        from flaxdet.results.draw import draw_detections, side_by_side

        model, variables, theirs, categories = verify.both_sides(
            name,
            weights,
            dtype=np.float64 if self.float64 else np.float32,
            seed=self.seed,
            progress=self.progress,
            min_size=self.min_size,
            max_size=self.max_size,
        )
        verdict = True
        taken: set[str] = set()
        for path, image in images.items():
            comparison = verify.compare(model, variables, theirs, [image], timed=True)
            (match,) = comparison.matches
            verdict &= comparison.same
            _print_report(name, path, image, comparison)
            hidden = match.count > _DRAWN or match.ours > _DRAWN
            best = f", the best {_DRAWN} shown" if hidden else ""
            titles = (f"torchvision: {match.count}{best}", f"flaxdet: {match.ours}, {match.matched} matched{best}")
            left, right = (
                draw_detections(image, _best(detections[0]), categories=categories)
                for detections in (comparison.theirs, comparison.ours)
            )
            stem = f"verify_{name}" if len(images) == 1 else f"verify_{name}_{path.stem}"
            target = self.out / free_name(stem, ".png", taken)
            picture = Image.fromarray(side_by_side(left, right, titles))
            with checkpoint.replacing(target) as file:
                picture.save(file, format="PNG")
            print(f"  picture: {target}")
        return verdict


def _best(detection: dict[str, Any]) -> dict[str, Any]:
    return {name: values[:_DRAWN] for name, values in detection.items()}  # the best come first


def _print_report(name: str, path: Path, image: Any, comparison: Any) -> None:
    (match,) = comparison.matches
    print(f"\n{name} on {path.name} ({image.shape[0]}x{image.shape[1]})")
    print(f"  {'stage':<18} {'shape':<22} {'largest error':>14} {'of largest value':>17}")
    for stage in comparison.stages:
        shape = "x".join(str(side) for side in stage.shape)
        print(f"  {stage.name:<18} {shape:<22} {stage.error:>14.2e} {stage.relative:>17.1e}")
    share = 100.0 * match.matched / match.count if match.count else 100.0
    print(
        f"  detections: {match.count} of torchvision, {match.ours} of flaxdet, {match.matched} matched ({share:.0f}%)"
    )
    print(f"  largest difference: boxes {match.box_error:.2e} px, scores {match.score_error:.2e}")
    print(f"  time: torchvision {comparison.their_seconds:.2f} s, flaxdet {comparison.seconds:.2f} s")
    if comparison.first_difference is not None:
        print(f"  first stage that differs: {comparison.first_difference}")
    print(f"  verdict: {'the same' if comparison.same else 'DIFFERENT'}")


def _sample_photo() -> Path:
    try:
        from matplotlib import cbook
    except ImportError as error:
        raise ImportError("the photo comes with matplotlib: pip install matplotlib, or give one by --image") from error
    return Path(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))


def _versions(ops: str) -> str:
    from importlib.metadata import version

    packages = ("jax", "flax", "torch", "torchvision")
    listed = ", ".join(f"{package} {version(package)}" for package in packages)
    return f"{listed}; torchvision runs with {ops}"
