"""``flaxdet verify``: the proof that ours and torchvision's answers are the same."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from flaxdet import registry
from flaxdet.cli.options import (
    ModelName,
    Quiet,
    check_sizes,
    free_name,
    is_file_name,
    make_folder,
    published,
)

if TYPE_CHECKING:
    from flaxdet.files.models import ModelFile

_DRAWN = 30  # detections in a picture: a hundred random boxes hide the photo and each other


@dataclass(frozen=True)
class Verify:
    """Show that torchvision and flaxdet give the same answer.

    Builds torchvision's model, converts its weights, runs both on photos, and prints stage by stage the largest
    difference, then the detections matched and both times (compiled and warm). Saves a picture of both side by side.
    Exit status 0: every detection matched, and every stage before the first selection is the same; 1: not.

    Random weights (the default, no download) are seeded and lively: every layer drawn anew, biases moved, BatchNorm
    given the statistics of real activations and moved off them, class scores and box offsets spread until some 300
    overlapping candidates pass the threshold; so a swapped tensor shows, and NMS has work to do
    (flaxdet.convert.lively.make_lively says how).

    Needs torch and torchvision: pip install 'flaxdet[torch]'.
    """

    model: tyro.conf.Positional[Literal["all"] | ModelName] = "all"
    """Which detector."""

    weights: str = "random"
    """random, COCO_V1 (downloaded once), or a file (.pth or .safetensors) of torchvision's weights."""

    image: Annotated[tuple[Path, ...], Quiet, tyro.conf.arg(metavar="FILE...")] = ()
    """Photos to run on, each alone. Default: matplotlib's photo of Grace Hopper."""

    float64: tyro.conf.FlagCreatePairsOff[bool] = False
    """Compute in float64 on both sides: boxes then agree within 1e-6 pixels (float32: .05)."""

    min_size: int = 800
    """Resize the shorter side to this many pixels; smaller is quicker."""

    max_size: int = 1333
    """But the longer side to no more than this."""

    seed: int = 0
    """Of the random weights."""

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
        reference.torchvision()  # a missing extra shows before anything is computed
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
        """The models to verify, those asked for or the one that the weights belong to, and a file's content."""
        from flaxdet.files.models import read_model

        names = registry.names() if self.model == "all" else [self.model]
        weights: str | ModelFile = self.weights
        if self.weights == "random":
            return names, weights
        if is_file_name(self.weights):
            weights = read_model(self.weights)
            found = weights.builder
        elif "." in self.weights:
            found, _ = published(self.weights)
        else:
            return [published(self.weights, name)[0] for name in names], weights
        if found not in names:
            raise ValueError(f"{self.weights}: expected weights of {names[0]}, found {found}")
        return [found], weights

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
            found = verify.compare(model, variables, theirs, [image], timed=True)
            (match,) = found.matches
            verdict &= found.same
            _print_report(name, path, image, found)
            hidden = match.count > _DRAWN or match.ours > _DRAWN
            best = f", the best {_DRAWN} shown" if hidden else ""
            titles = (f"torchvision: {match.count}{best}", f"flaxdet: {match.ours}, {match.matched} matched{best}")
            left, right = (
                draw_detections(image, _best(detections[0]), categories=categories)
                for detections in (found.theirs, found.ours)
            )
            stem = f"verify_{name}" if len(images) == 1 else f"verify_{name}_{path.stem}"
            target = self.out / free_name(stem, ".png", taken)
            picture = Image.fromarray(side_by_side(left, right, titles))
            with checkpoint.replacing(target) as file:
                picture.save(file, format="PNG")
            print(f"  picture: {target}")
        return verdict


def _best(detection: dict[str, Any]) -> dict[str, Any]:
    return {name: values[:_DRAWN] for name, values in detection.items()}  # they come best first


def _print_report(name: str, path: Path, image: Any, found: Any) -> None:
    (match,) = found.matches
    print(f"\n{name} on {path.name} ({image.shape[0]}x{image.shape[1]})")
    print(f"  {'stage':<18} {'shape':<22} {'largest error':>14} {'of largest value':>17}")
    for stage in found.stages:
        shape = "x".join(str(side) for side in stage.shape)
        print(f"  {stage.name:<18} {shape:<22} {stage.error:>14.2e} {stage.relative:>17.1e}")
    share = 100.0 * match.matched / match.count if match.count else 100.0
    print(
        f"  detections: {match.count} of torchvision, {match.ours} of flaxdet, {match.matched} matched ({share:.0f}%)"
    )
    print(f"  largest difference: boxes {match.box_error:.2e} px, scores {match.score_error:.2e}")
    print(f"  time: torchvision {found.their_seconds:.2f} s, flaxdet {found.seconds:.2f} s")
    if found.first_difference is not None:
        print(f"  first stage that differs: {found.first_difference}")
    print(f"  verdict: {'the same' if found.same else 'DIFFERENT'}")


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
