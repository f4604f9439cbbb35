"""Hostile files: no code runs, nothing foreign is imported, every error is one line."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

from flaxdet.convert import CheckpointError, read
from flaxdet.files import torch_pickle
from tests.files.handmade import Evil, tensor, tensor_program, zip_file


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
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
    if protocol:
        assert read(path)["w"].tolist() == [0, 1, 2, 3]
    else:
        with pytest.raises(CheckpointError, match="in a way that torch does not write"):
            read(path)
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
