"""Lints what ``flaxdet.ops`` exports: every function says what goes in and out, and is annotated."""

from __future__ import annotations

import inspect
import re

import pytest

from flaxdet import ops

FUNCTIONS = [getattr(ops, name) for name in ops.__all__ if inspect.isfunction(getattr(ops, name))]
CLASSES = [getattr(ops, name) for name in ops.__all__ if inspect.isclass(getattr(ops, name))]
METHODS = [
    method
    for cls in CLASSES
    for name, method in vars(cls).items()
    if inspect.isfunction(method) and not name.startswith("_")
]


def test_the_list_of_names_is_complete_and_sorted():
    public = {name for name in vars(ops) if not name.startswith("_") and not inspect.ismodule(getattr(ops, name))}
    assert set(ops.__all__) == public
    assert ops.__all__ == sorted(ops.__all__, key=lambda name: (not name.isupper(), name.islower(), name))


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_docstrings_state_arguments_shapes_and_source(function):
    text = inspect.getdoc(function) or ""
    sections = re.split(r"\n(?=(?:Args|Returns|Raises):\n)", text)
    assert [s.split(":")[0] for s in sections[1:]] == ["Args", "Returns", "Raises"], text
    documented = re.findall(r"^    (\w+): ", sections[1], re.MULTILINE)
    assert documented == list(inspect.signature(function).parameters)
    assert re.search(r"\[\w|any shape", text), "no shape is named"
    assert re.search(r"torch", text), "the reference that it reproduces is not named"


@pytest.mark.parametrize("function", [*FUNCTIONS, *METHODS], ids=lambda f: f.__qualname__)
def test_signatures_are_annotated(function):
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    for name, parameter in signature.parameters.items():
        assert name == "self" or parameter.annotation is not inspect.Parameter.empty, name


@pytest.mark.parametrize("thing", [*CLASSES, *METHODS], ids=lambda c: c.__qualname__)
def test_classes_and_methods_have_docstrings(thing):
    assert inspect.getdoc(thing)
