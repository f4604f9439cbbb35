"""The HLO text of XLA, as instructions by computation."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64", "c64"), 8),
}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+[0-9]\w*|pred)\[([0-9,]*)\]")


@dataclass(frozen=True)
class Instruction:
    """One line of HLO.

    Attributes:
        name: of the value.
        shape: as printed; a tuple's in parentheses.
        opcode: "fusion", "sort", ...
        operands: names of values; of a parameter, its number.
        attributes: the rest of the line.
        is_root: whether it is the result of its computation.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def path(self) -> str:
        """Where in the model it comes from: jax's op_name."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def target(self) -> str:
        """Of a custom call, what it calls."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, *attributes: str) -> list[str]:
        """The computations named by attributes such as "calls" or "body"."""
        names = "|".join(attributes)
        return re.findall(rf"\b(?:{names})=%?([\w.\-]+)", self.attributes)


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, dimensions) of a shape's arrays."""
    return [(dtype, tuple(map(int, filter(None, dims.split(","))))) for dtype, dims in _ARRAY.findall(shape)]


def size_in_bytes(shape: str) -> int:
    """Of all arrays of a shape; unknown dtypes, such as tokens, count nothing."""
    return sum(_BYTES.get(dtype, 0) * math.prod(dims) for dtype, dims in arrays(shape))


def _parse_line(name: str, rest: str, is_root: bool) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, call = rest[:end], rest[end:].lstrip()
    start = call.index("(")
    end = _closing(call, start)
    opcode, inside = call[:start], call[start + 1 : end]
    operands = (inside,) if opcode == "parameter" else tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, shape, opcode, operands, call[end + 1 :], is_root)


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"a parenthesis is not closed in {text[:200]!r}")


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Takes a module's text apart.

    Args:
        text: ``compiled.as_text()``.

    Returns:
        The instructions of each computation, both by name, and the name of the entry computation.

    Raises:
        ValueError: if the text holds no entry computation.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry = current = None
    for line in text.splitlines():
        if (head := _HEAD.match(line)) and not line.startswith(" "):
            current = head[2]
            computations[current] = {}
            entry = current if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current and (found := _LINE.match(line)):
            value = _parse_line(found[1], found[2], line.lstrip().startswith("ROOT "))
            computations[current][value.name] = value
    if entry is None:
        raise ValueError("the text holds no ENTRY computation: expected compiled.as_text()")
    return computations, entry
