"""Damaged and hostile checkpoints: each is read, or refused by ``CheckpointError``, in time and space."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from flaxdet.convert import CheckpointError, read
from flaxdet.files import checkpoint, torch_pickle
from tests.files.handmade import Evil, tensor
from tests.fuzz import cases

ARRAYS = {
    "model.backbone.body.conv1.weight": np.ones((4, 3, 2, 2), np.float32),
    "model.bn.bias": np.zeros(2, np.float16),
    "n_averaged": np.array(3),
    "flags": np.array([True, False]),
    "z": np.array([1 + 2j], np.complex64),
}
KEYS = [None, "model", "model_ema", "state_dict", "teacher", "a.b", "", ".", "model.backbone"]


def zipped(program: bytes, records: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x/data.pkl", program)
        for name, data in {"byteorder": b"little", "version": b"3\n", **records}.items():
            archive.writestr(f"x/{name}", data)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> list[bytes]:
    """Whole files of both formats, of ours and of torch if it is there."""
    folder = tmp_path_factory.mktemp("originals")
    checkpoint.write_pth(folder / "a", ARRAYS)
    checkpoint.write_safetensors(folder / "b", ARRAYS, {"flaxdet": "{}"})
    evil = {"model": {}, "args": Evil(os.system, "true"), "list": [Evil(eval, "1")], "history": [(1, 2.5)] * 9}
    for protocol in (2, 3, 4, 5):
        (folder / f"e{protocol}").write_bytes(zipped(pickle.dumps(evil, protocol), {}))
    try:
        import torch
    except ImportError:
        torch = None
    if torch is not None:
        base = torch.arange(24.0).reshape(2, 3, 4)
        state = OrderedDict(
            w=base,
            t=base.permute(2, 0, 1),
            e=base[:, :1].expand(2, 5, 4),
            p=torch.nn.Parameter(torch.ones(2).bfloat16()),
            f=torch.tensor([1.5]).to(torch.float8_e4m3fn),
            c=torch.tensor([1 + 2j]).conj(),
            b=torch.tensor([True]),
        )
        whole = {"state_dict": state, "optimizer": {"state": {0: {"m": base}}}, "args": argparse.Namespace(x={1})}
        for protocol in (2, 4):
            torch.save(whole, folder / f"t{protocol}", pickle_protocol=protocol)
        torch.save(torch.nn.Linear(2, 2), folder / "module")
        del state["f"]
        torch.save(whole, folder / "legacy", _use_new_zipfile_serialization=False)
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def test_damaged_files(originals, tmp_path):
    """Bytes of whole files."""
    path = tmp_path / "file"

    def case(rng):
        path.write_bytes(cases.damaged(rng, originals[rng.integers(len(originals))]))
        read(path, key=KEYS[rng.integers(len(KEYS))] if rng.random() < 0.3 else None)

    cases.run(400, case, CheckpointError)


def test_damaged_programs(originals, tmp_path):
    """Bytes of the pickle, where no checksum tells."""
    archives = []
    for content in originals:
        if content[:2] == b"PK":
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                records = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
            archives.append((records.pop("data.pkl"), records))
    path = tmp_path / "file"

    def case(rng):
        program, records = archives[rng.integers(len(archives))]
        if rng.random() < 0.2:
            records = {**records, "byteorder": [b"big", b"", b"little\n", b"middle", b"x" * 999][rng.integers(5)]}
        path.write_bytes(zipped(cases.damaged(rng, program), records))
        read(path)

    cases.run(400, case, CheckpointError)


# --- programs made of instructions

STRING = b"X\x01\x00\x00\x00a"
NAMES = [
    b"ccollections\nOrderedDict\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch._utils\n_rebuild_tensor_v3\n",
    b"ctorch._utils\n_rebuild_parameter\n",
    b"ctorch._tensor\n_rebuild_from_type_v2\n",
    b"ctorch\nSize\n",
    b"ctorch\nFloatStorage\n",
    b"ctorch\nfloat8_e5m2\n",
    b"cos\nsystem\n",
    b"cbuiltins\neval\n",
    b"cbuiltins\nset\n",
]
PUSHES = [
    b"N",
    b"\x88",
    b"K\x01",
    b"M\xff\xff",
    b"J\xff\xff\xff\x7f",
    b"G" + bytes(8),
    STRING,
    b"]",
    b"}",
    b")",
    b"C\x01a",
]
PUSHES += [b"\x8a\xff" + b"\x7f" * 255, b"\x8b\xff\xff\x00\x00" + b"\x7f" * 0xFFFF, b"\x8f", tensor()]
OTHERS = [b"(", b"t", b"\x85", b"\x86", b"\x87", b"a", b"e", b"s", b"u", b"R", b"\x81", b"\x92", b"b", b"Q", b"0", b"1"]
OTHERS += [b"\x94", b"q\x01", b"h\x01", b"h\x00", b"j\x05\x00\x00\x00", b"r\xff\xff\xff\xff", b"\x90", b"\x91", b"\x93"]
OTHERS += [b"V1\n", b"I1\n", b"L1\n", b"S'a'\n", b"F1\n", b"d", b"l", b"p1\n", b"g1\n", b"o", b"ios\nsystem\n", b"P1\n"]
OTHERS += [
    b"\x82\x01",
    b"\x97",
    b"\x98",
    b"2",
    b"\x95" + b"\xff" * 8,
    b"\x96" + b"\xff" * 7 + b"\x7f",
    b"\x8e" + b"\xff" * 8,
]
OTHERS += [
    b"\x95" + bytes(8),
    b"\x96" + (2**36).to_bytes(8, "little"),
    b"B\xff\xff\xff\xff",
    b"X\xff\xff\xff\xff",
    b"\x80\x05",
]


def program(rng) -> bytes:
    """Random instructions, or one of the patterns that grow by repetition."""
    kind, many = rng.integers(12), int(rng.choice([10, 400, 30_000]))
    leaf = PUSHES[rng.integers(len(PUSHES))]
    if kind == 0:  # nested tuples, used as a key
        return b"}" + leaf + b"\x85" * many + b"K\x01s."
    if kind == 1:  # tuples of the same tuple twice: 2^many leaves
        return b"}" + leaf + b"q\x00h\x00\x86" * min(many, 5000) + b"K\x01s."
    if kind == 2:
        return STRING + leaf + [b"(", b"]", b"}", b"\x8f"][rng.integers(4)] * many + b"t" * many + b"."
    if kind == 3:  # a long list, copied by each call
        call = [b"ctorch\nSize\n", b"cos\nsystem\n", b"ccollections\nOrderedDict\n"][rng.integers(3)]
        return b"](" + b"K\x01" * many + b"eq\x00\x85q\x01" + (call + b"h\x01R0") * min(many, 5000) + b"}."
    if kind == 4:  # a state_dict of many views of one storage
        names = b"".join(b"X\x04\x00\x00\x00%04d" % i + tensor() for i in range(min(many, 400)))
        return b"}(" + names + b"u."
    if kind == 5:  # a deep list of lists, a dict of dicts
        return (
            b"]" * many + b"a" * (many - 1) if rng.random() < 0.5 else (b"}" + STRING) * many + b"N" + b"s" * many
        ) + b"."
    if kind == 6:  # many names
        return b"".join(b"ca%d\nb\n0" % i for i in range(min(many, 5000))) + b"}."
    body = b""
    for _ in range(rng.integers(3, 40)):
        which = rng.random()
        if which < 0.45:
            body += PUSHES[rng.integers(len(PUSHES))]
        elif which < 0.6:
            body += NAMES[rng.integers(len(NAMES))]
        elif which < 0.7:
            body += b"X\x01\x00\x00\x00w" + tensor(
                numel=int(rng.choice([4, 5, 0, -1])), offset=int(rng.integers(-1, 3))
            )
        else:
            body += OTHERS[rng.integers(len(OTHERS))]
    return (b"}(" + body + b"u." if rng.random() < 0.6 else body) + b"."


def test_programs(tmp_path):
    path = tmp_path / "file"

    def case(rng):
        protocol = bytes([0x80, int(rng.choice([2, 2, 2, 3, 4, 5, 0, 9]))])
        path.write_bytes(zipped(protocol + program(rng), {"data/0": bytes(16)}))
        read(path)

    cases.run(400, case, CheckpointError)


def test_tensors(tmp_path):
    """Shapes, strides, offsets and dtypes that don't fit the storage, or take more memory than the file has."""
    path = tmp_path / "file"
    kinds = ["FloatStorage"] * 8 + [
        "DoubleStorage",
        "BoolStorage",
        "UntypedStorage",
        "QInt8Storage",
        "ComplexFloatStorage",
    ]

    def number(rng) -> bytes:
        sizes = [0, 1, 2, 3, 4, 16, 1000, 10**6, 2**31, 2**62, 2**63, 2**64, 10**40, -1, -(2**40)]
        content = pickle.encode_long(int(sizes[rng.integers(len(sizes) if rng.random() < 0.02 else 5)]))
        return b"\x8a" + bytes([len(content)]) + content

    def case(rng):
        body = b""
        for i in range(rng.integers(1, 5)):
            kind = kinds[rng.integers(len(kinds))]
            dims = int(rng.choice([0, 1, 2, 3, 70], p=[0.2, 0.4, 0.2, 0.19, 0.01]))
            shape, strides = (b"(" + b"".join(number(rng) for _ in range(dims)) + b"t" for _ in range(2))
            storage = b"(X\x07\x00\x00\x00storagectorch\n%b\nX\x01\x00\x00\x00%dX\x03\x00\x00\x00cpu%btQ" % (
                kind.encode(),
                i if rng.random() < 0.8 else 0,
                b"K\x04" if rng.random() < 0.7 else number(rng),
            )
            bits = [b"}X\x03\x00\x00\x00neg\x88s", b"}X\x04\x00\x00\x00conj\x88s", b"}X\x01\x00\x00\x00xNs"]
            bits = bits[rng.integers(3)] if rng.random() < 0.2 else b""
            offset = number(rng) if rng.random() < 0.5 else b"K\x00"
            call = (
                b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + shape + strides + b"\x89}" + bits + b"tR"
            )
            body += b"X\x01\x00\x00\x00%d" % i + call
        records = {"data/0": bytes(16), "data/1": bytes(16), "data/2": bytes(16), "data/3": bytes(15)}
        records["byteorder"] = [b"little", b"big"][rng.integers(2)]
        path.write_bytes(zipped(b"\x80\x02}(" + body + b"u.", records))
        read(path)

    cases.run(400, case, CheckpointError)


def test_safetensors(tmp_path):
    """The header, as JSON and as bytes."""
    path = tmp_path / "file"
    arrays = {**ARRAYS, "empty": np.zeros((0, 3), np.float32)}
    content = safetensors.numpy.save(arrays, {"flaxdet": '{"builder": null}'})
    length = int.from_bytes(content[:8], "little")
    header, elements = json.loads(content[8 : 8 + length]), content[8 + length :]

    def case(rng):
        made = header
        for _ in range(rng.integers(1, 3)):
            made = cases.mutated(rng, made)
        text = cases.to_json(rng, made).encode("utf-8", errors="surrogatepass")
        size = len(text) if rng.random() < 0.95 else int(rng.choice([0, 2**31, 2**63 - 1]))
        path.write_bytes(
            size.to_bytes(8, "little") + text + (elements if rng.random() < 0.9 else cases.damaged(rng, elements))
        )
        read(path)
        checkpoint.read_metadata(path)

    cases.run(400, case, CheckpointError)


def test_contents(tmp_path):
    """Dicts in dicts, with and without tensors, objects in place of tensors, and names of state_dicts to choose."""
    names = [
        "model",
        "state_dict",
        "model_ema",
        "module.a",
        "model.b",
        "n_averaged",
        "_orig_mod.c",
        "a.b.c",
        "",
        ".",
        "teacher",
    ]
    names += ["net.module.d", "model._fsdp_wrapped_module.e", "..", "x" * 3000, "\x1b[0m", "module.", "\n"]
    leaves = [torch_pickle.Placeholder(), 3, "text", None, [1], np.ones(2), np.ones(()), np.ones((0, 2))]

    def made(rng, depth):
        if depth == 0 or rng.random() < 0.4:
            return leaves[rng.integers(len(leaves))]
        found = {names[rng.integers(len(names))]: made(rng, depth - 1) for _ in range(rng.integers(6))}
        if rng.random() < 0.05:
            found[3] = 1
        if rng.random() < 0.05:
            found["model"] = found  # a cycle
        return found

    def case(rng):
        root = made(rng, 4)
        key = [None, *names][rng.integers(len(names) + 1)]
        try:
            checkpoint.unwrap(root, key=key)
        except ValueError as error:
            raise checkpoint.error_of(tmp_path / "file", error) from None

    cases.run(400, case, CheckpointError)


def test_special_files(tmp_path):
    """No device or pipe is read, whatever leads there."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for path in (
        tmp_path / "pipe",
        tmp_path / "link",
        tmp_path / "zero",
        Path("/dev/zero"),
        Path("/dev/null"),
        tmp_path,
    ):
        with pytest.raises(CheckpointError, match="cannot be read"):
            read(path)
        assert checkpoint.read_metadata(path) == {}
