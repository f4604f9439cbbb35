from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import io
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from flaxdet.convert import (
    CheckpointError,
    checkpoint,
    read,
    read_metadata,
    torch_pickle,
    write_pth,
    write_safetensors,
)

FLOATS = np.array([0.0, -0.0, 1.5, np.inf, -np.inf, np.nan, 1e-40], np.float32)


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


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def zip_file(path: Path, root: object, records: dict[str, bytes] | None = None, protocol: int = 2) -> Path:
    """A torch-like zip around any pickle (bytes are taken as the pickle itself)."""
    program = root if isinstance(root, bytes) else pickle.dumps(root, protocol)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", program)
        for name, data in {"byteorder": b"little", "version": b"3\n", **(records or {})}.items():
            archive.writestr(f"x/{name}", data)
    return path


def tensor(kind: str = "FloatStorage", numel: int = 4, offset: int = 0, shape: bytes = b"(K\x04t") -> bytes:
    """The instructions for one tensor of storage "0"; shape in pickle's own words, strides all 1."""
    dims = shape.count(b"K") + shape.count(b"J") + shape.count(b"\x8a")
    numbers = [number.to_bytes(4, "little", signed=True) for number in (numel, offset)]
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\n%b\n"
        b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuJ%btQJ%b%b(%bt\x89}tR"
    ) % (kind.encode(), *numbers, shape, b"K\x01" * dims)


def tensor_program(**options) -> bytes:
    """{"w": tensor}"""
    return b"\x80\x02}X\x01\x00\x00\x00w" + tensor(**options) + b"s."


class Evil:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


# --- reading what torch writes


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


# --- hostile files


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_no_code_runs(tmp_path, protocol):
    witness = tmp_path / "witness"
    evil = [
        Evil(os.system, f"touch {witness}"),
        Evil(eval, f"open({str(witness)!r}, 'w')"),
        Evil(exec, f"open({str(witness)!r}, 'w')"),
        Evil(Path.touch, witness),
        Evil(__import__, "antigravity"),
    ]
    body = pickle.dumps(evil, protocol)
    header, stop = body[:2] if protocol >= 2 else b"", b"."
    # {"args": evil, "model": {"w": tensor}}
    program = (
        header
        + b"}(X\x04\x00\x00\x00args"
        + body[len(header) : -1]
        + b"X\x05\x00\x00\x00model"
        + b"}X\x01\x00\x00\x00w"
        + tensor()
        + b"s"
    )
    path = zip_file(tmp_path / "a", program + b"u" + stop, {"data/0": np.arange(4.0, dtype=np.float32).tobytes()})
    assert read(path)["w"].tolist() == [0, 1, 2, 3]
    assert not witness.exists()
    assert "antigravity" not in sys.modules


def test_foreign_objects_are_never_imported_and_do_nothing(tmp_path):
    program = (
        b"\x80\x02}(X\x01\x00\x00\x00acthis_module\nbuilt\n(K\x01K\x02tRq\x00"  # REDUCE
        b"}X\x01\x00\x00\x00kK\x01sb"  # BUILD
        b"(K\x01K\x02e"  # APPENDS
        b"(K\x01K\x02u"  # SETITEMS
        b"X\x01\x00\x00\x00bcantigravity\nfly\n)\x81}b"  # NEWOBJ, BUILD
        b"X\x01\x00\x00\x00cc__builtin__\ngetattr\n(cposix\nenviron\nX\x05\x00\x00\x00cleartR)R"
        b"X\x01\x00\x00\x00dcos\nsystem\n}X\x08\x00\x00\x00__init__K\x01sb"  # BUILD of the class itself
        b"u."
    )
    found = torch_pickle.load(program)
    assert {key: type(value).__name__ for key, value in found.items()} == dict.fromkeys("abc", "Placeholder") | {
        "d": "type"
    }
    assert found["a"].origin == "this_module.built"
    assert not {"this_module", "antigravity"} & sys.modules.keys()
    assert os.environ


@pytest.mark.parametrize(
    "program",
    [
        # BUILD would set attributes: of our function, of a dict type that stays, of a tensor
        b"ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__)s\x86b",
        b"ccollections\nOrderedDict\nN}X\x06\x00\x00\x00updateK\x01s\x86b",
        tensor() + b"(K\x00tb",
    ],
)
def test_build_changes_nothing(program):
    defaults = [function.__defaults__ for function in torch_pickle._FUNCTIONS.values()]
    names = dict(vars(torch_pickle._Dict))
    torch_pickle.load(b"\x80\x02" + program + b".")
    assert [function.__defaults__ for function in torch_pickle._FUNCTIONS.values()] == defaults
    assert dict(vars(torch_pickle._Dict)) == names


def test_a_placeholder_in_the_state_dict_is_handed_over_inert(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.ones(1), "b": Evil(os.system, "true")}, tmp_path / "a")
    value = read(tmp_path / "a")["b"]
    assert isinstance(value, torch_pickle.Placeholder)
    assert value.origin == "posix.system"
    assert "not loaded" in repr(value)


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (b"\x80\x02}K\x01r\xff\xff\xff\xff.", "not a state_dict"),  # a memo of 4 billion places
        (
            b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",
            "not a pickle of tensors",
        ),  # a string of 2^63 bytes
        (b"\x80\x02", "not a pickle of tensors"),
        (b"(" * 10**5 + b"t" * 10**5 + b".", "not a state_dict"),
        (b"cos\nsystem\n)R.", "os.system, not a state_dict"),
        (b"\x80\x02}K\x01K\x02s.", "keys of type int"),
        (b"\x80\x02}X\x05\x00\x00\x00epochK\x02s.", "without tensors.*epoch"),
        (b"X\x03\x00\x00\x00abc.", "str, not a state_dict"),
        (b"\x80\x02Pabc\n.", "in a way that torch does not write"),
        (b"\x80\x02}X\x01\x00\x00\x00aX\x01\x00\x00\x00bQs.", "in a way that torch does not write"),
        (tensor_program(kind="QInt8Storage"), "in a way that torch does not write"),
        (tensor_program(offset=-1), "in a way that torch does not write"),
        (tensor_program(offset=1), "beyond its storage"),
        (tensor_program(shape=b"(K\x05t"), "beyond its storage"),
        (tensor_program(numel=5), r"has 16 bytes in record x/data/0.* 20"),
        (tensor_program(numel=-4), "has 16 bytes"),
        (tensor_program(kind="DoubleStorage"), "has 16 bytes"),
        (tensor_program(shape=b"(J\xff\xff\xff\x7fJ\xff\xff\xff\x7ft"), "beyond its storage"),
        (tensor_program(shape=b"(" + b"K\x01" * 99 + b"t"), "dim"),
        (tensor_program(shape=b"(K\x00\x8a\x0f" + b"\x7f" * 15 + b"t"), "."),
        (tensor_program(shape=b"}"), "in a way that torch does not write"),
    ],
)
def test_hostile_pickles_give_one_line(tmp_path, program, expected):
    path = zip_file(tmp_path / "evil.pth", program, {"data/0": bytes(16)})
    with pytest.raises(CheckpointError, match=expected) as info:
        read(path)
    assert str(info.value).startswith(f"{path}: ")
    assert "\n" not in str(info.value)


def test_terminal_codes_do_not_reach_the_message(tmp_path):
    with pytest.raises(CheckpointError) as info:
        read(zip_file(tmp_path / "a", b"c\x1b[2Jx\nname\n)R."))
    assert str(info.value).isprintable()


# --- damaged files and other kinds


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


def test_truncated_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": np.ones(100, np.float32)})
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"a\.safetensors: is damaged"):
        read(path)


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


# --- writing


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


def test_shared_checkpoints(shared):
    torch = pytest.importorskip("torch")
    for path in sorted((shared / "checkpoints").glob("*.pth")):
        expected = torch.load(path, weights_only=True)
        found = read(path)
        assert list(found) == list(expected)
        assert all(same_bits(found[key], tensor.numpy()) for key, tensor in expected.items())
