"""The notebooks run from top to bottom, what they assert included, and the committed ones came of these sources."""

from __future__ import annotations

import base64
import importlib.util
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

jupytext: Any = pytest.importorskip("jupytext", reason="needs jupytext: pip install '.[test]'")
nbformat: Any = pytest.importorskip("nbformat", reason="needs nbformat: pip install '.[test]'")

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "build")
NEEDS = {
    "conversion": ("torch", "torchvision"),
    "detection": (),
    "fine_tuning": ("pycocotools", "torch", "torchvision"),
}
SECONDS = 480  # for one; alone on two cores it takes about one
MOST_BYTES = 700_000
NOISE = {
    "an absolute path": re.compile(r"""(?:^|[\s'"(=:,])(?:/[\w.@+-]+){2,}|[A-Za-z]:\\\w""", re.MULTILINE),
    "an address": re.compile(r"0x[0-9a-f]{6,}"),
    "a warning": re.compile("Warning"),
    "a progress bar": re.compile(r"\r|\d%\|"),
}


def read(path: Path) -> Any:
    notebook: Any = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def pictures(notebook: Any) -> list[np.ndarray]:
    """All of them, decoded."""
    data = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    encoded = [text for row in data for kind, text in row.items() if kind.startswith("image/")]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")) for text in encoded]


def faults(notebook: Any) -> list[str]:
    """What is wrong with a notebook that has been run."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    found = []
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("was not run from top to bottom")
    if any(output.output_type == "error" for output in outputs):
        found.append("shows a traceback")
    if any(output.get("name") == "stderr" for output in outputs):
        found.append("shows stderr")
    texts = [output.get("text", "") for output in outputs]
    texts += [
        text for output in outputs for kind, text in output.get("data", {}).items() if not kind.startswith("image/")
    ]
    found += [f"shows {what}" for what, sign in NOISE.items() if any(sign.search(text) for text in texts)]
    shown = pictures(notebook)
    if not shown:
        found.append("has no picture")
    if any(picture.std() < 1 for picture in shown):
        found.append("has an empty picture")
    return found


def cells(notebook: Any) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_every_notebook_is_known():
    assert list(NEEDS) == NAMES == sorted(path.stem for path in FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("name", NAMES)
def test_is_what_comes_of_its_source(name):
    path = FOLDER / f"{name}.ipynb"
    notebook = read(path)
    assert cells(notebook) == cells(jupytext.read(FOLDER / f"{name}.py", fmt="py:percent")), (
        "differs from its source: python notebooks/build.py"
    )
    assert faults(notebook) == []
    assert path.stat().st_size < MOST_BYTES


@pytest.mark.slow
@pytest.mark.ci  # whole ResNet-50s, a minute or two of each core
@pytest.mark.parametrize("name", NAMES)
def test_runs(name, tmp_path):
    needed = ("ipykernel", "nbclient", "matplotlib", *NEEDS[name])
    if missing := [package for package in needed if importlib.util.find_spec(package) is None]:
        pytest.skip(f"needs {', '.join(missing)}: pip install '.[torch,train,dev]'")
    command = [sys.executable, str(FOLDER / "build.py"), "--out", str(tmp_path), name]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    assert result.returncode == 0, result.stderr
    assert faults(read(tmp_path / f"{name}.ipynb")) == []


# The check itself


def example() -> Any:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(buffer, "PNG")
    picture = {"image/png": base64.b64encode(buffer.getvalue()).decode(), "text/plain": "<Figure size 640x480>"}
    outputs = [
        nbformat.v4.new_output("stream", text="3/4 of params/head at 1e-3, 50%\n"),
        nbformat.v4.new_output("display_data", data=picture),
    ]
    return nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell("# Title"),
            nbformat.v4.new_code_cell("1", execution_count=1),
            nbformat.v4.new_code_cell("2", execution_count=2, outputs=outputs),
        ]
    )


def test_a_good_one_passes():
    assert faults(example()) == []


@pytest.mark.parametrize(
    ("output", "fault"),
    [
        (nbformat.v4.new_output("error", ename="ValueError", evalue="", traceback=["line"]), "shows a traceback"),
        (nbformat.v4.new_output("stream", name="stderr", text="E1121"), "shows stderr"),
        (nbformat.v4.new_output("stream", text="saved to /home/me/x.png\n"), "shows an absolute path"),
        (nbformat.v4.new_output("stream", text=r"C:\Users"), "shows an absolute path"),
        (nbformat.v4.new_output("display_data", data={"text/plain": "<Axes at 0x7f3a55d0>"}), "shows an address"),
        (nbformat.v4.new_output("stream", text="FutureWarning: soon\n"), "shows a warning"),
        (nbformat.v4.new_output("stream", text=" 10%|#    | 1/10"), "shows a progress bar"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_fault_is_found(output, fault):
    notebook = example()
    notebook.cells[1].outputs.append(output)
    assert faults(notebook) == [fault]


def test_missing_pictures_and_runs_are_found():
    notebook = example()
    notebook.cells[1].execution_count = None
    del notebook.cells[2].outputs[1]
    assert faults(notebook) == ["was not run from top to bottom", "has no picture"]
