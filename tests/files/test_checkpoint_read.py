"""Reading what torch writes, to the bit and without torch; wrappers and prefixes of real files."""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest

from flaxdet.convert import CheckpointError, read
from flaxdet.files import checkpoint
from tests.files.handmade import FLOATS, same_bits, tensor_program, zip_file


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_reads_the_bits_that_torch_wrote(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    base = torch.arange(24.0).reshape(2, 3, 4)
    tensors = OrderedDict(
        float32=torch.from_numpy(FLOATS),
        float64=torch.tensor([np.pi], dtype=torch.float64),
        float16=torch.from_numpy(FLOATS).half(),
        bfloat16=torch.from_numpy(FLOATS).bfloat16(),
        counter=torch.tensor(2**40),
        int32=torch.tensor([-1], dtype=torch.int32),
        int16=torch.tensor([-1], dtype=torch.int16),
        int8=torch.tensor([-1], dtype=torch.int8),
        uint8=torch.tensor([255], dtype=torch.uint8),
        bool=torch.tensor([True, False]),
        complex=torch.tensor([1 + 2j]),
        empty=torch.zeros(0, 3),
        scalar=torch.tensor(2.5),
        base=base,
        transposed=base.permute(2, 0, 1),
        sliced=base[1:, ::2],
        expanded=base[:, :1].expand(2, 5, 4),
        parameter=torch.nn.Parameter(torch.ones(2, 2).bfloat16()),
    )
    if zipped:
        tensors["uint16"] = torch.tensor([65535], dtype=torch.int32).to(torch.uint16)
        tensors["float8"] = torch.tensor([1.5, -2.0]).to(torch.float8_e4m3fn)
    path = tmp_path / "a.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    found = read(path)
    assert list(found) == list(tensors)
    for key, tensor in tensors.items():
        array, plain = found[key], tensor.detach().contiguous()
        assert array.shape == tuple(tensor.shape)
        assert str(array.dtype) == str(tensor.dtype).removeprefix("torch."), key
        expected = plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
        assert array.tobytes() == expected, key
    if zipped:
        assert np.shares_memory(found["base"], found["transposed"])


def test_reads_the_same_bits_without_torch(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "a.pth"
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).bfloat16()
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(lr=0.1)}, path)
    script = """
import sys
sys.modules["torch"] = None
import hashlib
from flaxdet.convert import read
digest = hashlib.sha256()
for key, array in read(sys.argv[1]).items():
    digest.update(f"{key} {array.dtype} {array.shape}".encode() + array.tobytes())
print(digest.hexdigest())
"""
    env = {**os.environ, "PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"}
    result = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, env=env, check=True)
    digest = hashlib.sha256()
    for key, tensor in model.state_dict().items():
        bits = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        name = str(tensor.dtype).removeprefix("torch.")
        digest.update(f"{key} {name} {tuple(tensor.shape)}".encode() + bits)
    assert result.stdout.strip() == digest.hexdigest()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol(tmp_path, protocol):
    torch = pytest.importorskip("torch")
    state = OrderedDict(a=torch.arange(3.0), b=torch.tensor(1))
    torch.save({"state_dict": state, "more": argparse.Namespace(x={1, 2})}, tmp_path / "a", pickle_protocol=protocol)
    found = read(tmp_path / "a")
    assert same_bits(found["a"], np.arange(3, dtype=np.float32))
    assert same_bits(found["b"], np.array(1))


def test_a_file_without_checksums(tmp_path):
    torch = pytest.importorskip("torch")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "a")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read(tmp_path / "a")["a"].tolist() == [1, 1, 1]


def test_big_endian_storages(tmp_path):
    path = zip_file(
        tmp_path / "a", tensor_program(), {"data/0": np.arange(4, dtype=">f4").tobytes(), "byteorder": b"big"}
    )
    assert same_bits(read(path)["w"], np.arange(4, dtype=np.float32))
    bits = FLOATS[:4].astype(ml_dtypes.bfloat16)
    swapped = bits.view(np.uint16).astype(">u2").tobytes()
    path = zip_file(tmp_path / "b", tensor_program(kind="BFloat16Storage"), {"data/0": swapped, "byteorder": b"big"})
    assert same_bits(read(path)["w"], bits)


def test_shared_checkpoints(shared):
    torch = pytest.importorskip("torch")
    for path in sorted((shared / "checkpoints").glob("*.pth")):
        expected = torch.load(path, weights_only=True)
        found = read(path)
        assert list(found) == list(expected)
        assert all(same_bits(found[key], tensor.numpy()) for key, tensor in expected.items())


# --- wrappers


@pytest.mark.parametrize("wrap", [dict, *({name: 0} for name in ("model", "state_dict", "model_state_dict"))])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_and_prefixes(wrap, prefix):
    inner = {f"{prefix}a.weight": np.ones(2), f"{prefix}b": np.zeros(())}
    outer = dict(inner) if wrap is dict else {next(iter(wrap)): inner, "optimizer": {"state": {}}, "epoch": 3}
    assert list(checkpoint.unwrap(outer)) == ["a.weight", "b"]


def test_ema_only_when_asked(tmp_path):
    torch = pytest.importorskip("torch")
    ema = {"n_averaged": torch.tensor(5), "module.a": torch.zeros(1)}
    torch.save({"model_ema": ema, "model": {"a": torch.ones(1)}}, tmp_path / "a")
    assert read(tmp_path / "a")["a"] == 1
    assert list(read(tmp_path / "a", ema=True)) == ["a"]
    assert read(tmp_path / "a", ema=True)["a"] == 0
    torch.save({"a": torch.ones(1)}, tmp_path / "b")
    with pytest.raises(CheckpointError, match="model_ema"):
        read(tmp_path / "b", ema=True)
