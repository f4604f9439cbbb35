"""BatchNorm, FrozenBatchNorm and GroupNorm against torch's, and their masks against a crop."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdet.nn import BatchNorm, FrozenBatchNorm, GroupNorm
from flaxdet.nn.canvas import inside
from flaxdet.xla.routes import routes_for
from tests.tolerances import HAND_EPS_F32, HAND_F32, LARGE_MEAN_F32, LAYERS_F32, NET_F32, NORM_F32, OP_F64

BARS = {"float32": NORM_F32, "float64": OP_F64}
SHAPE = (3, 7, 5, 8)


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(True) if request.param == "float64" else contextlib.nullcontext():
        yield request.param


@pytest.fixture(params=["cpu", "gpu"])
def route(request):
    """Statistics in two passes over a map, and in one."""
    with routes_for(request.param):
        yield


def initialised(norm, x):
    """Initial variables of the module, from one program: without jit, each operation would be compiled alone."""
    return jax.jit(norm.init)(jax.random.key(0), x)


def applied(norm, variables, x, mask=None, *, train: bool):
    """(values, new statistics) of the module, from one program."""
    run = jax.jit(partial(norm.apply, train=train, mutable=["batch_stats"]))
    return run(variables, x, mask=mask)


def random(seed: int, shape=SHAPE, dtype="float32", mean=0.0, std=1.0):
    return np.random.default_rng(seed).normal(mean, std, shape).astype(dtype)


def vectors(dtype: str, channels: int = SHAPE[-1]) -> dict[str, np.ndarray]:
    values = {name: random(i + 10, (channels,), dtype) for i, name in enumerate(("scale", "bias", "mean"))}
    return {**values, "var": np.abs(random(13, (channels,), dtype)) + np.asarray(0.1, dtype)}


def live(values: dict[str, np.ndarray]) -> dict:
    return {
        "params": {name: values[name] for name in ("scale", "bias")},
        "batch_stats": {name: values[name] for name in ("mean", "var")},
    }


def torch_batch_norm(torch, values, dtype, momentum=0.1, eps=1e-5):
    norm = torch.nn.BatchNorm2d(len(values["scale"]), momentum=momentum, eps=eps).to(getattr(torch, dtype))
    names = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    norm.load_state_dict({key: torch.tensor(values[name]) for key, name in names.items()}, strict=False)
    return norm


def nchw(torch, x):
    return torch.tensor(np.asarray(x).transpose(0, 3, 1, 2).copy())


def nhwc(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


def close(found, expected, dtype):
    assert np.asarray(found).dtype == np.dtype(dtype)
    np.testing.assert_allclose(found, expected, rtol=BARS[dtype], atol=BARS[dtype])


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize(("momentum", "eps"), [(0.1, 1e-5), (0.4, 1e-2)])
@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_is_torchs(torch, dtype, train, momentum, eps):
    values = vectors(dtype)
    x = random(0, dtype=dtype, mean=3.0, std=2.0)
    theirs = torch_batch_norm(torch, values, dtype, momentum, eps).train(train)
    expected = theirs(nchw(torch, x))
    ours = BatchNorm(eps=eps, momentum=momentum, dtype=dtype)
    apply = jax.jit(lambda v, x: ours.apply(v, x, train=train, mutable=["batch_stats"]))
    found, state = apply(live(values), x)
    close(found, nhwc(expected), dtype)
    close(state["batch_stats"]["mean"], theirs.running_mean, dtype)
    close(state["batch_stats"]["var"], theirs.running_var, dtype)
    moved = not np.allclose(values["var"], state["batch_stats"]["var"])
    assert moved == train


def test_running_variance_is_unbiased():
    """Two values, 1 and 3: biased variance 1, unbiased 2, and momentum .1 from the initial 1."""
    norm = BatchNorm()
    x = jnp.asarray([1.0, 3.0])[:, None]
    variables = initialised(norm, x)
    y, state = applied(norm, variables, x, train=True)
    np.testing.assert_allclose(y[:, 0], [-1, 1], rtol=HAND_EPS_F32)
    np.testing.assert_allclose(state["batch_stats"]["mean"], [0.2], rtol=HAND_F32)
    np.testing.assert_allclose(state["batch_stats"]["var"], [0.9 + 0.2], rtol=HAND_F32)


def masked_case(dtype):
    extent = np.asarray([[4, 3], [4, 3], [4, 3]], np.int32)
    x = random(1, dtype=dtype, mean=1.0)
    x[:, 4:] = x[:, :, 3:] = np.asarray(1e4, dtype)  # what lies beyond would show
    return x, extent, x[:, :4, :3]


@pytest.mark.usefixtures("route")
def test_masked_batch_norm_is_the_crops(dtype):
    values = vectors(dtype)
    x, extent, cropped = masked_case(dtype)
    norm = BatchNorm(dtype=dtype)

    @jax.jit
    def run(x, extent=None):
        bound = norm.bind(live(values), mutable=["batch_stats"])
        y = bound(x, train=True, mask=None if extent is None else inside(extent, x.shape[1:3]))
        return y, bound.variables["batch_stats"]

    expected, expected_state = run(cropped)
    found, state = run(x, jnp.asarray(extent))
    close(found[:, :4, :3], expected, dtype)
    for name in ("mean", "var"):
        close(state[name], expected_state[name], dtype)


@pytest.mark.usefixtures("route")
def test_unequal_extents_weigh_cells_and_not_images(dtype):
    x = random(2, (2, 4, 4, 3), dtype)
    mask = np.zeros((2, 4, 4), bool)
    mask[0, :1, :2] = mask[1, :3, :4] = True
    cells = x[mask]
    norm = BatchNorm(dtype=dtype)
    variables = initialised(norm, x)
    _, state = applied(norm, variables, x, mask, train=True)
    close(state["batch_stats"]["mean"], 0.1 * cells.mean(0), dtype)
    close(state["batch_stats"]["var"], 0.9 + 0.1 * cells.var(0, ddof=1), dtype)


@pytest.mark.usefixtures("route")
def test_an_empty_mask_moves_nothing():
    """A batch whose proposals are all padding: nothing to normalise with, but no NaN, and statistics stay."""
    x = random(3)
    norm = BatchNorm()
    variables = initialised(norm, x)
    y, state = applied(norm, variables, x, np.zeros(SHAPE[:3], bool), train=True)
    assert np.isfinite(y).all()
    jax.tree.map(np.testing.assert_array_equal, state["batch_stats"], variables["batch_stats"])


def test_one_value_a_channel_raises_as_torch(torch):
    x = np.ones((1, 1, 1, 4), np.float32)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        torch.nn.BatchNorm2d(4).train()(nchw(torch, x))
    norm = BatchNorm()
    variables = initialised(norm, x)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        norm.apply(variables, x, train=True, mutable=["batch_stats"])
    norm.apply(variables, x)  # evaluation doesn't mind


def test_state_is_written_only_in_training_and_where_mutable():
    x = random(4, mean=5.0)
    norm = BatchNorm()
    variables = jax.jit(partial(norm.init, train=True))(jax.random.key(0), x)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0)  # init leaves torch's initial state
    np.testing.assert_array_equal(variables["batch_stats"]["var"], 1)
    _, state = applied(norm, variables, x, train=False)
    jax.tree.map(np.testing.assert_array_equal, state["batch_stats"], variables["batch_stats"])
    alone = jax.jit(partial(norm.apply, train=True))(
        variables, x
    )  # the batch's statistics, without a place to keep them
    np.testing.assert_allclose(np.mean(alone, (0, 1, 2)), 0, atol=LAYERS_F32)


@pytest.mark.usefixtures("route")
def test_gradient_is_torchs(torch, dtype):
    values = vectors(dtype)
    x, weight = random(5, dtype=dtype), random(6, dtype=dtype)
    theirs = torch_batch_norm(torch, values, dtype).train()
    there = nchw(torch, x).requires_grad_()
    (theirs(there) * nchw(torch, weight)).sum().backward()
    norm = BatchNorm(dtype=dtype)

    def loss(params, x):
        y = norm.apply({**live(values), "params": params}, x, train=True)
        return jnp.sum(y * weight)

    grads, grad_x = jax.jit(jax.grad(loss, (0, 1)))(live(values)["params"], x)
    close(grads["scale"], theirs.weight.grad, dtype)
    close(grads["bias"], theirs.bias.grad, dtype)
    close(grad_x, nhwc(there.grad), dtype)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("norm", [BatchNorm(), GroupNorm(2)], ids=["batch", "group"])
def test_gradient_under_a_mask_is_finite_and_the_crops(norm):
    x, extent, cropped = masked_case("float32")
    variables = initialised(norm, x)

    @jax.jit
    def gradient(x, extent):
        def loss(params, x):
            bound = norm.bind({**variables, "params": params})
            y = bound(x, train=True, mask=None if extent is None else inside(extent, x.shape[1:3]))
            return jnp.sum(jnp.sin(y[:, :4, :3]))

        return jax.grad(loss, (0, 1))(variables["params"], x)

    (params, inputs), (expected_params, expected) = gradient(x, jnp.asarray(extent)), gradient(cropped, None)
    assert np.isfinite(inputs).all()
    np.testing.assert_array_equal(inputs[:, 4:], 0)
    np.testing.assert_array_equal(inputs[:, :, 3:], 0)
    np.testing.assert_allclose(inputs[:, :4, :3], expected, atol=LAYERS_F32)
    for name in params:
        np.testing.assert_allclose(params[name], expected_params[name], atol=NET_F32)


def test_frozen_batch_norm_is_torchvisions(torch, dtype):
    from flaxdet.convert import reference

    kind = reference.torchvision().ops.misc.FrozenBatchNorm2d
    values = vectors(dtype)
    x = random(7, dtype=dtype)
    theirs = kind(SHAPE[-1]).to(getattr(torch, dtype))
    names = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    theirs.load_state_dict({key: torch.tensor(values[name]) for key, name in names.items()})
    norm = FrozenBatchNorm(dtype=dtype)
    for train in (False, True):
        found, state = applied(norm, {"batch_stats": values}, x, train=train)
        close(found, nhwc(theirs(nchw(torch, x))), dtype)
        jax.tree.map(np.testing.assert_array_equal, state["batch_stats"], values)


def test_frozen_batch_norm_has_no_params_and_no_gradient():
    x = random(8)
    norm = FrozenBatchNorm()
    variables = initialised(norm, x)
    assert set(variables) == {"batch_stats"}
    assert {name: leaf.shape for name, leaf in variables["batch_stats"].items()} == dict.fromkeys(
        ("scale", "bias", "mean", "var"), (SHAPE[-1],)
    )
    grads = jax.jit(jax.grad(lambda v: jnp.sum(norm.apply(v, x) ** 2)))(variables)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_group_norm_is_torchs(torch, dtype, groups):
    values = vectors(dtype)
    x = random(9, dtype=dtype, mean=2.0)
    theirs = torch.nn.GroupNorm(groups, SHAPE[-1]).to(getattr(torch, dtype))
    theirs.load_state_dict({"weight": torch.tensor(values["scale"]), "bias": torch.tensor(values["bias"])})
    params = {name: values[name] for name in ("scale", "bias")}
    found = jax.jit(GroupNorm(groups, dtype=dtype).apply)({"params": params}, x)
    close(found, nhwc(theirs(nchw(torch, x))), dtype)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_large_mean_cancels_no_digits(torch, norm):
    """float32 with a mean of 1000 deviations, in which E[x^2] - E[x]^2 would keep one digit of the variance."""
    x = random(3, mean=1000.0, std=1.0)
    if norm == "batch":
        module, theirs = BatchNorm(), torch.nn.BatchNorm2d(SHAPE[-1]).train()
        variables = initialised(module, x)
        found, _ = applied(module, variables, x, train=True)
    else:
        module, theirs = GroupNorm(num_groups=4), torch.nn.GroupNorm(4, SHAPE[-1])
        found = jax.jit(module.apply)(initialised(module, x), x)
    expected = nhwc(theirs.double()(nchw(torch, x).double()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=LARGE_MEAN_F32)


@pytest.mark.usefixtures("route")
def test_group_norm_inside_an_extent_is_the_crops(dtype):
    """Every image has its own extent, and its statistics know of no other cell."""
    params = {name: vectors(dtype)[name] for name in ("scale", "bias")}
    extents = np.asarray([[7, 5], [4, 3], [1, 2]], np.int32)
    x = random(10, dtype=dtype)
    for image, (rows, columns) in zip(x, extents, strict=True):
        image[rows:] = image[:, columns:] = 1e4
    norm = GroupNorm(4, dtype=dtype)
    found = jax.jit(norm.apply)({"params": params}, x, mask=inside(jnp.asarray(extents), x.shape[1:3]))
    for i, (rows, columns) in enumerate(extents):
        expected = jax.jit(norm.apply)({"params": params}, x[i : i + 1, :rows, :columns])
        close(found[i : i + 1, :rows, :columns], expected, dtype)


def test_group_norm_checks_its_groups():
    with pytest.raises(ValueError, match="num_groups=3 should divide the 8 channels"):
        GroupNorm(3).init(jax.random.key(0), random(11))


@pytest.mark.parametrize("norm", [BatchNorm, FrozenBatchNorm, GroupNorm])
def test_bfloat16_computes_and_float32_stores(norm):
    options = {"num_groups": 4} if norm is GroupNorm else {}
    x = random(12, mean=100.0)
    full, half = norm(**options), norm(dtype=jnp.bfloat16, **options)
    variables = initialised(half, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float32")}
    found = jax.jit(half.apply)(variables, jnp.asarray(x, jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    expected = jax.jit(full.apply)(variables, np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32))
    bar = 0.02 * max(1, np.abs(expected).max())  # 8 bits
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=bar)


def test_bfloat16_storage_is_widened_before_the_root():
    """1 / sqrt(var + eps) in bfloat16 would be off by a hundredth."""
    values = {name: jnp.asarray(value, jnp.bfloat16) for name, value in vectors("float32").items()}
    x = random(13)
    wide = {name: np.asarray(value, np.float32) for name, value in values.items()}
    for norm, arrange in ((BatchNorm, live), (FrozenBatchNorm, lambda v: {"batch_stats": v})):
        found = jax.jit(norm(param_dtype=jnp.bfloat16).apply)(arrange(values), x)
        np.testing.assert_allclose(found, jax.jit(norm().apply)(arrange(wide), x), rtol=HAND_F32, atol=HAND_F32)
    _, state = applied(BatchNorm(param_dtype=jnp.bfloat16), live(values), x, train=True)
    assert state["batch_stats"]["var"].dtype == jnp.bfloat16


def test_equal_however_the_dtype_is_spelled():
    spellings = ["float32", np.float32, jnp.float32, jnp.dtype("float32")]
    assert len({BatchNorm(dtype=dtype) for dtype in spellings}) == 1
    assert BatchNorm(param_dtype="float32") == BatchNorm()
    with pytest.raises(ValueError, match=r"dtype=float64 needs jax's 64-bit mode"):
        BatchNorm(dtype=jnp.float64)
    with pytest.raises(ValueError, match="dtype should be a floating point dtype, got int32"):
        GroupNorm(dtype=jnp.int32)


@pytest.mark.ci  # a process with four devices; the tests above compare each route on one device
def test_a_batch_divided_over_devices_gives_the_same():
    """Values and gradients of live BatchNorm and GroupNorm under a mask, in float64, against one device."""
    code = f"""
import itertools
import jax, jax.numpy as jnp, numpy as np
from flaxdet.nn import BatchNorm, GroupNorm
from flaxdet.train import make_mesh
from flaxdet.xla.mesh import by_rows
from flaxdet.xla.routes import routes_for
rng = np.random.default_rng(0)
x, weights = rng.normal(3, 1, (4, 5, 6, 8)), rng.normal(size=(4, 5, 6, 8))
mask = rng.random((4, 5, 6)) < 0.7
mesh = make_mesh()
kinds = BatchNorm, lambda **dtypes: GroupNorm(4, **dtypes)
for route, kind in itertools.product(("cpu", "gpu"), kinds):
    with jax.enable_x64(True), routes_for(route):
        norm = kind(dtype=np.float64)
        variables = jax.jit(norm.init)(jax.random.key(0), x)
        def loss(x, mask, weights):
            found = norm.apply(variables, x, train=True, mask=mask, mutable=["batch_stats"])[0]
            return jnp.sum(jnp.where(mask[..., None], found * weights, 0)), found
        run = jax.jit(jax.value_and_grad(loss, has_aux=True))
        alone = run(x, mask, weights)
        divided = run(*jax.device_put((x, mask, weights), by_rows(mesh)))
        assert len(divided[1].sharding.device_set) == 4
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol={OP_F64}), divided, alone)
"""
    flags = "--xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": "."}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
