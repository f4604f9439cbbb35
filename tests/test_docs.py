"""Every code block of README.md and docs/ as printed, in order, page by page, on small models and data.

What is replaced: the builders' ResNet-50 (by ``tests.tiny.small_model``; README's first block also runs on the real
one), published weights (random ones, nothing is downloaded), the default size of images (64 pixels), and the number of
training steps. What is given: the files that the pages name, and a few names that README.md takes for granted. A block
that can't run says so in a comment above it, ``<!-- not run: why -->``.
"""

from __future__ import annotations

import functools
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from PIL import Image

import flaxdet
from flaxdet import registry
from flaxdet.cli.main import COMMANDS, _parse, main
from flaxdet.convert.state_dict import abstract_variables
from flaxdet.data import train_batches
from flaxdet.train import fit
from tests.drawn import drawn
from tests.tiny import FCOS_NAME, V2_NAME, build_small_models, write_coco

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
SIDE = 64
SIZE = {"min_size": SIDE, "max_size": SIDE}
CLASSES = ["__background__", "cat", "dog"]
STEPS, BATCH = 2, 2
OUTSIDE_CI = {"docs/guides/conversion.md", "docs/index.md"}
RUN = {"convert", "detect", "eval", "export"}  # in seconds; train and verify have tests of their own
NOT_RUN = {("docs/guides/sharding.md", "needs several hosts")}


class Block(NamedTuple):
    page: str
    line: int
    language: str
    code: str
    not_run: str | None


def blocks(page: str) -> Iterator[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    for found in re.finditer(r"^( *)```(\w+)\n(.*?)^\1```$", text, re.DOTALL | re.MULTILINE):
        comment = re.search(r"<!-- not run: (.*?) -->\n$", text[: found.start()])
        code = "".join(line.removeprefix(found[1]) for line in found[3].splitlines(keepends=True))
        yield Block(page, text.count("\n", 0, found.start(3)), found[2], code, comment and comment[1])


def commands(block: Block) -> Iterator[list[str]]:
    """The flaxdet commands of a shell block, as lists of words."""
    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            if words[0] == "flaxdet":
                yield words[1:end]
            words = words[end + 1 :]


@functools.cache
def drawn_weights(model: Any) -> dict[str, np.ndarray]:
    """Random weights under which an FCOS finds things."""
    return flaxdet.convert.to_torchvision(model, drawn(abstract_variables(model)))


def state_dict(builder: str, num_classes: int, frozen_bn: bool) -> dict[str, np.ndarray]:
    """Weights of what the builders make at present."""
    return drawn_weights(registry.make_model(builder, num_classes=num_classes, frozen_bn=frozen_bn))


@pytest.fixture
def no_downloads(monkeypatch) -> None:
    """Random weights in place of the published ones."""
    for enum, builder in (
        (flaxdet.FCOS_ResNet50_FPN_Weights, FCOS_NAME),
        (flaxdet.FasterRCNN_ResNet50_FPN_V2_Weights, V2_NAME),
    ):
        weights = functools.partial(state_dict, builder, 91, builder == FCOS_NAME)
        monkeypatch.setattr(enum, "get_state_dict", lambda self, progress=True, weights=weights: weights())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder with the files that the pages name."""
    folder = tmp_path_factory.mktemp("prepared")
    images, annotations = write_coco(folder, count=4, size=(48, SIDE))
    content = json.loads(annotations.read_text())
    content["categories"] = [{"id": label, "name": name} for label, name in enumerate(CLASSES) if label]
    for row in content["annotations"]:
        row["category_id"] = 1 + row["category_id"] % 2
    for name in ("annotations", "train", "val", "instances_val2017"):
        (folder / f"{name}.json").write_text(json.dumps(content))
    shutil.copytree(images, folder / "val2017")
    Image.open(images / "000.png").save(folder / "photo.jpg", quality=95)
    for name in ("photos", "new-photos"):
        (folder / name).mkdir()
        shutil.copy(folder / "photo.jpg", folder / name / "a.jpg")
    with pytest.MonkeyPatch.context() as monkeypatch:
        build_small_models(monkeypatch, **SIZE)
        model = registry.make_model(FCOS_NAME, num_classes=3, frozen_bn=True)
        variables = flaxdet.convert.from_torchvision(model, drawn_weights(model))
        flaxdet.save(folder / "model.pth", model, variables)
        flaxdet.save(folder / "model.safetensors", model, variables, categories=CLASSES)
        tensors = drawn_weights(model).items()
        several = {f"{name}.{key}": value for name in ("model_ema", "teacher") for key, value in tensors}
        flaxdet.convert.write_pth(folder / "last.ckpt", several)
    (folder / "run").mkdir()
    (folder / "run" / "model.safetensors").hardlink_to(folder / "model.safetensors")
    return folder


@pytest.fixture
def quick(prepared, no_downloads, tmp_path, monkeypatch) -> Iterator[Path]:
    """The folder to run in, and everything that makes it quick."""
    folder = tmp_path / "work"
    shutil.copytree(prepared, folder, copy_function=lambda source, target: Path(target).hardlink_to(source))
    monkeypatch.chdir(folder)
    build_small_models(monkeypatch, **SIZE)
    shorter = lambda options: {**options, "steps": min(options["steps"], STEPS)}  # noqa: E731
    monkeypatch.setattr(flaxdet.train, "fit", lambda *args, **options: fit(*args, **shorter(options)))
    monkeypatch.setattr(
        flaxdet.data,
        "train_batches",
        lambda *args, **options: train_batches(*args, **{**shorter(options), "batch_size": BATCH}),
    )
    yield folder
    shutil.rmtree(folder)  # gigabytes of checkpoints otherwise, in the last three runs' folders that pytest keeps


def given() -> dict[str, Any]:
    """What README.md takes for granted."""
    return {
        "image_id": 10,
        "paths": ["photo.jpg", "images/000.png"],
        "torch_model": SimpleNamespace(state_dict=lambda: state_dict(FCOS_NAME, 3, True)),
    }


def run_python(block: Block, namespace: dict[str, Any]) -> None:
    code = "\n" * block.line + block.code  # so that a traceback names the line of the page
    exec(compile(code, str(ROOT / block.page), "exec", dont_inherit=True), namespace)


def group(page: str) -> Any:
    """README.md, the longest, runs beside the others, which share what they compile; guides run in CI alone."""
    marks = [pytest.mark.xdist_group("readme" if page == "README.md" else "docs")]
    return pytest.param(page, marks=[*marks, *([] if page in OUTSIDE_CI else [pytest.mark.ci])])


@pytest.mark.parametrize("page", [group(page) for page in PAGES if any(blocks(page))])
def test_every_block_runs(page, quick, capsys):
    for extra in ("pycocotools", "orbax", "supervision"):
        pytest.importorskip(extra)
    namespace: dict[str, Any] = {"__name__": "__docs__", **(given() if page == "README.md" else {})}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as a user has them
        for block in blocks(page):
            if block.not_run is not None:
                continue
            if block.language == "python":
                run_python(block, namespace)
            elif block.language == "sh":
                for words in commands(block):
                    if words and words[0] in RUN:
                        assert main(words) == 0, (words, capsys.readouterr().err)


@pytest.mark.release  # above it runs on a small model; parity/test_models.py has the whole ResNet-50
@pytest.mark.xdist_group("docs")
def test_the_first_block_on_the_real_model(prepared, no_downloads, monkeypatch):
    """From image to boxes: ResNet-50, 91 classes and images of 800 pixels."""
    monkeypatch.chdir(prepared)
    block = next(block for block in blocks("README.md") if block.language == "python")
    namespace: dict[str, Any] = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        run_python(block, namespace)
    assert namespace["model"] == registry.make_model(
        FCOS_NAME, num_classes=91, frozen_bn=True, trainable_backbone_layers=3
    )
    assert len(namespace["found"]["boxes"]) > 0


def test_every_command_parses():
    found = [words for page in PAGES for block in blocks(page) if block.language == "sh" for words in commands(block)]
    assert {words[0] for words in found} == set(COMMANDS)
    for words in found:
        assert not isinstance(_parse(words), int), words


def test_what_does_not_run():
    assert {(block.page, block.not_run) for page in PAGES for block in blocks(page) if block.not_run} == NOT_RUN


@pytest.mark.parametrize("package", ["flaxdet", "ops", "nn", "models", "train", "data", "convert"])
def test_the_reference_has_every_public_name(package):
    module = flaxdet if package == "flaxdet" else __import__(f"flaxdet.{package}", fromlist=["__all__"])
    text = "".join((ROOT / page).read_text() for page in PAGES if page.startswith("docs/reference/"))
    listed = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE)}
    public = {name for name in module.__all__ if name != "__version__"}
    assert public - listed - {"convert", "data", "ops", "train"} == set()
