"""Wheel, sdist and editable installation hold flaxdet.convert, whatever git made of the symlink flaxdet/convert.

Wheel and sdist hold the demonstration and its licence.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("flaxdet", "convert", "pyproject.toml", "README.md", "LICENSE", "LICENSES")
DEMO = {"blood_cells.safetensors", "BloodImage_00222.jpg", "BloodImage_00396.jpg"}
LICENCES = ("LICENSE", "LICENSES/BCCD-MIT.txt")  # the second is of the data set that the demonstration came of
MOST_BYTES = 2_000_000  # of the demonstration's weights

# as a checkout has it with symlinks, on Windows without them, and in a zip that left it out
LINKS = ("link", "text file", "nothing")


@pytest.fixture(params=LINKS)
def checkout(request, tmp_path) -> Path:
    """What an installation reads of a checkout."""
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, tmp_path / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tmp_path / part)
    link = tmp_path / "flaxdet" / "convert"
    link.unlink()
    if request.param == "link":
        link.symlink_to(Path("..") / "convert")
    elif request.param == "text file":
        link.write_text("../convert")
    return tmp_path


def build(folder: Path, hook: str) -> Path:
    """Runs a hook of setuptools (PEP 517, PEP 660) in a checkout, as pip does, without pip's environment."""
    code = f"import setuptools.build_meta as backend; print(backend.{hook}({str(folder / 'dist')!r}))"
    (folder / "dist").mkdir(exist_ok=True)
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return folder / "dist" / result.stdout.splitlines()[-1]


def modules_of(names: list[str]) -> set[str]:
    return {name for name in names if name.startswith("flaxdet/") and name.endswith(".py")}


def expected() -> set[str]:
    own = {f"flaxdet/{path.relative_to(ROOT / 'flaxdet')}" for path in (ROOT / "flaxdet").rglob("*.py")}
    return own | {f"flaxdet/convert/{path.name}" for path in (ROOT / "convert").glob("*.py")}


def check_demo_and_licences(wheel: zipfile.ZipFile) -> None:
    """A wheel holds the demonstration's files as they are in the checkout, and says and holds both licences."""
    names = wheel.namelist()
    demo = ROOT / "flaxdet" / "zoo" / "demo"
    assert {name.rpartition("/")[2] for name in names if name.startswith("flaxdet/zoo/demo/")} == DEMO
    for name in DEMO:
        assert wheel.read(f"flaxdet/zoo/demo/{name}") == (demo / name).read_bytes()
    (info,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
    metadata = wheel.read(f"{info}/METADATA").decode().splitlines()
    assert "License-Expression: BSD-3-Clause AND MIT" in metadata
    assert [line for line in metadata if line.startswith("License-File: ")] == [f"License-File: {p}" for p in LICENCES]
    for path in LICENCES:
        assert wheel.read(f"{info}/licenses/{path}") == (ROOT / path).read_bytes()


def test_the_demonstration_is_small_and_its_licence_names_its_owner():
    assert (ROOT / "flaxdet" / "zoo" / "demo" / "blood_cells.safetensors").stat().st_size < MOST_BYTES
    notice = (ROOT / LICENCES[1]).read_text()
    for part in ("BCCD", "flaxdet/zoo/demo", "MIT License", "Copyright (c) 2017 shenggan", "above copyright notice"):
        assert part in notice


def test_wheel_and_sdist_hold_every_module(checkout):
    with zipfile.ZipFile(build(checkout, "build_wheel")) as wheel:
        assert modules_of(wheel.namelist()) == expected()
        check_demo_and_licences(wheel)
    sdist = build(checkout, "build_sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(checkout / "unpacked", filter="data")
    (unpacked,) = (checkout / "unpacked").iterdir()
    for path in (*LICENCES, *(f"flaxdet/zoo/demo/{name}" for name in DEMO)):
        assert (unpacked / path).read_bytes() == (ROOT / path).read_bytes()
    with zipfile.ZipFile(build(unpacked, "build_wheel")) as wheel:
        assert modules_of(wheel.namelist()) == expected()
        check_demo_and_licences(wheel)


def test_editable_installation_imports_the_converter(checkout, tmp_path):
    with zipfile.ZipFile(build(checkout, "build_editable")) as wheel:
        wheel.extractall(tmp_path / "site")
    # without site, which would find the installation that runs this test; its other packages by their plain path
    code = (
        "import site, sys; site.addsitedir(sys.argv[1]); sys.path.append(sys.argv[2]); "
        "import flaxdet.convert.rules; print(flaxdet.__file__, flaxdet.convert.__file__)"
    )
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(tmp_path / "site"), sysconfig.get_path("purelib")],
        cwd=tmp_path / "site",
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert all(Path(path).is_relative_to(checkout) for path in result.stdout.split())


def test_every_folder_is_a_package_that_is_installed():
    """pyproject.toml names the packages, so that an installation does not depend on the symlink."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "flaxdet").rglob("__init__.py")}
    assert set(listed) == {".".join(folder.parts) for folder in folders} | {"flaxdet.convert"}
    assert listed == sorted(listed)
