"""What a compiled program does: its kernels, loops, sorts, sums, arithmetic and traffic, from the HLO text of XLA.

The text is ``compiled.as_text()``. Each top-level instruction of the entry computation, of a loop's body and of a
called computation is a kernel, unless it only names or groups values. Numbers are of one call of the program; a loop
whose number of turns XLA doesn't know counts one turn.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from hlo_text import Instruction, arrays, parse, size_in_bytes

# they compute nothing: names, groups and views; nor do the ends of asynchronous operations
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency", "opt-barrier"}
_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_READS_A_PART = {"slice", "dynamic-slice", "gather"}
_WRITES_A_PART = {"dynamic-update-slice": 1, "scatter": 2}  # and which operand holds the part


@dataclass(frozen=True)
class Kernel:
    """One launch.

    Attributes:
        kind: "convolution", "product", "sort", "copy", "loop", another custom call's target, "fusion", ...
        path: jax's op_name.
        flop: multiplications and additions of convolutions and products.
        bytes: read and written.
        dtype: of the product's inputs, or of the result.
        passes: launches it takes; more than one for a long sort.
        turns: how often it runs in a call.
    """

    kind: str
    path: str
    flop: float
    bytes: float
    dtype: str
    passes: int
    turns: int


@dataclass(frozen=True)
class Loop:
    """A while loop.

    Attributes:
        path: jax's op_name.
        turns: None where XLA doesn't know.
        kernels: launches a turn, those of loops within it apart.
        depth: how many loops are around it.
    """

    path: str
    turns: int | None
    kernels: int
    depth: int


@dataclass
class Program:
    """A compiled program, taken apart; ``read`` makes it.

    Attributes:
        kernels: all, in order.
        loops: all, the outer ones first.
        sorts: {"dtype", "rows", "length", "launches", "path"} of each.
        convolutions: by dtype of the inputs.
        products: the same of matrix products.
        sums: reductions that add, by dtype of the sum.
        custom_calls: by target.
        callbacks: targets of custom calls that return to Python.
        collectives: {"kind", "bytes", "path"} of each exchange between devices; bytes of the result on one device.
    """

    kernels: list[Kernel] = field(default_factory=list)
    loops: list[Loop] = field(default_factory=list)
    sorts: list[dict[str, Any]] = field(default_factory=list)
    convolutions: Counter[str] = field(default_factory=Counter)
    products: Counter[str] = field(default_factory=Counter)
    sums: Counter[str] = field(default_factory=Counter)
    custom_calls: Counter[str] = field(default_factory=Counter)
    callbacks: list[str] = field(default_factory=list)
    collectives: list[dict[str, Any]] = field(default_factory=list)


def read(text: str, launches: Counter[str] | None = None) -> Program:
    """Takes a compiled program apart.

    Args:
        text: HLO, after optimisation.
        launches: of each instruction that takes more than one, by name (XLA:GPU's list of kernels); default one each.
    """
    return _Reader(text, launches or Counter()).program


class _Reader:
    def __init__(self, text: str, launches: Counter[str]):
        self.launches = launches
        self.computations, entry = parse(text)
        self.program = Program()
        self._walk(entry, turns=1, depth=0)
        for instructions in self.computations.values():
            for value in instructions.values():
                self._note(value, instructions)

    def _walk(self, computation: str, turns: int, depth: int) -> int:
        """Notes the kernels of a computation; how many launches one run of it takes, loops apart."""
        count = 0
        instructions = self.computations[computation]
        for value in instructions.values():
            if value.opcode == "while":
                known = re.search(r'"known_trip_count":\{"n":"(\d+)"', value.attributes)
                found = int(known[1]) if known else None
                at = len(self.program.loops)
                inner = sum(
                    self._walk(name, turns * (1 if found is None else found), depth + 1)
                    for name in value.called("body", "condition")
                )
                self.program.loops.insert(at, Loop(value.path, found, inner, depth))
            elif value.opcode in ("call", "conditional", "async-start"):
                branches = re.search(r"branch_computations=\{([^}]*)\}", value.attributes)
                names = re.findall(r"%?([\w.\-]+)", branches[1]) if branches else []
                names += value.called("to_apply", "calls", "true_computation", "false_computation")
                count += sum(self._walk(name, turns, depth) for name in names)
            elif value.opcode not in _FREE and not value.opcode.endswith("-done"):
                kernel = self._kernel(value, instructions, turns)
                count += kernel.passes
                self.program.kernels.append(kernel)
        return count

    def _kernel(self, value: Instruction, instructions: dict[str, Instruction], turns: int) -> Kernel:
        kind, passes, dtype = value.opcode, 1, (arrays(value.shape) or [("", ())])[0][0]
        flop = 0.0
        for inner, around in self._inside(value, instructions):
            if _is_convolution(inner) or _is_product(inner):
                kind = "convolution" if _is_convolution(inner) else "product"
                flop += _flop(inner, around)
                dtype = _input_dtype(inner, around)
            elif inner.opcode == "sort":
                kind, passes = "sort", self._passes(inner)
        if kind == "custom-call":
            kind = value.target
        moved = self._traffic(value, instructions) * passes
        return Kernel(kind, value.path, flop, moved, dtype, passes, turns)

    def _passes(self, sort: Instruction) -> int:
        return max(1, self.launches[re.sub(r"\W", "_", sort.name)])

    def _inside(
        self, value: Instruction, instructions: dict[str, Instruction]
    ) -> Iterator[tuple[Instruction, dict[str, Instruction]]]:
        """What a kernel computes: itself, or the instructions of its fused computation."""
        if value.opcode != "fusion":
            yield value, instructions
            return
        for name in value.called("calls"):
            around = self.computations[name]
            for inner in around.values():
                yield from self._inside(inner, around)

    def _traffic(self, value: Instruction, instructions: dict[str, Instruction]) -> float:
        """Bytes that a kernel reads and writes; where it touches a part of an array alone, that part."""
        written = size_in_bytes(value.shape)
        read = [size_in_bytes(instructions[name].shape) if name in instructions else 0 for name in value.operands]
        if value.opcode == "custom-call":
            written -= sum(size for size in map(size_in_bytes, re.findall(r"[us]8\[\d+\]", value.shape)))  # workspace
        if value.opcode in _READS_A_PART:
            return 2 * written
        if value.opcode != "fusion":
            return written + sum(read)
        (name,) = value.called("calls")
        inner = self.computations[name]
        users: dict[str, list[Instruction]] = {}
        for one in inner.values():
            for operand in one.operands:
                users.setdefault(operand, []).append(one)
        for parameter in inner.values():
            if parameter.opcode != "parameter":
                continue
            number, readers = int(parameter.operands[0]), _through_views(parameter, users)
            if readers and all(one.opcode in _READS_A_PART for one in readers):
                ((_, dims), *_) = arrays(parameter.shape)
                size = size_in_bytes(parameter.shape) // max(math.prod(dims), 1)  # of an element
                elements = sum(math.prod(dims) for one in readers for _, dims in arrays(one.shape))
                read[number] = min(read[number], size * elements)
            elif len(readers) == 1 and readers[0].is_root and readers[0].opcode in _WRITES_A_PART:
                update = readers[0]
                if _source(update.operands[0], inner) is not parameter:
                    continue
                written = size_in_bytes(inner[update.operands[_WRITES_A_PART[update.opcode]]].shape)
                read[number] = written if update.opcode == "scatter" else 0  # which adds to what is there
        return written + sum(read)

    def _note(self, value: Instruction, instructions: dict[str, Instruction]) -> None:
        """Counts what is of interest wherever it is: also within fusions."""
        program = self.program
        if value.opcode == "sort":
            ((dtype, dims), *_) = arrays(value.shape)
            along = int((re.search(r"dimensions=\{(\d+)\}", value.attributes) or ["", "0"])[1])
            length = dims[along] if dims else 1
            rows = math.prod(dims) // max(length, 1)
            program.sorts.append(
                {"dtype": dtype, "rows": rows, "length": length, "launches": self._passes(value), "path": value.path}
            )
        elif _is_convolution(value):
            program.convolutions[_input_dtype(value, instructions)] += 1
        elif _is_product(value):
            program.products[_input_dtype(value, instructions)] += 1
        elif value.opcode == "reduce":
            for name in value.called("to_apply"):
                if any(one.opcode == "add" for one in self.computations.get(name, {}).values()):
                    program.sums[arrays(value.shape)[0][0]] += 1
        kind = value.opcode.removesuffix("-start")
        if kind in _COLLECTIVES:
            program.collectives.append({"kind": kind, "bytes": size_in_bytes(value.shape), "path": value.path})
        if value.opcode == "custom-call":
            program.custom_calls[value.target] += 1
            if "callback" in value.target:
                program.callbacks.append(value.target)


def _source(name: str, instructions: dict[str, Instruction]) -> Instruction:
    value = instructions[name]
    return _source(value.operands[0], instructions) if value.opcode == "bitcast" else value


def _through_views(value: Instruction, users: dict[str, list[Instruction]]) -> list[Instruction]:
    """The instructions of a fusion that read a value, directly or after a change of shape or dtype.

    A fusion converts only the elements that these instructions read.
    """
    found: list[Instruction] = []
    for one in users.get(value.name, []):
        found += _through_views(one, users) if one.opcode in {"bitcast", "convert"} else [one]
    return found


def _is_convolution(value: Instruction) -> bool:
    return value.opcode == "convolution" or (value.opcode == "custom-call" and "$conv" in value.target)


def _is_product(value: Instruction) -> bool:
    return value.opcode == "dot" or (
        value.opcode == "custom-call" and any(word in value.target for word in ("matmul", "gemm"))
    )


def _input_dtype(value: Instruction, instructions: dict[str, Instruction]) -> str:
    first = instructions.get(value.operands[0]) if value.operands else None
    return arrays(first.shape)[0][0] if first and arrays(first.shape) else ""


def _flop(value: Instruction, instructions: dict[str, Instruction]) -> float:
    """Multiplications and additions of a convolution or a product."""
    shapes = [arrays(instructions[name].shape) if name in instructions else [] for name in value.operands[:2]]
    if len(shapes) < 2 or not all(shapes):
        return 0.0
    lhs, rhs = shapes[0][0][1], shapes[1][0][1]
    out = arrays(value.shape)[0][1]
    if _is_product(value):
        found = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([^\]}]*)', value.attributes)
        dims = [int(one) for one in re.findall(r"\d+", found[1])] if found else []
        return 2.0 * math.prod(out) * math.prod(lhs[i] for i in dims)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", value.attributes)
    if labels is None:
        return 0.0
    if "BackwardFilter" in value.target:  # rhs: cotangent; out: kernel
        return 2.0 * math.prod(rhs) * math.prod(out) / max(rhs[labels[1].index("f")], 1)
    kernel = math.prod(side for side, label in zip(rhs, labels[2], strict=True) if label.isdigit())
    channels = rhs[labels[2].index("i")]
    return 2.0 * math.prod(lhs if "BackwardInput" in value.target else out) * kernel * channels
