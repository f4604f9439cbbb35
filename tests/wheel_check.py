"""Run by .ci/run in a clean environment that holds the built wheel and no torch, outside the checkout.

    python wheel_check.py

Builds a small detector, writes it as torchvision's file and as our own, reads both back, and detects; exports it and
runs that. Runs the demonstration too. So it finds a dependency that only an extra brings, and a file that was left out.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import numpy as np

import flaxdet
import flaxdet.convert


def check_installation() -> None:
    """The package comes from the wheel, the converter with it, and there is no torch."""
    site = Path(sysconfig.get_path("purelib"))
    for module in (flaxdet, flaxdet.convert):
        assert module.__file__ is not None
        assert site in Path(module.__file__).parents, f"{module.__name__} is not the wheel's: {module.__file__}"
    assert (site / "flaxdet" / "py.typed").is_file()
    assert importlib.metadata.version("flaxdet") == flaxdet.__version__
    assert not (site / "flaxdet" / "convert").is_symlink()
    assert importlib.util.find_spec("convert") is None, "the wheel installs a top-level package convert"
    assert importlib.util.find_spec("torch") is None, "this environment was to have no torch"


def check_models(folder: Path) -> None:
    """A model goes through both kinds of file unchanged and detects, and so does its export."""
    model, variables = flaxdet.fcos_resnet50_fpn(
        num_classes=4, weights_backbone=None, min_size=64, max_size=96, score_thresh=0.01
    )
    state_dict = flaxdet.convert.to_torchvision(model, variables)
    flaxdet.convert.write_pth(folder / "theirs.pth", state_dict)
    flaxdet.save(folder / "ours.safetensors", model, variables, categories=["background", "a", "b", "c"])
    assert flaxdet.load_categories(folder / "ours.safetensors") == ["background", "a", "b", "c"]

    image = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    (expected,) = flaxdet.predict(model, variables, [image])
    assert len(expected["boxes"]) > 0
    options = {"min_size": 64, "max_size": 96, "score_thresh": 0.01}
    for file, overrides in (("theirs.pth", options), ("ours.safetensors", {})):
        again, restored = flaxdet.load(folder / file, **overrides)
        assert jax.tree.structure(variables) == jax.tree.structure(restored)
        jax.tree.map(np.testing.assert_array_equal, variables, restored)
        (found,) = flaxdet.predict(again, restored, [image])
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name])

    flaxdet.export(folder / "exported", model, variables, buckets=[(96, 96)], raw_size=96, platforms=["cpu"])
    (found,) = flaxdet.load_exported(folder / "exported")([image])
    assert found["boxes"].shape[1] == 4
    assert len(found["boxes"]) > 0


def check_command() -> None:
    """The command is installed and explains itself."""
    command = Path(sysconfig.get_path("scripts")) / "flaxdet"
    result = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
    assert "detect" in result.stdout


def check_demo(folder: Path) -> None:
    """README's first command finds blood cells in under a minute, and their licence is installed with them."""
    start = time.perf_counter()
    command = [Path(sysconfig.get_path("scripts")) / "flaxdet", "detect", "--demo"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - start
    assert seconds < 60, f"flaxdet detect --demo took {seconds:.0f} s"
    content = json.loads((folder / "detections" / "detections.json").read_text())
    for record in content["images"]:
        assert (folder / record["picture"]).is_file()
        assert record["picture"] in result.stdout
        assert {row["category"] for row in record["detections"]} >= {"RBC", "WBC"}
    assert len(content["images"]) == 2
    metadata = importlib.metadata.metadata("flaxdet")
    assert metadata["License-Expression"] == "BSD-3-Clause AND MIT"
    installed = {path.name for path in importlib.metadata.files("flaxdet") or ()}
    assert {"LICENSE", "BCCD-MIT.txt"} <= installed


if __name__ == "__main__":
    check_installation()
    with TemporaryDirectory() as folder:
        check_models(Path(folder))
        check_demo(Path(folder))
    check_command()
    assert "torch" not in sys.modules
    print(f"flaxdet {flaxdet.__file__} works without torch")
