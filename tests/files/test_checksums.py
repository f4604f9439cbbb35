"""A bit that changed in a file of ours is an error, or changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from flaxdet.convert import CheckpointError, read, read_metadata, write_safetensors
from flaxdet.files import checksums

ARRAYS = {
    "a": np.array([[1.5, -2.0], [0.0, 3e38]], np.float32),
    "b": np.array(7, np.int64),
    "c": np.array([1, 2], ml_dtypes.bfloat16),
    "d": np.zeros((0, 3), np.float32),
}
TEXTS = {"flaxdet": json.dumps({"options": {"min_size": 64}}), "other": "é\n"}


def same(found: dict, expected: dict = ARRAYS) -> bool:
    return found.keys() == expected.keys() and all(
        (found[name].dtype, found[name].shape, found[name].tobytes())
        == (array.dtype, array.shape, array.tobytes())
        for name, array in expected.items()
    )  # fmt: skip


def read_all(path: Path) -> tuple[str | None, tuple[dict, dict]]:
    """The error, and the arrays and texts."""
    try:
        return None, (read(path), read_metadata(path))
    except CheckpointError as error:
        return str(error), ({}, {})


def test_a_flipped_bit_anywhere_in_a_file_is_found_or_harmless(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, ARRAYS, TEXTS)
    whole = path.read_bytes()
    assert same(read(path))
    assert read_metadata(path) == TEXTS
    found, bits = 0, range(0, 8 * len(whole), 11)  # coprime to 8: every place in a byte is among them
    for bit in bits:
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        fault, content = read_all(path)
        if fault is None:
            assert same(content[0]), bit
            assert {name: content[1].get(name) for name in TEXTS} == TEXTS, bit
        else:
            assert str(path) in fault
            assert len(fault.splitlines()) == 1
            found += 1
    # a changed name of the checksums leaves a file without any, which is read as an older one
    assert found > 0.9 * len(bits)


def test_the_array_is_named_and_what_to_do_if_it_changed_on_purpose(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, ARRAYS)
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    halved = {name: array for name, array in ARRAYS.items() if name != "d"}
    safetensors.numpy.save_file(halved | {"a": ARRAYS["a"] / 2}, path, metadata)  # by another program
    with pytest.raises(CheckpointError, match=r"a.safetensors: is damaged: a and 1 other array changed since") as error:
        read(path)
    assert checksums.METADATA_KEY in str(error.value)
    del metadata[checksums.METADATA_KEY]
    safetensors.numpy.save_file(halved, path, metadata)
    assert same(read(path), halved)


def test_the_same_content_gives_the_same_bytes(tmp_path):
    """Whatever the process: the library writes texts in the order of a hash table with a random seed."""
    script = (
        "import sys, numpy as np; from flaxdet.convert import write_safetensors; "
        "write_safetensors(sys.argv[1], {'a': np.arange(3.0)}, dict(zip('abcdef', 'uvwxyz')))"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "x")], check=True)
    write_safetensors(tmp_path / "z", {"a": np.arange(3.0)}, dict(zip("fedcba", "zyxwvu", strict=True)))
    assert (tmp_path / "x").read_bytes() == (tmp_path / "z").read_bytes()
    assert safetensors.numpy.load_file(tmp_path / "z")["a"].tolist() == [0, 1, 2]  # by the library alone
