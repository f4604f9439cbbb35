"""What `import flaxdet` must not do. Each test is a fresh interpreter: this one has imported everything already."""

from __future__ import annotations

import json
import subprocess
import sys

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
    "tensorboardX",
    "tensorflow",
    "torch",
    "torchvision",
]


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def modules_after(statement: str) -> set[str]:
    return set(json.loads(run(f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))")))


def test_works_where_torch_is_not_installed():
    out = run(
        "import sys\n"
        "for name in ('torch', 'torchvision'): sys.modules[name] = None  # importing it now raises ImportError\n"
        "import flaxdet, flaxdet.convert, flaxdet.cli.main\n"
        "print(flaxdet.__name__)"
    )
    assert out.strip() == "flaxdet"


def test_changes_no_jax_config():
    out = run(
        "import jax\n"
        "before = dict(jax.config.values)\n"
        "import flaxdet, flaxdet.convert\n"
        "after = dict(jax.config.values)\n"
        "print({name: (before[name], after[name]) for name in before if before[name] != after[name]})"
    )
    assert out.strip() == "{}"


def test_starts_no_backend():
    """A program may still choose its platform, or call jax.distributed.initialize, after the import."""
    out = run("import flaxdet\nfrom jax._src import xla_bridge\nprint(xla_bridge.backends_are_initialized())")
    assert out.strip() == "False"


def test_takes_no_optional_import():
    new = modules_after("import flaxdet, flaxdet.convert, flaxdet.cli.main") - modules_after("import flax.linen, optax")
    taken = {name for name in new for optional in OPTIONAL if (name + ".").startswith(optional + ".")}
    assert not taken


def test_prints_nothing():
    result = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:flaxdet", "-c", "import flaxdet"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (result.stdout, result.stderr) == ("", "")
