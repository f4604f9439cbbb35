"""Limits of what a checkpoint may ask for, and values that are not the stored elements."""

from __future__ import annotations

import argparse
import json
import pickle
import pickletools
import resource
import struct
import time
import tracemalloc
import warnings
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from flaxdet.convert import CheckpointError, read
from flaxdet.files import checkpoint, torch_pickle
from tests.files.handmade import same_bits, tensor, tensor_program, zip_file

W = b"X\x01\x00\x00\x00w"
BYTES = {"data/0": np.arange(4, dtype=np.float32).tobytes()}


def refused(path, expected: str) -> float:
    """Asserts that the file is refused; returns how many seconds of the CPU that took."""
    start = time.process_time()
    with pytest.raises(CheckpointError, match=expected) as info:
        read(path)
    assert str(info.value).isprintable()
    return time.process_time() - start


# --- the program


def test_what_torch_writes_is_run(tmp_path):
    """Every instruction in files of torch, at any protocol, is among those that are run; all others are refused."""
    torch = pytest.importorskip("torch")
    recursive: list = []
    recursive.append((recursive,))
    content = {
        "state_dict": OrderedDict(w=torch.arange(3.0), p=torch.nn.Parameter(torch.ones(1)), e=torch.zeros(0)),
        "args": argparse.Namespace(
            x={1, 2}, y=frozenset([3]), z=b"bytes", b=bytearray(b"more"), f=1.5, none=None, c=1j
        ),
        "numbers": [0, 255, 65535, -1, 2**31, 2**70, 2**3000, True, False, "é" * 300],
        "numpy": np.arange(3),
        "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        "recursive": recursive,
        "dtype": torch.float32,
        "module": torch.nn.Linear(2, 2),
        "many": {str(i): i for i in range(300)},
    }
    written = set()
    for protocol in (2, 3, 4, 5):
        path = tmp_path / f"{protocol}.pth"
        torch.save(content, path, pickle_protocol=protocol)
        with zipfile.ZipFile(path) as archive:
            written |= {opcode.name for opcode, _, _ in pickletools.genops(archive.read(f"{protocol}/data.pkl"))}
        found = read(path)
        assert found["w"].tolist() == [0, 1, 2]
        assert list(found) == ["w", "p", "e"]
    assert written <= {*torch_pickle._WRITTEN.split()}
    for opcode in pickletools.opcodes:
        if opcode.name not in torch_pickle._WRITTEN.split():
            program = b"\x80\x02}" + opcode.code.encode("latin-1") + b"1\n1\n" + bytes(9) + b"."
            refused(zip_file(tmp_path / "a", program), f"instruction {opcode.name}")


@pytest.mark.parametrize("protocol", [0, 1, 6, 255])
def test_other_protocols(tmp_path, protocol):
    program = bytes([0x80, protocol]) + tensor_program()[2:]
    refused(zip_file(tmp_path / "a", program, BYTES), f"protocol {protocol}, expected 2 to 5")


@pytest.mark.parametrize(
    "key",
    [b")", b"N\x85", b"]", b"}", b"K\x01K\x02\x86"],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} bytes",
)
def test_containers_as_keys(tmp_path, key):
    for program in (b"}" + key + b"K\x01s.", b"}(" + W + tensor() + key + b"K\x01u."):
        assert refused(zip_file(tmp_path / "a", b"\x80\x02" + program, BYTES), "as the key of a dict") < 1


def test_a_hash_of_exponential_time(tmp_path):
    """A tuple that holds a tuple twice, that holds a tuple twice, ...: 554 bytes."""
    program = b"\x80\x02}Nq\x00" + b"h\x00\x86q\x00" * 100 + b"K\x01s."
    assert refused(zip_file(tmp_path / "a", program), "a tuple as the key of a dict") < 1


@pytest.mark.parametrize(
    "program",
    [
        b"}N" + b"\x85" * 10**6 + b"K\x01s.",
        b"N" + b"\x85" * 400 + b".",
        b"]" * 400 + b"a" * 399 + b".",
        (b"}" + W) * 400 + b"N" + b"s" * 400 + b".",
        b"(" * 400 + b"t" * 400 + b".",
        b"(" * 10**6,
        # the outer list is filled before the inner ones are: each is in a list already
        b"".join(b"]q%c" % i for i in range(200))
        + b"".join(b"h%ch%ca0" % (i, i + 1) for i in range(199)) * 2
        + b"h\x00.",
        b"]" + b"\x85" * 302 + b".",
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} bytes",
)
def test_deep_nesting(tmp_path, program):
    deep = b"h\x00." in program
    path = zip_file(tmp_path / "a", b"\x80\x02" + program)
    assert refused(path, "not a state_dict" if deep else "nests containers|instructions|key of a dict|stack") < 3


def test_nesting_that_is_allowed(tmp_path):
    content: object = 1
    for _ in range(250):
        content = [content]
    path = zip_file(
        tmp_path / "a",
        b"\x80\x02}" + W + tensor() + b"sX\x01\x00\x00\x00x" + pickle.dumps(content, 2)[2:-1] + b"s.",
        BYTES,
    )
    assert read(path)["w"].shape == (4,)


def test_bounds_of_the_program(tmp_path):
    refused(zip_file(tmp_path / "a", b"\x80\x02" + b"N0" * 600_000 + b"}."), "more than 1,000,000 instructions")
    refused(zip_file(tmp_path / "a", b"\x80\x02" + bytes(17 << 20)), "bytes, expected at most 16,777,216")
    names = b"".join(b"ca%d\nb\n0" % i for i in range(1001))
    refused(zip_file(tmp_path / "a", b"\x80\x02" + names + b"}."), "more than 1,000 classes")
    refused(
        zip_file(tmp_path / "a", b"\x80\x02c" + b"a" * 600 + b"\nb\n."), "names a class in a way that torch does not"
    )
    refused(zip_file(tmp_path / "a", b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b"a."), "EOF")


@pytest.mark.parametrize(
    "call",
    [b"ctorch\nSize\n", b"cany\nthing\n", b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n"],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} bytes",
)
def test_a_long_list_is_not_copied_by_each_call(tmp_path, call):
    """90,000 calls with one list of 90,000 items: 65 GB, if each copied it."""
    program = b"\x80\x02](" + b"N" * 90_000 + b"eq\x00\x85q\x01" + (call + b"h\x01R0") * 90_000 + b"}."
    assert refused(zip_file(tmp_path / "a", program), "not a state_dict|not a pickle") < 4


@pytest.mark.parametrize(
    ("start", "each"),
    [
        # a number of a megabyte, whose hash is computed at each use
        (b"\x8b" + (10**6).to_bytes(4, "little") + b"\x7f" * 10**6 + b"q\x000", b"h\x00Ns"),
        # two equal texts of a megabyte, which are compared at each use
        (
            b"".join(b"X" + (10**6).to_bytes(4, "little") + b"a" * 10**6 + b"q%c0" % i for i in (0, 1)),
            b"h\x00Nsh\x01Ns",
        ),
        # a tuple that is unpacked at each use
        (b"(" + b"N" * 10**5 + b"tq\x000", b"h\x00Q0"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} bytes",
)
def test_what_takes_long_each_time(tmp_path, start, each):
    program = b"\x80\x02" + start + b"}" + each * 50_000 + b"."
    assert refused(zip_file(tmp_path / "a", program), "does not write") < 1


@pytest.mark.parametrize(
    "program",
    [
        b"\x8f0" * 400_000 + b"}.",
        b"(\x910" * 300_000 + b"}.",
        # one long list of containers, many times in another
        b"](" + b"]" * 10**5 + b"eq\x000](" + b"h\x00" * 10**5 + b"e.",
        # one dict without tensors, under many names
        b"}("
        + b"".join(b"X\x05\x00\x00\x00%05dN" % i for i in range(50_000))
        + b"uq\x000}("
        + b"".join(b"X\x05\x00\x00\x00%05dh\x00" % i for i in range(50_000))
        + b"u.",
    ],
    ids=lambda value: f"{len(value)} bytes",
)
def test_what_is_there_many_times(tmp_path, program):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert refused(zip_file(tmp_path / "a", b"\x80\x04" + program), "not a state_dict") < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB


def test_numbers_of_one_hash(tmp_path):
    """As keys of a dict, each would be compared with all before it."""
    numbers = [pickle.encode_long(i * (2**61 - 1)) for i in range(100, 60_000)]
    program = b"\x80\x02}(" + b"".join(b"\x8a%c%bN" % (len(number), number) for number in numbers) + b"u."
    assert refused(zip_file(tmp_path / "a", program), "does not write") < 1


def test_keys_that_grow(tmp_path):
    """One name of a storage, referred to by many tensors, is not put into a text for each."""
    program = tensor_program().replace(b"X\x01\x00\x00\x000", b"X" + (10**6).to_bytes(4, "little") + b"0" * 10**6)
    refused(zip_file(tmp_path / "a", program), "refers to a storage in a way that torch does not write")


# --- sizes


def test_sizes_beyond_the_file(tmp_path):
    """A stride of 0 repeats an element: 12 bytes of instructions for a gigabyte."""
    big = b"J\x00\x00\x00\x10"  # 2^28
    one = tensor_program(shape=b"(" + big + b"t").replace(b"(K\x01t\x89", b"(K\x00t\x89")
    tracemalloc.start()
    refused(zip_file(tmp_path / "a", one, BYTES), r"more memory than the file's \d+ bytes explain, at w, of shape")
    # many small ones
    part = tensor(shape=b"(K\x40K\x02t").replace(b"(K\x01K\x01t\x89", b"(K\x00K\x00t\x89")
    names = [b"X\x03\x00\x00\x00%03d" % i for i in range(300)]
    many = (
        b"\x80\x02}("
        + b"".join(
            name + part.replace(b"J\x00\x00\x00\x00(", b"J%c\x00\x00\x00(" % (i % 4)) for i, name in enumerate(names)
        )
        + b"u."
    )
    assert len(read(zip_file(tmp_path / "b", many, BYTES))) == 300  # four different views of 512 bytes
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


def test_views_of_one_storage_cost_no_copies(tmp_path):
    """300 tensors of 4 MB of booleans, which are one storage."""
    size = 4 << 20
    number = b"J" + size.to_bytes(4, "little")
    part = tensor("BoolStorage", size, shape=b"(" + number + b"t")
    names = b"".join(b"X\x03\x00\x00\x00%03d" % i + part for i in range(300))
    path = zip_file(tmp_path / "a", b"\x80\x02}(" + names + b"u.", {"data/0": bytes([0, 7]) * (size // 2)})
    tracemalloc.start()
    found = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * size
    assert found["000"][:4].view(np.uint8).tolist() == [0, 1, 0, 1]
    assert np.shares_memory(found["000"], found["299"])


def test_a_large_directory(tmp_path):
    """A zip of many empty records takes ten times their memory when it is listed."""
    path, size = tmp_path / "a.pth", 5 << 20
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 60_000, 60_000, size, 4, 0)
    path.write_bytes(b"PK\x03\x04" + bytes(size) + end)
    assert refused(path, r"has a zip directory of [\d,]+ bytes, expected at most 4,194,304") < 1


# --- values


def test_torchs_lazy_bits(tmp_path):
    """Conjugates, their imaginary parts, and views of these are written with a bit that says so."""
    torch = pytest.importorskip("torch")
    z = torch.tensor([1 + 2j, -3 + 0.5j], dtype=torch.complex128)
    tensors = {
        "z": z,
        "conj": z.conj(),
        "imag": z.conj().imag,
        "real": z.conj().real,
        "both": torch._neg_view(z.conj()),
        "negative": torch._neg_view(torch.tensor([1, 2])),
        "half": torch._neg_view(torch.tensor([1.5, -2.0]).bfloat16()),
        "slice": z.conj().imag[1:],
    }
    expected = {
        "z": [1 + 2j, -3 + 0.5j],
        "conj": [1 - 2j, -3 - 0.5j],
        "imag": [-2, -0.5],
        "real": [1, -3],
        "both": [-1 + 2j, 3 + 0.5j],
        "negative": [-1, -2],
        "half": [-1.5, 2],
        "slice": [-0.5],
    }
    # torch saves no storage under two dtypes
    for names in (["z", "conj", "both"], ["imag", "real", "slice"], ["negative", "half"]):
        for zipped in (True, False):
            torch.save({name: tensors[name] for name in names}, tmp_path / "a", _use_new_zipfile_serialization=zipped)
            found = read(tmp_path / "a")
            assert {name: array.tolist() for name, array in found.items()} == {name: expected[name] for name in names}
    assert checkpoint.as_array(tensors["imag"]).tolist() == [-2, -0.5]
    assert checkpoint.as_array(tensors["conj"]).tolist() == [1 - 2j, -3 - 0.5j]


@pytest.mark.parametrize(
    ("kind", "bits", "expected"),
    [
        ("FloatStorage", b"}X\x04\x00\x00\x00conj\x88s", "float32 whose bit conj"),
        ("BoolStorage", b"}X\x03\x00\x00\x00neg\x88s", "bool whose bit"),
        ("FloatStorage", b"}X\x03\x00\x00\x00posK\x01s", "metadata other than"),
        ("FloatStorage", b"}X\x03\x00\x00\x00negK\x01s", "in a way that torch does not write"),
        ("FloatStorage", b"K\x01", "metadata other than"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} bytes",
)
def test_lazy_bits_that_torch_does_not_write(tmp_path, kind, bits, expected):
    program = tensor_program(kind=kind).replace(b"\x89}tR", b"\x89}" + bits + b"tR")
    refused(zip_file(tmp_path / "a", program, {"data/0": bytes(4 if kind == "BoolStorage" else 16)}), expected)


@pytest.mark.parametrize(
    "order",
    [b"", b"middle", b"Little", b"little\n", b"\xff\xfe", b"x" * 10**6],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} bytes",
)
def test_byteorder(tmp_path, order):
    refused(zip_file(tmp_path / "a", tensor_program(), {**BYTES, "byteorder": order}), "byteorder")


def test_one_storage_under_two_dtypes(tmp_path):
    torch = pytest.importorskip("torch")
    names = [b"X\x01\x00\x00\x00a", b"X\x01\x00\x00\x00b"]
    two = b"\x80\x02}(" + names[0] + tensor() + names[1] + tensor("IntStorage") + b"u."
    refused(zip_file(tmp_path / "a", two, BYTES), "the storage 0 under two dtypes")
    x = torch.tensor([1, 2], dtype=torch.int16).view(torch.uint16)  # of an untyped storage, where torch doesn't look
    torch.save({"a": x, "b": x.view(torch.float8_e5m2)}, tmp_path / "b")
    refused(tmp_path / "b", "tensors of float8_e5m2 and uint16 in one storage")


# --- float8

FLOAT8 = ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"]


@pytest.mark.parametrize("name", FLOAT8)
def test_float8(tmp_path, name):
    """All 256 bytes, from files of torch and of safetensors, and from tensors."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    expected = np.arange(256, dtype=np.uint8).view(getattr(ml_dtypes, name))
    tensors = {"w": torch.arange(256, dtype=torch.uint8).view(getattr(torch, name)).reshape(16, 16)}
    torch.save(tensors, tmp_path / "a.pth")
    assert same_bits(read(tmp_path / "a.pth")["w"], expected.reshape(16, 16))
    assert same_bits(checkpoint.as_array(tensors["w"]), expected.reshape(16, 16))
    try:
        save_file(tensors, tmp_path / "a.safetensors")
    except (KeyError, TypeError, ValueError):  # safetensors doesn't write each of them
        return
    assert same_bits(read(tmp_path / "a.safetensors")["w"], expected.reshape(16, 16))


def test_dtypes_that_are_refused_by_name(tmp_path):
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = {
            "tensor of torch.complex32": torch.zeros(2, dtype=torch.complex32),
            "qtensor": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
            "sparse tensor": torch.eye(3).to_sparse(),
            "meta tensor no storage": torch.zeros(3, device="meta"),
        }
    for name, value in values.items():
        torch.save({"a": torch.ones(1), "w": value}, tmp_path / "a")
        refused(tmp_path / "a", f"holds w, a {name}, which numpy has no counterpart for")
    header = b'{"w":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'
    (tmp_path / "b").write_bytes(len(header).to_bytes(8, "little") + header + b"\x00")
    refused(tmp_path / "b", "has a tensor w of dtype F4, which flaxdet doesn't read")


# --- safetensors


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"a": ["F32", [2], [0, 8]], "b": ["F32", [2], [4, 12]]}, "b of F32 .* is said to be at the bytes 4 to 12"),
        ({"a": ["F32", [2], [4, 12]]}, "is said to be at the bytes 4 to 12"),
        ({"a": ["F32", [3], [0, 8]]}, "is said to be at the bytes 0 to 8"),
        ({"a": ["F32", [2], [0, 8]]}, "its tensors end at byte"),
        ({"a": ["F32", [2**40, 2**40], [0, 12]]}, "is said to be at"),
        ({"a": ["F32", [-1], [0, 12]]}, r"a.shape\[0\] should be an integer"),
        ({"a": ["F32", [1.5], [0, 12]]}, r"a.shape\[0\] should be an integer"),
        ({"a": ["F32", [3], [0]]}, "data_offsets should be a list"),
        ({"a": ["F32", [1] * 65, [0, 12]]}, "a.shape should be a list"),
        ({"a": [3, [3], [0, 12]]}, "a.dtype should be a text"),
    ],
)
def test_safetensors_headers(tmp_path, entries, expected):
    header = {
        name: dict(zip(("dtype", "shape", "data_offsets"), entry, strict=True)) for name, entry in entries.items()
    }
    text = json.dumps(header).encode()
    (tmp_path / "a").write_bytes(len(text).to_bytes(8, "little") + text + bytes(12))
    refused(tmp_path / "a", f"is damaged: .*{expected}")


def test_safetensors_as_the_library_reads_it(tmp_path):
    arrays = {
        "f": np.arange(6, dtype=np.float32).reshape(2, 3),
        "scalar": np.array(2.5),
        "empty": np.zeros((0, 4), np.int64),
        "b": np.array([True, False]),
        "c": np.array([1 + 2j], np.complex64),
        "u": np.array([2**40], np.uint64),
    }
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file(arrays, path, {"k": "v"})
    expected = safetensors.numpy.load_file(path)
    found = read(path)
    assert found.keys() == expected.keys()
    assert all(same_bits(found[name], array) for name, array in expected.items())
    assert all(array.flags.writeable and array.flags.aligned for array in found.values())


# --- torch's format of before 1.6


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (b"\x80\x02}N" + b"\x85" * 10**5 + b"K\x01s.", "a tuple as the key of a dict"),
        (b"\x80\x02}Nq\x00" + b"h\x00\x86q\x00" * 100 + b"K\x01s.", "a tuple as the key of a dict"),
        (b"\x80\x02" + b"N" + b"\x85" * 400 + b".", "nests containers"),
        (b"V1\n.", "instruction UNICODE"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} bytes",
)
def test_legacy_files_have_the_limits_too(tmp_path, program, expected):
    """torch's own unpickler, which reads these files, has none: it isn't reached."""
    content = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    (tmp_path / "a.pth").write_bytes(content + program)
    assert refused(tmp_path / "a.pth", expected) < 2


def test_legacy_sizes(tmp_path):
    torch = pytest.importorskip("torch")
    state = {"w": torch.zeros(1).expand(10**6, 10**3), "b": torch.ones(1)}
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    refused(tmp_path / "a.pth", "need more memory than the file's")
    torch.save(state, tmp_path / "b.pth")
    refused(tmp_path / "b.pth", r"at w, of shape \[1000000, 1000\] and strides \[0, 0\]: save tensor.contiguous\(\)")


@pytest.mark.parametrize("write", [checkpoint.write_pth, checkpoint.write_safetensors])
def test_float8_is_written_or_refused_by_name(tmp_path, write):
    for name in FLOAT8:
        array = np.arange(4, dtype=np.uint8).view(getattr(ml_dtypes, name))
        try:
            write(tmp_path / "a", {"w": array})
        except CheckpointError as error:
            assert name in str(error), error  # noqa: PT017
        else:
            assert same_bits(read(tmp_path / "a")["w"], array)
