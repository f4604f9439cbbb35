"""Lints what is public: annotations, and docstrings that state arguments, shapes, units, errors and sources.

Parameters are documented in their order, arrays with their axes, boxes with their layout and unit; what a function
raises itself is named; an operator of ``flaxdet.ops`` names what it reproduces.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import enum
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import numpy as np
import pytest
from jax import Array
from jaxtyping import Float

from flaxdet.models.detector import GEOMETRY, Detector

MODULES = ["flaxdet", *(f"flaxdet.{name}" for name in ("ops", "nn", "models", "train", "data", "convert"))]
SECTIONS = ["Args", "Attributes", "Returns", "Yields", "Raises"]
ENTRY = re.compile(r"^    ((?:\*{0,2}[\w.]+(?:, )?)+): ", re.MULTILINE)
BOXES = re.compile(r"^(?!max_|num_)(\w+_)?(boxes\d?|anchors|rois)$")
LAYOUT, UNIT = re.compile(r"xyxy|cxcywh|fmt|offsets"), re.compile(r"pixel|unit")
SHAPE = re.compile(r"\[\w|\[\.\.\.|\bshapes?\b|\bscalars?\b|as for ")
JAXTYPING = re.compile(r"\b(Float|Int|UInt8|Bool|Num)\[[\w.]+, [^\]]*\]")
MADE_BY = re.compile(r"``\w+`` (makes?|builds?) it")
SOURCE = re.compile(r"torch|arXiv")


def exported() -> Iterator[tuple[str, Any]]:
    """(name, object) of all that the public modules promise, each once."""
    seen = set()
    for module in map(importlib.import_module, MODULES):
        for name in module.__all__:
            value = getattr(module, name)
            if id(value) not in seen and (inspect.isfunction(value) or inspect.isclass(value)):
                seen.add(id(value))
                yield f"{module.__name__}.{name}", value


def methods(cls: type) -> Iterator[tuple[str, Callable[..., Any], bool]]:
    """(name, function, is a property) of a class's public methods, those of our own base classes included."""
    for base in cls.__mro__:
        for name, value in vars(base).items():
            function = value.fget if isinstance(value, property) else inspect.unwrap(getattr(value, "__func__", value))
            public = name == "__call__" or not name.startswith("_")
            if public and inspect.isfunction(function) and function.__module__.startswith("flaxdet"):
                yield name, function, isinstance(value, property)


EXPORTED = dict(exported())
FUNCTIONS = {name: value for name, value in EXPORTED.items() if inspect.isfunction(value)}
CLASSES = {name: value for name, value in EXPORTED.items() if inspect.isclass(value)}
METHODS = {  # by function, so that what a base class defines is looked at once
    function: (f"{name}.{method}", is_property)
    for name, cls in reversed(CLASSES.items())
    for method, function, is_property in methods(cls)
}


def sections(thing: Any) -> dict[str, str]:
    """The parts of a docstring by name, what comes before them under ""."""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):\n", inspect.getdoc(thing) or "", flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def entries(text: str) -> dict[str, str]:
    """name: what is said of it; "a, b: ..." speaks of both."""
    parts = ENTRY.split(text)
    return {name: said for names, said in zip(parts[1::2], parts[2::2], strict=True) for name in names.split(", ")}


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    found = [p for p in inspect.signature(function).parameters.values() if p.name not in ("self", "cls")]
    stars = {inspect.Parameter.VAR_KEYWORD: "**", inspect.Parameter.VAR_POSITIONAL: "*"}
    return {stars.get(p.kind, "") + p.name: p for p in found}


def is_bare_array(annotation: Any) -> bool:
    """Of an array, and without jaxtyping's axes."""
    text = str(annotation)
    return re.search(r"\b(Array|ndarray|ArrayLike)\b", JAXTYPING.sub("", text)) is not None


def find(name: str, scope: dict[str, Any]) -> Any:
    """What a docstring or a raise statement calls ``name``; None if there is no such thing."""
    *path, last = name.split(".")
    if not path:
        return scope.get(last, vars(builtins).get(last))
    try:
        return getattr(importlib.import_module(".".join(path)), last)
    except (ImportError, AttributeError):
        return None


def raised(function: Callable[..., Any]) -> set[str]:
    """Names of the exceptions that stand in raise statements of the function itself."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    raises = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None]
    return {ast.unparse(exc.func if isinstance(exc, ast.Call) else exc) for exc in raises}


def faults_of_function(function: Callable[..., Any], *, terse: bool = False, source: bool = False) -> list[str]:
    """All that is wrong; ``terse`` lets a first sentence stand for the result."""
    text, found, scope = inspect.getdoc(function) or "", sections(function), vars(inspect.getmodule(function))
    if not text:
        return ["has no docstring"]
    faults = []
    if list(found)[1:] != [name for name in SECTIONS if name in found]:
        faults.append(f"has sections {list(found)[1:]}")
    promised, documented = parameters(function), entries(found.get("Args", ""))
    if list(documented) != list(promised):
        faults.append(f"documents {list(documented)}, takes {list(promised)}")
    returns = inspect.signature(function).return_annotation
    for name, annotation in [(name, p.annotation) for name, p in promised.items()] + [("return", returns)]:
        said = found.get("Returns", found.get("Yields", found[""])) if name == "return" else documented.get(name, "")
        if annotation is inspect.Signature.empty:
            faults.append(f"has no annotation of {name}")
        elif is_bare_array(annotation) and name != "key" and not SHAPE.search(said):
            faults.append(f"names no shape of {name}")
    if returns not in ("None", None, "NoReturn") and not terse and not {"Returns", "Yields"} & set(found):
        faults.append("does not say what it returns")
    if any(BOXES.search(name) for name in promised):
        signs = {"layout": LAYOUT, "unit": UNIT}
        faults += [f"names no {what} of boxes" for what, sign in signs.items() if not sign.search(text)]
    errors = {name: find(name, scope) for name in entries(found.get("Raises", ""))}
    unknown = [name for name, kind in errors.items() if not (inspect.isclass(kind) and issubclass(kind, BaseException))]
    if unknown or ("Raises" in found and not errors):
        faults.append(f"names exceptions that don't exist: {unknown}")
    kinds = tuple(kind for name, kind in errors.items() if name not in unknown)
    for name in raised(function):
        kind = find(name, scope)
        if inspect.isclass(kind) and not issubclass(kind, kinds):
            faults.append(f"does not say that it raises {name}")
    if source and not SOURCE.search(text):
        faults.append("does not name what it reproduces")
    return faults


def faults_of_class(cls: type) -> list[str]:
    """Of its docstring: what it is made of, or what it has where others make it."""
    found = sections(cls)
    if not vars(cls).get("__doc__"):
        return ["has no docstring"]
    if issubclass(cls, enum.Enum):
        return []
    args, attributes = entries(found.get("Args", "")), entries(found.get("Attributes", ""))
    documented = args | attributes
    if dataclasses.is_dataclass(cls):
        internal = {"parent", "name"} if issubclass(cls, nn.Module) else set()
        promised = {field.name for field in dataclasses.fields(cls) if not field.name.startswith("_")} - internal
        promised |= set(GEOMETRY) if issubclass(cls, Detector) else set()  # keywords kept in one field
        faults = [f"does not document {name}" for name in sorted(promised - set(documented))]
        return faults + [f"has no {name}" for name in sorted(set(documented) - promised)]
    if "__init__" in vars(cls) and not MADE_BY.search(found[""]):
        own = entries(sections(cls.__init__).get("Args", "")) | args
        missing = [name for name in parameters(cls.__init__) if name not in own | attributes]
        return [f"does not document {missing}"] if missing else []
    return []


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    assert faults_of_function(FUNCTIONS[name], source=FUNCTIONS[name].__module__.startswith("flaxdet.ops")) == []


@pytest.mark.parametrize("function", METHODS, ids=[name for name, _ in METHODS.values()])
def test_methods(function):
    _, is_property = METHODS[function]
    one_line = "\n" not in (inspect.getdoc(function) or "") and len(parameters(function)) == 0
    assert faults_of_function(function, terse=is_property or one_line) == []


@pytest.mark.parametrize("name", CLASSES)
def test_classes(name):
    assert faults_of_class(CLASSES[name]) == []


@pytest.mark.parametrize("module", MODULES)
def test_names_are_complete_and_sorted(module):
    module = importlib.import_module(module)
    names = module.__all__
    assert names == sorted(names, key=lambda name: (not name.isupper(), name.islower(), name))
    own = {name for name, value in vars(module).items() if getattr(value, "__module__", "").startswith("flaxdet")}
    assert {name for name in own if not name.startswith("_")} <= set(names)


# The lint itself


def good(boxes: Float[Array, "N 4"], key: Array, sizes: list[np.ndarray], **rest: int) -> Array:
    """Does good, as torch does.

    Args:
        boxes: xyxy in pixels.
        key: of the randomness.
        sizes: [2] each.
        **rest: more.

    Returns:
        [N] scores.

    Raises:
        ValueError: if there is nothing.
        flaxdet.convert.CheckpointError: never.
    """
    if not rest:
        raise UnicodeError  # a ValueError
    return boxes[:, 0]


@dataclasses.dataclass
class Good:
    """Does good.

    Attributes:
        a, b: numbers.
    """

    a: int
    b: int


BAD = [
    ("    key: of the randomness.\n", "", ["documents ['boxes', 'sizes', '**rest'], takes"]),
    ("    **rest: more.\n", "    rest: more.\n", ["documents ['boxes', 'key', 'sizes', 'rest'], takes"]),
    (": [2] each", ": of each", ["names no shape of sizes"]),
    ("[N] scores", "scores", ["names no shape of return"]),
    ("Returns:\n    [N] scores.\n", "", ["names no shape of return", "does not say what it returns"]),
    (": xyxy in", ": in", ["names no layout of boxes"]),
    (" in pixels", "", ["names no unit of boxes"]),
    ("ValueError:", "TypeError:", ["does not say that it raises UnicodeError"]),
    ("convert.Check", "convert.Chequ", ["names exceptions that don't exist: ['flaxdet.convert.Chequ"]),
    (", as torch does", "", ["does not name what it reproduces"]),
    ("Returns:", "Yields:\n    Nothing.\n\nReturns:", ["has sections ['Args', 'Yields', 'Returns'"]),
]


def test_a_good_function_passes():
    assert faults_of_function(good, source=True) == []
    assert faults_of_class(Good) == []


@pytest.mark.parametrize(("old", "new", "faults"), BAD, ids=[old.strip() for old, *_ in BAD])
def test_each_fault_is_found(old, new, faults, monkeypatch):
    text = inspect.cleandoc(good.__doc__)  # Python 3.13 takes the indentation out by itself
    assert old in text
    monkeypatch.setattr(good, "__doc__", text.replace(old, new))
    found = faults_of_function(good, source=True)
    assert len(found) == len(faults)
    assert all(fault.startswith(start) for fault, start in zip(found, faults, strict=True)), found


def test_missing_annotations_and_docstrings_are_found(monkeypatch):
    assert faults_of_function(lambda: None) == ["has no docstring"]
    monkeypatch.setattr(good, "__annotations__", {})
    assert faults_of_function(good) == [
        f"has no annotation of {name}" for name in ("boxes", "key", "sizes", "**rest", "return")
    ]
    monkeypatch.setattr(Good, "__doc__", "Does good.\n\nAttributes:\n    a: a number.\n    c: another.\n")
    assert faults_of_class(Good) == ["does not document b", "has no c"]
