"""Every way to detect computes with BatchNorm folded, once for given variables."""

from __future__ import annotations

import functools
import gc
import operator
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxdet
from flaxdet.convert.state_dict import abstract_variables
from flaxdet.data.coco import read_coco
from flaxdet.evaluation.evaluate import detect_dataset
from flaxdet.images.transform import transform
from flaxdet.inference import folded as module
from flaxdet.inference.detect import jitted_detect, unpad
from flaxdet.inference.folded import folded
from flaxdet.xla.routes import routes_for
from tests.drawn import drawn
from tests.tiny import FCOS_NAME, small_model, tiny_model, tiny_variables, write_coco
from tests.tolerances import BOXES_F32, NET_F32

pytestmark = pytest.mark.xdist_group("folded")


@pytest.fixture(scope="module")
def resnet():
    model = small_model(FCOS_NAME, num_classes=4, min_size=64, max_size=96, score_thresh=0.01)
    return model, drawn(abstract_variables(model))


def copied(variables):
    """Equal variables in new arrays, for which nothing is folded yet."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf, may_alias=False), variables)


def test_predict_and_evaluation_fold(resnet, tmp_path):
    """By the bits: the answers of the folded model, which are not those of the model as given."""
    model, variables = resnet
    dataset = read_coco(*write_coco(tmp_path, count=1))
    image = dataset.read_image(0)
    batch = transform([image], model.transform)
    (expected,) = unpad(jitted_detect(*flaxdet.fold_batch_norm(model, variables), batch))
    (given,) = unpad(jitted_detect(model, variables, batch))
    assert len(expected["scores"]) > 3
    assert not np.array_equal(expected["scores"], given["scores"])
    np.testing.assert_allclose(expected["scores"], given["scores"], rtol=0, atol=NET_F32)
    (predicted,), (evaluated,) = flaxdet.predict(model, variables, [image]), detect_dataset(model, variables, dataset)
    for found in (predicted, evaluated):
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_kept_as_long_as_the_variables_live(resnet):
    model, variables = resnet[0], copied(resnet[1])

    def moved(leaf):
        return jax.device_put(np.asarray(leaf) + 1)

    before = len(module._cache)
    first = folded(model, variables)
    assert first[0] != model
    assert folded(model.clone(), {**variables})[1] is first[1]  # an equal model, the same arrays
    params = {**variables["params"], "backbone": jax.tree.map(moved, variables["params"]["backbone"])}
    other = folded(model, {**variables, "params": params})[1]
    assert other is not first[1]
    assert len(module._cache) == before + 2
    del variables, params, first, other
    gc.collect()
    assert len(module._cache) == before


def test_arrays_that_may_change_are_not_kept(resnet):
    model, variables = resnet[0], jax.tree.map(np.array, resnet[1])
    before = len(module._cache)
    _, first = folded(model, variables)
    variables["batch_stats"]["backbone"]["body"]["bn1"]["var"] *= 4
    _, second = folded(model, variables)
    body, other = (tree["params"]["backbone"]["body"]["conv1"]["kernel"] for tree in (first, second))
    np.testing.assert_allclose(body, 2 * other, rtol=1e-4)
    assert len(module._cache) == before


def test_what_has_nothing_to_fold_runs_as_it_is(resnet):
    tiny = tiny_model(FCOS_NAME)
    for model, variables in ((tiny, tiny_variables(tiny)), flaxdet.fold_batch_norm(*resnet)):
        before = len(module._cache)
        found = folded(model, variables)
        assert found[0] is model
        assert found[1] is variables
        assert len(module._cache) == before


def test_weights_lie_in_the_dtype_of_the_computation(resnet):
    """Kernels and biases beside kernels, of flaxdet's parts; norms stay in float32, float64 models as they are."""
    model = resnet[0].clone(dtype=jnp.bfloat16)
    prepared = folded(model, resnet[1])[1]
    dtypes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(prepared["params"]):
        names = [entry.key for entry in path]
        layer = functools.reduce(operator.getitem, names[:-1], prepared["params"])
        dtypes.setdefault("kernel" in layer, set()).add(leaf.dtype)
    assert dtypes == {True: {np.dtype(jnp.bfloat16)}, False: {np.dtype("float32")}}  # False: GroupNorm, levels' scales
    for other in (resnet[0], resnet[0].clone(dtype=jnp.float16, param_dtype=jnp.float16)):
        assert {leaf.dtype for leaf in jax.tree.leaves(folded(other, resnet[1])[1])} <= {
            np.dtype("float32"),
            np.dtype(other.dtype),
        }


def test_on_gpus_kernels_lie_as_cudnn_reads_them(resnet):
    """Output channels slowest in memory; the numbers and the detections are the same, and a program takes the order."""
    model, variables = resnet[0], copied(resnet[1])
    _, plain = folded(*resnet)
    with routes_for("gpu"):
        model, prepared = folded(model, variables)
        assert folded(model, prepared)[1] is prepared
    orders = {(leaf.ndim, leaf.format.layout.major_to_minor) for leaf in jax.tree.leaves(prepared)}
    assert orders == {(1, (0,)), (4, (3, 0, 1, 2))}
    jax.tree.map(np.testing.assert_array_equal, plain, prepared)
    photo = np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8)
    found, expected = (
        unpad(jitted_detect(model, given, transform([photo], model.transform))) for given in (prepared, plain)
    )
    assert len(expected[0]["scores"]) > 3
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=BOXES_F32), found, expected)
    program = jax.jit(lambda given: given["params"]["backbone"]["body"]["conv1"]["kernel"] + 1).lower(prepared)
    assert "{2,1,0,3}" in program.as_text()


def test_a_part_of_another_library_keeps_its_dtype():
    tiny = tiny_model(FCOS_NAME, dtype=jnp.bfloat16)
    variables = tiny_variables(tiny)
    model, prepared = folded(tiny, variables)
    assert model is tiny
    dtypes = {
        part: {leaf.dtype for leaf in jax.tree.leaves(prepared["params"][part]) if leaf.ndim > 1}
        for part in ("backbone", "head")
    }
    assert dtypes == {"backbone": {np.dtype("float32")}, "head": {np.dtype(jnp.bfloat16)}}
    batch = transform([np.zeros((64, 80, 3), np.uint8)], tiny.transform)
    jax.tree.map(
        np.testing.assert_array_equal,
        jitted_detect(tiny, prepared, batch),
        jitted_detect(tiny, variables, batch),
    )


@pytest.mark.ci  # a process of several devices; the tests above fold on one device
def test_on_the_devices_of_the_variables():
    """Replicated over two devices they stay so; divided over them they are not folded."""
    code = f"""
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from flaxdet.convert.state_dict import abstract_variables
from flaxdet.inference.folded import folded
from flaxdet.train import make_mesh, replicate
from tests.drawn import drawn
from tests.tiny import small_model
model, mesh = small_model("{FCOS_NAME}", num_classes=4), make_mesh()
variables = replicate(drawn(abstract_variables(model)), mesh)
made, fewer = folded(model, variables)
assert made != model
assert {{len(leaf.sharding.device_set) for leaf in jax.tree.leaves(fewer)}} == {{2}}
last = jax.devices()[1]
_, fewer = folded(model, jax.device_put(variables, last))
assert {{device for leaf in jax.tree.leaves(fewer) for device in leaf.devices()}} == {{last}}
kernel = variables["params"]["backbone"]["body"]["conv1"]["kernel"]
divided = jax.device_put(kernel, NamedSharding(mesh, PartitionSpec(None, None, None, "data")))
variables["params"]["backbone"]["body"]["conv1"]["kernel"] = divided
assert folded(model, variables) == (model, variables)
kept = jax.tree.map(jax.device_put, drawn(abstract_variables(model)))  # alive until the interpreter ends
folded(model, kept)
"""
    flags = "--xla_force_host_platform_device_count=2"
    environment = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": "."}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
