"""Variables of models that no builder makes, in a file and back."""

from __future__ import annotations

import json
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

import flaxdet
from flaxdet.convert import CheckpointError, StateDictError
from flaxdet.convert.state_dict import abstract_variables
from flaxdet.files import checkpoint
from flaxdet.files.models import save
from flaxdet.models import FCOS
from flaxdet.ops import AnchorGenerator
from tests.drawn import drawn
from tests.models.cases import equal
from tests.tiny import FCOS_NAME, V2_NAME, tiny_model

NAMES = ["__background__", "cat", "dog", "Ω"]


class Odd(nn.Module):
    """A backbone with a scalar parameter, integers, and a collection of its own."""

    out_channels: int = 32

    @nn.compact
    def __call__(self, pixels):
        count = self.variable("counts", "steps", lambda: jnp.zeros((), jnp.int32))
        scale = self.param("scale", nn.initializers.ones, ())
        x = nn.Conv(32, (3, 3), strides=8, padding=1, name="conv.1")(pixels) * scale
        return {"map": x + count.value.astype(x.dtype)}


@pytest.fixture(scope="module")
def odd():
    """The model, and numbers for its variables."""
    anchors = AnchorGenerator(((8,),), ((1.0,),))
    model = FCOS(Odd(), 4, anchor_generator=anchors, min_size=64, max_size=96)
    rng = np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(7 if leaf.dtype == jnp.int32 else rng.standard_normal(leaf.shape), leaf.dtype)

    batch = flaxdet.ImageBatch(jnp.zeros((1, 64, 64, 3)), *[jnp.full((1, 2), 64, jnp.int32)] * 2, None)
    return model, jax.tree.map(draw, jax.eval_shape(model.init, jax.random.key(0), batch))


def test_everything_comes_back(odd, tmp_path):
    """A scalar, integers, a name with a dot, and every collection, under Flax's names."""
    model, variables = odd
    path = tmp_path / "own.safetensors"
    flaxdet.save_variables(path, model, variables, categories=NAMES)
    written = safetensors.numpy.load_file(path)
    assert {"params/backbone/scale", "params/backbone/conv.1/kernel", "counts/backbone/steps"} < set(written)
    assert written["counts/backbone/steps"].shape == ()
    assert len(written) == len(jax.tree.leaves(variables))
    found = flaxdet.load_variables(path, model)
    equal(found, variables)
    assert {type(leaf) for leaf in jax.tree.leaves(found)} == {type(jnp.zeros(()))}
    assert flaxdet.load_categories(path) == NAMES
    equal(flaxdet.load_variables(path, model.clone(min_size=320)), variables)  # the model says all else


def test_storage_is_the_models(tmp_path):
    """float32 in the file, bfloat16 in the model."""
    model = tiny_model(V2_NAME)
    variables = drawn(abstract_variables(model))
    path = tmp_path / "own.safetensors"
    flaxdet.save_variables(path, model, variables)
    small = model.clone(param_dtype=jnp.bfloat16, backbone=model.backbone.clone(param_dtype=jnp.bfloat16))
    found = traverse_util.flatten_dict(flaxdet.load_variables(path, small), sep="/")
    kernel = found["params/backbone/conv0/kernel"]
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(kernel, variables["params"]["backbone"]["conv0"]["kernel"].astype(jnp.bfloat16))


def test_files_as_the_guide_wrote_them(odd, tmp_path):
    """Without a description: flatten_dict, joined by slashes."""
    model, variables = odd
    path = tmp_path / "own.safetensors"
    flat = {"/".join(at): np.array(leaf) for at, leaf in traverse_util.flatten_dict(variables).items()}
    safetensors.numpy.save_file(flat, path)
    equal(flaxdet.load_variables(path, model), variables)


def test_what_does_not_fit(odd, tmp_path):
    model, variables = odd
    path = tmp_path / "own.safetensors"
    flat = {"/".join(at): np.array(leaf) for at, leaf in traverse_util.flatten_dict(variables).items()}
    wrong = {**flat, "counts/backbone/steps": np.float32(1), "params/backbone/scale": np.ones(1, np.float32)}
    wrong["params/more"] = wrong.pop("params/backbone/conv.1/bias")
    checkpoint.write_safetensors(path, wrong)
    with pytest.raises(StateDictError, match=f"{path} does not fit FCOS: 1 missing, 1 unexpected, 1 wrong shape") as e:
        flaxdet.load_variables(path, model)
    assert e.value.faults == {
        "missing": ["params/backbone/conv.1/bias"],
        "unexpected": ["params/more"],
        "wrong shape": ["params/backbone/scale: expected [], found [1]"],
        "wrong type": ["counts/backbone/steps: expected int32, found float32"],
    }
    flat["params/backbone/scale"] = np.float32(np.nan)
    checkpoint.write_safetensors(path, flat)
    with pytest.raises(StateDictError, match="params/backbone/scale: 1 of 1 values, as float32"):
        flaxdet.load_variables(path, model)
    assert np.isnan(flaxdet.load_variables(path, model, allow_nonfinite=True)["params"]["backbone"]["scale"])


def test_save_checks_before_it_writes(odd, tmp_path):
    model, variables = odd
    path = tmp_path / "own.safetensors"
    with pytest.raises(ValueError, match=r"own\.pth: expected a name ending in \.safetensors"):
        flaxdet.save_variables(tmp_path / "own.pth", model, variables)
    with pytest.raises(TypeError, match=r'variables should be a dict such as {"params": ...}, got list'):
        flaxdet.save_variables(path, model, [1])
    with pytest.raises(ValueError, match="expected 4 names, got 3"):
        flaxdet.save_variables(path, model, variables, categories=NAMES[:3])
    with pytest.raises(StateDictError, match=f"{path}: the variables do not fit FCOS: 1 missing"):
        flaxdet.save_variables(path, model, {"params": variables["params"]})
    assert not os.listdir(tmp_path)


def test_each_file_says_who_reads_it(odd, tmp_path):
    model, variables = odd
    path = tmp_path / "own.safetensors"
    flaxdet.save_variables(path, model, variables)
    with pytest.raises(CheckpointError, match=f"{path}: holds variables alone, for flaxdet.load_variables"):
        flaxdet.load(path)
    description = {"builder": FCOS_NAME, "options": {}, "categories": None}
    checkpoint.write_safetensors(path, {"a": np.ones(1)}, {"flaxdet": json.dumps(description)})
    with pytest.raises(CheckpointError, match=f"found {FCOS_NAME} under torchvision's names: flaxdet.load reads it"):
        flaxdet.load_variables(path, model)
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        flaxdet.load_variables(tmp_path / "none.safetensors", model)
    for name in ("m.safetensors", "m.pth"):
        with pytest.raises(ValueError, match=r"flaxdet\.save_variables stores"):
            save(tmp_path / name, model, variables)
