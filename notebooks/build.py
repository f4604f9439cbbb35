"""Runs the notebooks and writes them with their outputs.

    python notebooks/build.py [NAME ...]

The sources are ``notebooks/NAME.py`` (jupytext's percent format: plain Python, whose changes can be read); the
``NAME.ipynb`` beside them are what comes of running those, and are not edited by hand. The tests run every source too,
and compare the cells of the two (``tests/test_notebooks.py``).

Needs the extras ``dev``, ``train`` and ``torch``.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.py") if path != Path(__file__).resolve()))
_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


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


def execute(name: str, *, timeout: int = 600) -> Any:
    """Runs a notebook in a folder of its own, which is gone afterwards.

    Args:
        name: one of ``NAMES``.
        timeout: seconds that a cell may take.

    Returns:
        The notebook with outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: with the traceback, if a cell raises.
    """
    notebook = source(name)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=timeout,
            startup_timeout=timeout,
            kernel_name="python3",
            record_timing=False,
            resources={"metadata": {"path": folder}},
        )
        # nothing of this machine's own settings: no profile, and pictures whatever backend the caller has
        own = {"IPYTHONDIR": folder, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
        client.execute(env={**os.environ, **own})
    return notebook


def texts(notebook: Any) -> list[str]:
    """Every text that the outputs show.

    Args:
        notebook: with outputs.

    Returns:
        The text of each stream, result and traceback, pictures left out.
    """
    shown: list[str] = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            shown += [output.get("text", ""), *output.get("traceback", [])]
            shown += [text for kind, text in output.get("data", {}).items() if kind.startswith("text/")]
    return shown


def main(names: list[str]) -> int:
    """Builds the named notebooks, or all."""
    for name in names or NAMES:
        start = time.perf_counter()
        notebook = execute(name)
        nbformat.write(notebook, path := FOLDER / f"{name}.ipynb")
        print(f"{path.name}: {time.perf_counter() - start:.0f} s, {path.stat().st_size / 1024:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
