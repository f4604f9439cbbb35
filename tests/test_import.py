"""What `import flaxdet` must not do, each time in a fresh interpreter; and which modules may import which."""

from __future__ import annotations

import ast
import graphlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import flaxdet

# orbax comes with flax itself; torch and the rest only with their extras.
OPTIONAL = [
    "beartype",
    "cv2",
    "faster_coco_eval",
    "grain",
    "matplotlib",
    "orbax",
    "pandas",
    "pycocotools",
    "scipy.sparse",
    "skimage",
    "sklearn",
    "supervision",
    "tensorboardX",
    "tensorflow",
    "torch",
    "torchvision",
]


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


# What needs each package that comes with an extra alone, and that extra.
NEEDS = {
    "torch": ("torch", "flaxdet.convert.reference.torchvision()"),
    "torchvision": ("torch", "flaxdet.convert.reference.torchvision()"),
    "matplotlib": ("train", "flaxdet.train.pictures.draw_curves([{'step': 1, 'loss': 1.0}], folder + '/curves.png')"),
    "grain": ("train", "flaxdet.data.streams.import_grain()"),
    "orbax": ("train", "flaxdet.train.Checkpoints(folder + '/run')"),
    "pycocotools": ("train", "flaxdet.evaluate(None, None, None)"),
    "tensorboardX": ("train", "flaxdet.train.logs.TensorBoardWriter(folder + '/run')"),
    "supervision": ("bridges", "flaxdet.to_supervision({})"),
}
DISTRIBUTIONS = {"orbax": "orbax-checkpoint"}


@pytest.fixture(scope="module")
def without_any(tmp_path_factory) -> dict[str, str]:
    """For each package the message of what needs it, in one interpreter that has none of the optional packages."""
    folder = tmp_path_factory.mktemp("empty")
    missing = [name for name in OPTIONAL if "." not in name]
    code = f"""
import json, sys
for name in {missing}: sys.modules[name] = None  # importing it now raises ImportError
import flaxdet, flaxdet.convert.reference, flaxdet.cli.main, flaxdet.data.streams, flaxdet.train.pictures
import flaxdet.train.logs
said, folder = {{}}, {str(folder)!r}
for package, (_, statement) in {NEEDS}.items():
    if package == "torchvision":
        import types
        sys.modules["torch"] = types.ModuleType("torch")
    try: exec(statement)
    except ImportError as error: said[package] = str(error)
print(json.dumps(said))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert not list(folder.iterdir())
    return json.loads(result.stdout)


@pytest.mark.parametrize("package", NEEDS)
def test_works_without_and_says_what_to_install(package, without_any):
    extra, _ = NEEDS[package]
    assert f"pip install 'flaxdet[{extra}]'" in without_any[package]
    project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]
    distribution = DISTRIBUTIONS.get(package, package)
    assert any(line.startswith(distribution) for line in project["optional-dependencies"][extra])
    assert not any(line.startswith(distribution + ">") for line in project["dependencies"])


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> dict:
    """What the import changes in an interpreter that has jax, flax and optax; and what it prints."""
    told = tmp_path_factory.mktemp("fresh") / "told.json"
    code = f"""
import json, pathlib, sys
import flax.linen, jax, optax
from jax._src import xla_bridge
config, modules = dict(jax.config.values), set(sys.modules)
import flaxdet, flaxdet.convert, flaxdet.cli.main
changed = [name for name in config if config[name] != jax.config.values[name]]
told = dict(
    config=changed, modules=sorted(set(sys.modules) - modules), backends=xla_bridge.backends_are_initialized()
)
pathlib.Path({str(told)!r}).write_text(json.dumps(told))
"""
    options = ["-W", "error::DeprecationWarning:flaxdet"]
    result = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(told.read_text()) | {"printed": result.stdout + result.stderr}


def test_changes_no_jax_config(fresh):
    assert fresh["config"] == []


def test_starts_no_backend(fresh):
    """A program may still choose its platform, or call jax.distributed.initialize, after the import."""
    assert fresh["backends"] is False


def test_takes_no_optional_import(fresh):
    assert "flaxdet.cli.main" in fresh["modules"]
    taken = {name for name in fresh["modules"] for optional in OPTIONAL if (name + ".").startswith(optional + ".")}
    assert not taken


def test_prints_nothing(fresh):
    assert fresh["printed"] == ""


# From the bottom to the top. The longest name that fits a module counts; modules of one line may import each other.
LAYERS = [
    ["structures", "_version"],
    ["xla"],
    # files that know no model
    ["files.messages", "files.opening", "files.json_text", "files.schema", "files.unwrap", "files.checksums"],
    ["files.checkpoint", "files.tensor_file", "files.torch_objects", "files.torch_pickle", "files.torch_zip"],
    ["files.download", "files.https"],
    ["ops"],
    ["nn"],
    ["models"],
    ["registry"],
    ["convert"],
    ["zoo"],
    ["files", "images"],
    ["results", "data"],
    ["inference"],
    ["evaluation"],
    ["train"],
    # whole models of torchvision and ours side by side
    [
        "convert.stages",
        "convert.verify",
        "convert.reference",
        "convert.lively",
        "convert.torch_ops",
        "zoo.torch_fcos",
        "zoo.torch_faster_rcnn",
    ],
    ["__init__", "__main__", "cli"],
]
RANKS = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def modules() -> dict[str, Path]:
    root = Path(flaxdet.__file__).parent
    paths = {path.relative_to(root.parent): path for path in [*root.rglob("*.py"), *(root / "convert").glob("*.py")]}
    return {".".join(path.with_suffix("").parts).removesuffix(".__init__"): at for path, at in paths.items()}


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of flaxdet that one imports, those inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "flaxdet":
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in known}
    return found


def test_imports_go_one_way():
    def layer(name: str) -> int:
        own = name.split(".")[1:] or ["__init__"]
        return next(
            RANKS[".".join(own[:length])] for length in range(len(own), 0, -1) if ".".join(own[:length]) in RANKS
        )

    known = modules()
    assert {"flaxdet", "flaxdet.cli.main", "flaxdet.convert.verify"} <= set(known)
    graph = {name: imported(path, known) - {name} for name, path in known.items()}
    upwards = {(name, other) for name, others in graph.items() for other in others if layer(other) > layer(name)}
    assert upwards == set()
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_every_module_but_the_comparison_imports_without_torch():
    """The zoo's modules that record torchvision's stages among them: they import torch when called."""
    comparison = {f"flaxdet.convert.{name}" for name in ("stages", "verify", "lively", "torch_ops")}
    names = sorted(set(modules()) - comparison)
    run(f"import importlib, sys\nsys.modules['torch'] = None\nfor name in {names}: importlib.import_module(name)")
