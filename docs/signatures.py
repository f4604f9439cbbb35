"""What mkdocstrings needs to know of flaxdet's style.

- Flax modules and ``flax.struct`` dataclasses take the annotated fields of their bodies, which no decorator of Python's
  tells: their signatures are made here.
- A docstring may describe several names in one line ("min_size, max_size: ..."); here each gets a line of its own.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_MODULES = {"nn.Module", "TypedModule", "Detector"}
_SEVERAL = re.compile(r"( +)(\w+(?:, \w+)+): ")


class Style(griffe.Extension):
    """Prepares objects when griffe has read them."""

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Gives a module or struct the parameters of the constructor that Flax makes for it."""
        is_module = any(str(base) in _MODULES for base in cls.bases)
        is_struct = any(str(decorator.value) == "struct.dataclass" for decorator in cls.decorators)
        if not (is_module or is_struct) or "__init__" in cls.members:
            return
        kind = griffe.ParameterKind.positional_or_keyword
        parameters = [griffe.Parameter("self", kind=kind)]
        for name, member in cls.members.items():
            if member.is_attribute and member.annotation is not None and "property" not in member.labels:
                parameters.append(griffe.Parameter(name, annotation=member.annotation, kind=kind, default=member.value))
        init = griffe.Function("__init__", parameters=griffe.Parameters(*parameters), parent=cls, runtime=False)
        cls.set_member("__init__", init)

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Divides lines that describe several names."""
        if obj.docstring is None:
            return
        lines, divided = obj.docstring.value.splitlines(), []
        while lines:
            line = lines.pop(0)
            found = _SEVERAL.match(line)
            if found is None or not found[2][0].islower():  # exceptions may stand together
                divided.append(line)
                continue
            indent, rest = found[1], [line[found.end() :]]
            while lines and lines[0].startswith(f"{indent} "):
                rest.append(lines.pop(0))
            for name in found[2].split(", "):
                divided += [f"{indent}{name}: {rest[0]}", *rest[1:]]
        obj.docstring.value = "\n".join(divided)
