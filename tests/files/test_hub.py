"""Folders for the Hugging Face Hub."""

from __future__ import annotations

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxdet
from flaxdet import registry
from flaxdet.convert import CheckpointError, StateDictError
from flaxdet.convert.state_dict import abstract_variables
from flaxdet.files import checkpoint, hub
from tests.drawn import drawn

pytestmark = pytest.mark.xdist_group("pretrained")
NAME = "fcos_resnet50_fpn"
CATEGORIES = ["__background__", "RBC", "```", "plaquette Ω"]
FILES = ["README.md", "config.json", "model.safetensors"]


@pytest.fixture(scope="module")
def made():
    """A model of half-size storage, and variables."""
    model = registry.make_model(NAME, num_classes=4, min_size=(96, 128), score_thresh=0.3, param_dtype=jnp.bfloat16)
    return model, drawn(abstract_variables(model))


@pytest.fixture
def folder(tmp_path, made):
    """A folder as written; its weights (65 MB) are not kept."""
    flaxdet.save_pretrained(tmp_path / "model", *made, categories=CATEGORIES)
    yield tmp_path / "model"
    (tmp_path / "model" / "model.safetensors").unlink(missing_ok=True)


@pytest.fixture
def small(monkeypatch):
    """Tensors are not written: only how files are."""
    monkeypatch.setattr(hub, "tensors_of", lambda model, variables: {"weight": np.zeros(3, np.float32)})


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_round_trip(folder, made):
    model, variables = made
    assert sorted(os.listdir(folder)) == FILES
    found_model, found = flaxdet.load_pretrained(folder, param_dtype=jnp.bfloat16)
    assert found_model == model
    jax.tree.map(np.testing.assert_array_equal, found, variables)
    assert flaxdet.load_categories(folder / "model.safetensors") == CATEGORIES
    assert flaxdet.load(folder / "model.safetensors", param_dtype=jnp.bfloat16)[0] == model  # the file alone will do
    assert flaxdet.load_pretrained(str(folder), max_size=99)[0].max_size == 99
    with pytest.raises(TypeError, match="unexpected keyword argument 'min_sise'"):
        flaxdet.load_pretrained(folder, min_sise=1)

    config = json.loads((folder / "config.json").read_text())
    assert config["flaxdet"] == flaxdet.__version__
    assert config["format"] == 1
    assert config["builder"] == NAME
    assert config["categories"] == CATEGORIES
    assert config["options"]["score_thresh"] == 0.3

    # One of the two changed: neither is believed.
    (folder / "config.json").write_text(json.dumps({**config, "options": {**config["options"], "score_thresh": 0.9}}))
    with pytest.raises(CheckpointError, match=r"config\.json: describes another model than .*\(options differ\)"):
        flaxdet.load_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**config, "format": 2, "flaxdet": "9.1"}))
    with pytest.raises(CheckpointError, match=r"config\.json: was written by flaxdet 9\.1 in format 2"):
        flaxdet.load_pretrained(folder)
    (folder / "config.json").write_text('{"architectures": ["ViT"]}')
    with pytest.raises(CheckpointError, match=r"config\.json: expected the config\.json of flaxdet\.save_pretrained"):
        flaxdet.load_pretrained(folder)
    (folder / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(CheckpointError, match=r"config\.json: expected the .*; it is a Git LFS pointer"):
        flaxdet.load_pretrained(folder)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(OSError, match=r"config\.json: cannot be read: Not a regular file"):
        flaxdet.load_pretrained(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: cannot be read"):
        flaxdet.load_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json: cannot be read.*expected a folder that"):
        flaxdet.load_pretrained(folder)


def test_the_card(tmp_path, made, small):
    """Front matter as the Hub reads it, and names that can't break out of their block."""
    flaxdet.save_pretrained(tmp_path, *made, categories=CATEGORIES)
    start, front, body = (tmp_path / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert start == ""
    lines = front.splitlines()
    assert "library_name: flaxdet" in lines
    assert "pipeline_tag: object-detection" in lines
    assert lines[lines.index("tags:") + 1] == "- object-detection"
    assert f"# {NAME}" in body
    assert "flaxdet.load_pretrained(folder)" in body
    assert "    " + json.dumps(CATEGORIES, ensure_ascii=False) in body.splitlines()
    code = body.split("```python\n")[1].split("```")[0]
    compile(code, "README.md", "exec")


def test_a_folder_that_is_there(tmp_path, made, small):
    """A clone of a repository keeps what it has, its own card included; the rest is replaced."""
    (tmp_path / ".gitattributes").write_text("*.safetensors filter=lfs")
    (tmp_path / "README.md").write_text("my own")
    (tmp_path / "config.json").write_text("old")
    flaxdet.save_pretrained(tmp_path, *made)
    assert sorted(os.listdir(tmp_path)) == [".gitattributes", *FILES]
    assert (tmp_path / "README.md").read_text() == "my own"
    assert json.loads((tmp_path / "config.json").read_text())["categories"] is None
    assert checkpoint.read_metadata(tmp_path / "model.safetensors")["flaxdet"]


@pytest.mark.parametrize("there", [True, False])
def test_whole_or_not_at_all(tmp_path, made, small, monkeypatch, there):
    folder = tmp_path / "model"
    if there:
        flaxdet.save_pretrained(folder, *made)
    before = content(folder) if there else None

    def unchanged():
        return content(folder) == before if there else not os.listdir(tmp_path)

    with pytest.raises(ValueError, match="expected 4 names, got 1"):
        flaxdet.save_pretrained(folder, *made, categories=["a"])
    assert unchanged()
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):

        def fail(*args, error=error):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.safetensors.numpy, "save", fail)
            with pytest.raises(type(error)):
                flaxdet.save_pretrained(folder, *made, categories=CATEGORIES)
        assert unchanged()
    with monkeypatch.context() as patch:
        patch.setattr(hub, "_card", fail)
        if not there:  # a card that is there is kept, and none is written
            with pytest.raises(KeyboardInterrupt):
                flaxdet.save_pretrained(folder, *made)
    assert unchanged()


def test_targets_that_cannot_be_written(tmp_path, made, small):
    with pytest.raises(OSError, match=r"nowhere/model: cannot be made: No such file"):
        flaxdet.save_pretrained(tmp_path / "nowhere" / "model", *made)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=r"file/.*: cannot be written"):
        flaxdet.save_pretrained(tmp_path / "file", *made)
    assert content(tmp_path) == {"file": b"mine"}


def test_variables_of_another_model(tmp_path, made):
    model, variables = made
    with pytest.raises(StateDictError, match="the variables do not fit FCOS"):
        flaxdet.save_pretrained(tmp_path / "model", model, {"params": variables["params"]})
    assert not os.listdir(tmp_path)
