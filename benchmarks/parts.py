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
from pathlib import Path
from typing import Any

from common import describe_machine, json_path, share_gpu, write
from contenders import MODELS
from part_nms import nms_benchmark
from part_resize import resize_benchmark
from part_roi_align import roi_align_benchmark
from part_stages import stages_benchmark

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
