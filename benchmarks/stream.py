"""A stream of photos, each of another size: flaxdet's ``Predictor`` against torchvision.

    python benchmarks/stream.py [--model MODEL ...] [--count 200] [--batch 1] [--torch-count 200] [--json FILE]

Photos of `--count` different sizes (resized crops of three real photos) are written as JPEG files, which both libraries
read. flaxdet has the default buckets and is warmed up; every program that XLA compiles after that is counted, of the
model or not. torchvision runs eager, one photo at a time, on the first --torch-count photos, flaxdet on all. Prints
images/s and the counts, and writes them as JSON.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import describe_machine, json_path, lively_weights, share_gpu, write
from contenders import DTYPES, MODELS, load_flaxdet, load_torch, torch_contender
from PIL import Image
from tqdm import tqdm

import flaxdet

ASPECTS = (1.0, 4 / 3, 3 / 2, 16 / 9, 3 / 4, 2 / 3, 9 / 16)  # width to height, as cameras and screens have them


def originals() -> list[Image.Image]:
    """The real photos that are at hand, in packages."""
    from matplotlib import cbook

    images = [Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")]
    try:
        from sklearn.datasets import load_sample_image
    except ImportError:
        return images
    return images + [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]


def sizes(count: int) -> list[tuple[int, int]]:
    """Different (columns, rows): the usual shapes and, one in three, any shape between 1:2 and 2:1."""
    rng = np.random.default_rng(0)
    found: dict[tuple[int, int], None] = {}
    while len(found) < count:
        aspect = 2 ** rng.uniform(-1, 1) if rng.random() < 1 / 3 else rng.choice(ASPECTS)
        side = rng.uniform(300, 1000)  # root of the area
        found[(round(side * aspect**0.5), round(side / aspect**0.5))] = None
    return list(found)


def write_photos(folder: Path, count: int) -> list[Path]:
    """Crops of the real photos as JPEG files, each of another size."""
    rng = np.random.default_rng(1)
    sources, paths = originals(), []
    for i, (columns, rows) in enumerate(sizes(count)):
        source = sources[i % len(sources)]
        # the largest crop of that shape, or down to 60% of it
        scale = min(source.width / columns, source.height / rows) * rng.uniform(0.6, 1)
        width, height = columns * scale, rows * scale
        left, top = rng.uniform(0, source.width - width), rng.uniform(0, source.height - height)
        crop = source.resize((columns, rows), Image.Resampling.BICUBIC, (left, top, left + width, top + height))
        paths.append(folder / f"{i:04d}.jpg")
        crop.save(paths[-1], quality=92)
    return paths


class CompileCounter:
    """Counts what XLA compiles, by jax's own events."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


def ours(weights: Path, paths: list[Path], counter: CompileCounter, options: Any) -> dict[str, Any]:
    """flaxdet's figures."""
    model, variables = load_flaxdet(weights, dtype=options.dtype, min_size=options.min_size)
    predictor = flaxdet.Predictor(model, variables, batch_size=options.batch)
    start = time.perf_counter()
    predictor.warmup(progress=True)
    warmup = time.perf_counter() - start
    before = {"programs": predictor.compile_count, "model": predictor.model_compile_count, "xla": counter.count}
    predictor([np.asarray(Image.open(paths[0]))])  # as torchvision's side below
    start, detections = time.perf_counter(), 0
    for found in tqdm(predictor.stream(paths), total=len(paths), desc="flaxdet"):
        if isinstance(found, Exception):
            raise found
        detections += len(found["boxes"])
    seconds = time.perf_counter() - start
    after = {"programs": predictor.compile_count, "model": predictor.model_compile_count, "xla": counter.count}
    return {
        "images": len(paths),
        "seconds": seconds,
        "images_per_second": len(paths) / seconds,
        "detections": detections,
        "buckets": predictor.buckets,
        "warmup_seconds": warmup,
        "compiled_before": before,
        "compiled_after": after,
    }


def theirs(name: str, weights: Path, paths: list[Path], options: Any) -> dict[str, Any]:
    """torchvision's figures."""
    mode = "torchvision eager"
    run = torch_contender(
        load_torch(name, weights, mode, dtype=options.dtype, min_size=options.min_size), dtype=options.dtype
    )
    run([np.array(Image.open(paths[0]))])
    start, detections = time.perf_counter(), 0
    for path in tqdm(paths, desc=mode):
        (found,) = run([np.array(Image.open(path))])
        detections += len(found["boxes"])
    seconds = time.perf_counter() - start
    return {
        "images": len(paths),
        "seconds": seconds,
        "images_per_second": len(paths) / seconds,
        "detections": detections,
    }


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--torch-count", type=int, help="photos for torchvision, 0 for none; default: all")
    parser.add_argument("--batch", type=int, default=1, help="flaxdet's batch size")
    parser.add_argument("--min-size", type=int, default=800)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--json", type=Path, help="default: benchmarks/stream.json")
    options = parser.parse_args()

    share_gpu()
    machine = describe_machine()
    print(f"{options.count} photos of {options.count} sizes, shorter side {options.min_size}, {options.dtype}\n")
    counter = CompileCounter()
    results: dict[str, Any] = {key: getattr(options, key) for key in ("count", "batch", "min_size", "dtype")}
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.safetensors"
        paths = write_photos(Path(folder), options.count)
        for name in options.model:
            lively_weights(name, weights)
            results[name] = {"flaxdet": ours(weights, paths, counter, options)}
            torch_paths = paths[: options.torch_count]
            if torch_paths:
                results[name]["torchvision eager"] = theirs(name, weights, torch_paths, options)
            for contender, row in results[name].items():
                rate, images = row["images_per_second"], row["images"]
                print(f"  {name} {contender:<20}{rate:8.3f} images/s, {images} images, {row['detections']} detections")
            row = results[name]["flaxdet"]
            new = {kind: row["compiled_after"][kind] - before for kind, before in row["compiled_before"].items()}
            print(
                f"  warmup {row['warmup_seconds']:.1f} s: {row['compiled_before']['model']} programs of the model for "
                f"{len(row['buckets'])} buckets; compiled while streaming: {new['model']} of the model, "
                f"{new['programs']} of the predictor, {new['xla']} by XLA in all\n",
                flush=True,
            )
            write(options.json or json_path("stream", options.dtype), machine, results)


if __name__ == "__main__":
    main()
