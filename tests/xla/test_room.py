"""What depends on the machine is in one folder."""

from __future__ import annotations

import re
from pathlib import Path

import flaxdet

FOLDER = Path(flaxdet.__file__).parent
MACHINE = re.compile(r"default_backend|platform_dependent|optimization_barrier")


def test_only_xla_asks_what_the_machine_is():
    files = {*FOLDER.rglob("*.py"), *FOLDER.parent.joinpath("convert").glob("*.py")}
    naming = {file for file in files if MACHINE.search(file.read_text(encoding="utf-8"))}
    assert len(files) > 100
    assert {file.relative_to(FOLDER).parts[0] for file in naming} == {"xla"}
