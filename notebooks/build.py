"""Runs the notebooks and writes them with their outputs.

    python notebooks/build.py [NAME ...]

The sources are ``notebooks/NAME.py`` (jupytext's percent format: plain Python, whose changes can be read); the
``NAME.ipynb`` beside them are what comes of running those, and are not edited by hand. The tests run every source
too, and compare the cells of the two (``tests/test_notebooks.py``).

Needs the extras ``dev``, ``train`` and ``torch``.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).resolve().parent
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "build"))
_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
_CELL_SECONDS = 300


def source(name: str) -> Any:
    """The notebook of a source, without outputs.

    Args:
        name: one of ``NAMES``.

    Returns:
        An nbformat notebook whose metadata and cells' ids are the same each time.
    """
    notebook: Any = jupytext.read(FOLDER / f"{name}.py", fmt="py:percent")
    notebook.metadata = nbformat.from_dict(_METADATA)
    for i, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{i}", nbformat.from_dict({})
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def execute(name: str) -> Any:
    """Runs a notebook in a folder of its own, which is gone afterwards.

    Args:
        name: one of ``NAMES``.

    Returns:
        The notebook with outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: with the traceback, if a cell raises.
        nbclient.exceptions.CellTimeoutError: if a cell takes more than five minutes.
    """
    notebook = source(name)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=_CELL_SECONDS,
            startup_timeout=_CELL_SECONDS,
            kernel_name="python3",
            record_timing=False,
            resources={"metadata": {"path": folder}},
        )
        own = {
            "IPYTHONDIR": folder,  # no profile of the user's
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(FOLDER.parent), os.environ.get("PYTHONPATH")))),
            "TF_CPP_MIN_LOG_LEVEL": "3",  # XLA says on stderr how long it took to compile on a busy machine
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        }
        client.execute(env={**os.environ, **own})
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            _encode_picture(output.get("data", {}))
    return notebook


def _encode_picture(data: dict[str, str]) -> None:
    """Keeps one copy of a picture: 256 colours as PNG, or JPEG where that is smaller, as it is for photos."""
    if "image/png" not in data:
        return
    data.pop("image/jpeg", None)  # Pillow offers both
    picture = Image.open(io.BytesIO(base64.b64decode(data.pop("image/png")))).convert("RGBA")
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    png, jpeg = io.BytesIO(), io.BytesIO()
    picture.quantize(256, dither=Image.Dither.NONE).save(png, "PNG", optimize=True)
    picture.save(jpeg, "JPEG", quality=88, subsampling=0, optimize=True)
    kind, best = min((("image/png", png), ("image/jpeg", jpeg)), key=lambda pair: pair[1].tell())
    data[kind] = base64.b64encode(best.getvalue()).decode()


def main() -> int:
    """Builds the named notebooks, or all."""
    parser = argparse.ArgumentParser(description="Runs the notebooks and writes them with their outputs.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(NAMES)}")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to (default: beside the sources)")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.names) - set(NAMES)):
        parser.error(f"no notebook is called {', '.join(unknown)}; there are {', '.join(NAMES)}")
    for name in arguments.names or NAMES:
        start = time.perf_counter()
        notebook = execute(name)
        path = arguments.out / f"{name}.ipynb"
        nbformat.write(notebook, path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s, {path.stat().st_size / 1024:.0f} kB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
