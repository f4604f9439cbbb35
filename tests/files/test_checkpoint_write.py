"""Writing: every bit comes back, torch loads it, and of a failed write nothing is left."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import zipfile
from collections import OrderedDict

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from flaxdet.convert import CheckpointError, read, read_metadata, write_pth, write_safetensors
from flaxdet.files import checkpoint
from tests.files.handmade import FLOATS, same_bits


def some_arrays() -> dict[str, np.ndarray]:
    grid = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    return {
        "float32": FLOATS,
        "float64": np.array([[np.pi, -1e300]]),
        "float16": FLOATS[:6].astype(np.float16),
        "bfloat16": FLOATS.astype(ml_dtypes.bfloat16),
        "int64 scalar": np.array(-(2**62), np.int64),
        "int32": np.array([-1, 2], np.int32),
        "int16": np.array([-1, 2], np.int16),
        "int8": np.array([-1, 2], np.int8),
        "uint8": np.array([255], np.uint8),
        "bool": np.array([True, False, True]),
        "complex64": np.array([1 + 2j], np.complex64),
        "complex128": np.array([1 + 2j]),
        "empty": np.zeros((0, 3), np.float32),
        "transposed": grid.transpose(2, 0, 1),
        "every second": grid[:, ::2],
        "reversed": grid[:, ::-1],
        "big endian": np.array([1.5, 2.5], ">f4"),
    }


@pytest.mark.parametrize("write", [write_pth, write_safetensors])
def test_written_files_come_back_bit_for_bit(tmp_path, write):
    arrays = some_arrays()
    if write is write_safetensors:
        del arrays["complex128"]
    write(tmp_path / "misnamed.txt", arrays)
    found = read(tmp_path / "misnamed.txt")
    assert found.keys() == arrays.keys()
    for key, array in arrays.items():
        assert same_bits(found[key], array.astype(array.dtype.newbyteorder("="))), key
    assert [path.name for path in tmp_path.iterdir()] == ["misnamed.txt"]


def test_why_arrays_are_made_contiguous(tmp_path):
    """The defect of safetensors 0.8.0 that `write_safetensors` guards against: fails when it is gone."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    write_safetensors(tmp_path / "a", {"a": array})
    np.testing.assert_array_equal(read(tmp_path / "a")["a"], array)
    if safetensors.__version__ == "0.8.0":
        safetensors.numpy.save_file({"a": array}, tmp_path / "b")
        assert not np.array_equal(safetensors.numpy.load_file(tmp_path / "b")["a"], array)


def test_torch_loads_what_is_written(tmp_path):
    torch = pytest.importorskip("torch")
    arrays = some_arrays()
    write_pth(tmp_path / "a.pth", arrays)
    for options in ({}, {"mmap": True}):
        found = torch.load(tmp_path / "a.pth", weights_only=True, **options)
        assert type(found) is OrderedDict
        assert list(found) == list(arrays)
        for key, tensor in found.items():
            array = arrays[key].astype(arrays[key].dtype.newbyteorder("="))
            assert same_bits(checkpoint.as_array(tensor), array), key


def test_a_module_loads_what_is_written(tmp_path):
    torch = pytest.importorskip("torch")
    source = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).double()
    source(torch.rand(2, 3, 5, 5, dtype=torch.float64))
    write_pth(tmp_path / "a.pth", source.state_dict())
    target = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).double()
    target.load_state_dict(torch.load(tmp_path / "a.pth", weights_only=True), strict=True)
    for key, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], tensor)


def test_the_same_arrays_give_the_same_bytes(tmp_path):
    for name in "ab":
        write_pth(tmp_path / name, {"w": np.ones(1000), "v": jnp.zeros((2, 3), jnp.bfloat16)})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with zipfile.ZipFile(tmp_path / "a") as archive:
        assert archive.testzip() is None
        for info in archive.infolist():
            archive.fp.seek(info.header_offset + 26)
            lengths = np.frombuffer(archive.fp.read(4), "<u2")
            assert (info.header_offset + 30 + int(lengths.sum())) % 64 == 0


def test_metadata(tmp_path):
    write_safetensors(tmp_path / "a", {"a": np.ones(1)}, {"builder": "x", "kwargs": "é\n"})
    assert read_metadata(tmp_path / "a") == {"builder": "x", "kwargs": "é\n"}
    write_pth(tmp_path / "b", {"a": np.ones(1)})
    assert read_metadata(tmp_path / "b") == {}
    with pytest.raises(CheckpointError, match="not written"):
        write_safetensors(tmp_path / "c", {"a": np.ones(1)}, {"classes": 3})
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("write", [write_pth, write_safetensors])
@pytest.mark.parametrize("value", [3, "text", None, np.array(["text"]), np.array([None])])
def test_only_arrays_are_written(tmp_path, write, value):
    with pytest.raises(CheckpointError, match=r"a\.out: not written") as info:
        write(tmp_path / "a.out", {"key": value})
    assert "\n" not in str(info.value)
    assert not list(tmp_path.iterdir())


# --- failures and targets


@pytest.mark.parametrize("write", [write_pth, write_safetensors])
def test_nothing_is_left_of_a_failed_write(tmp_path, monkeypatch, write):
    target = tmp_path / "a.out"
    target.write_bytes(b"before")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for kind in (CheckpointError, OSError):
        with pytest.raises(kind, match=r"a\.out: cannot be written: No space left") as info:
            write(target, {"w": np.ones(1000)})
        assert "\n" not in str(info.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.out"]
    assert target.read_bytes() == b"before"


def test_a_disk_that_fills_up(tmp_path):
    """The kernel itself refuses to write more than 64 KiB into one file."""
    script = """
import resource, sys
import numpy as np
from flaxdet.convert import CheckpointError, write_pth, write_safetensors
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
for write in (write_pth, write_safetensors):
    try:
        write(sys.argv[1], {"w": np.ones(10**5)})
    except CheckpointError as error:
        print(error)
"""
    env = {**os.environ, "PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"}
    target = tmp_path / "a.out"
    result = subprocess.run([sys.executable, "-c", script, target], capture_output=True, text=True, env=env, check=True)
    assert result.stdout.count(f"{target}: cannot be written: File too large") == 2
    assert not list(tmp_path.iterdir())


def test_targets_that_cannot_be_written(tmp_path):
    state = {"w": np.ones(1)}
    with pytest.raises(CheckpointError, match=r"nowhere/a\.pth: cannot be written: No such file"):
        write_pth(tmp_path / "nowhere" / "a.pth", state)
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match="folder: cannot be written: Is a directory"):
        write_pth(tmp_path / "folder", state)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    user = os.geteuid()
    if user == 0:  # root may write anywhere
        os.seteuid(65534)
    try:
        with pytest.raises(CheckpointError, match="cannot be written: Permission denied"):
            write_pth(tmp_path / "a.pth", {"w": np.ones(1)})
    finally:
        os.seteuid(user)


def test_an_interrupt_leaves_nothing(tmp_path):
    def interrupted() -> None:
        with checkpoint.replacing(tmp_path / "a") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_a_link_is_followed_and_permissions_are_the_usual(tmp_path):
    (tmp_path / "real").write_bytes(b"")
    (tmp_path / "link").symlink_to("real")
    write_pth(tmp_path / "link", {"w": np.ones(1)})
    assert (tmp_path / "link").is_symlink()
    assert read(tmp_path / "real")["w"] == 1
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "real").stat().st_mode == (tmp_path / "plain").stat().st_mode
