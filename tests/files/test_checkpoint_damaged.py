"""Damaged files, files of other kinds and legacy ones: read, or refused in one line."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import sys
import zipfile

import numpy as np
import pytest

from flaxdet.convert import CheckpointError, read, read_metadata, write_pth, write_safetensors
from flaxdet.files import torch_pickle
from tests.files.handmade import Evil, tensor_program, zip_file


def test_damaged_zips(tmp_path):
    good = zip_file(tmp_path / "good", tensor_program(), {"data/0": bytes(range(16))})
    data = good.read_bytes()
    assert read(good)["w"].shape == (4,)

    def fails(content: bytes, expected: str) -> None:
        path = tmp_path / "bad.pth"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=expected) as info:
            read(path)
        assert "bad.pth" in str(info.value)
        assert "\n" not in str(info.value)

    for length in (4, 60, len(data) // 2, len(data) - 30, len(data) - 1):
        fails(data[:length], "truncated")
    elements = data.index(bytes(range(16)))
    fails(data[:elements] + b"\xff" + data[elements + 1 :], "checksum")

    fails(zip_file(tmp_path / "c", tensor_program()).read_bytes(), "lacks record x/data/0")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.npy", b"123")
    fails(buffer.getvalue(), "0 records NAME/data.pkl")
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", tensor_program())
    fails(buffer.getvalue(), "compressed")
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x/data.pkl", b"1")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("x/data.pkl", b"2")
    fails(buffer.getvalue(), "doubled")

    # The directory claims more bytes than the file holds.
    lying = bytearray(data)
    at = lying.index(b"PK\x01\x02")
    while lying[at + 46 : at + 46 + 8] != b"x/data/0":
        at = lying.index(b"PK\x01\x02", at + 4)
    lying[at + 20 : at + 28] = (10**9).to_bytes(4, "little") * 2
    fails(bytes(lying), "overlapping")


def test_random_damage_is_read_or_refused(tmp_path):
    """Whatever a file holds, `read` gives arrays or its own error."""
    rng = np.random.default_rng(0)
    arrays = {"a.weight": np.ones((2, 3), np.float32), "a.bias": np.zeros(2, np.float16)}
    write_pth(tmp_path / "a", arrays)
    write_safetensors(tmp_path / "b", arrays)
    evil = zip_file(tmp_path / "c", {"model": {}, "args": Evil(os.system, "true")}, protocol=4).read_bytes()
    originals = [(tmp_path / "a").read_bytes(), (tmp_path / "b").read_bytes(), evil]
    refused = 0
    for i in range(600):
        data = bytearray(originals[i % 3])
        for at in rng.integers(0, len(data), rng.integers(1, 4)):
            data[at] = rng.integers(256)
        if rng.random() < 0.2:
            del data[rng.integers(len(data)) :]
        (tmp_path / "damaged").write_bytes(data)
        try:
            read(tmp_path / "damaged")
        except CheckpointError:
            refused += 1
    assert refused > 100
    # The same inside the pickle, where no checksum tells.
    program = bytes(torch_pickle.dump(arrays))
    for _ in range(1000):
        data = bytearray(program)
        for at in rng.integers(0, len(data), rng.integers(1, 4)):
            data[at] = rng.integers(256)
        records = {"data/0": bytes(24), "data/1": bytes(4)}
        with contextlib.suppress(CheckpointError):
            read(zip_file(tmp_path / "damaged", bytes(data), records))


def test_truncated_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": np.ones(100, np.float32)})
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"a\.safetensors: is damaged"):
        read(path)


# --- other kinds


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"abc", "is not a checkpoint"),
        (b"<!DOCTYPE html><html>" * 9, "is not a checkpoint"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "is not a checkpoint"),
        (pickle.dumps({"a": 1}), "Python pickle that torch.save did not write"),
        ((10**6).to_bytes(8, "little") + b'{"a":', "truncated .safetensors"),
        ((4).to_bytes(8, "little") + b"{{{{", "is damaged"),
    ],
)
def test_other_kinds_of_file(tmp_path, content, expected):
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=expected) as info:
        read(path)
    assert "a.pth" in str(info.value)
    assert "\n" not in str(info.value)
    assert read_metadata(path) == {}


def test_missing_file_and_folder(tmp_path):
    for kind in (CheckpointError, FileNotFoundError):
        with pytest.raises(kind, match=r"nowhere\.pth: cannot be read: No such file"):
            read(tmp_path / "nowhere.pth")
    for kind in (CheckpointError, OSError):
        with pytest.raises(kind, match="cannot be read: Is a directory"):
            read(tmp_path)


def test_legacy_files_need_torch(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    path = tmp_path / "a.pth"
    torch.save({"a": torch.ones(1)}, path, _use_new_zipfile_serialization=False)
    assert read(path)["a"] == 1
    witness = tmp_path / "witness"
    torch.save({"a": Evil(os.system, f"touch {witness}")}, tmp_path / "b", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="weights_only=True") as info:
        read(tmp_path / "b")
    assert "\n" not in str(info.value)
    assert not witness.exists()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(CheckpointError, match=r"flaxdet\[torch\]"):
        read(path)
