"""No test asserts nothing: one that only runs code passes whatever the code does.

A test asserts by ``assert``, by ``pytest.raises``, ``warns`` or ``fail``, by an ``assert_close`` or
the like, by Playwright's ``expect``, or by calling a helper of the tests folder that does, directly
or through others.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.environment import ROOT

FILES = sorted((ROOT / "tests").rglob("*.py"))
TESTS = [path for path in FILES if path.name.startswith("test_")]
OUTSIDE = {"pytest.raises", "pytest.warns", "pytest.fail", "expect"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Module:
    """The functions of one file, the methods of its classes, and what it has from other files."""

    def __init__(self, tree: ast.Module) -> None:
        inside = [node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        methods = [node for body in inside for node in body if isinstance(node, Function)]
        self.methods = {node.name: node for node in methods}
        every = [node for node in ast.walk(tree) if isinstance(node, Function)]
        self.functions = {node.name: node for node in every if node not in methods}
        self.names: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    self.names[alias.asname or alias.name] = f"{node.module}.{alias.name}"

    def helpers(self, called: str) -> Iterator[tuple[Function, Module]]:
        """What a call may mean in this file, as far as it is in the tests folder, and where."""
        first, _, rest = called.partition(".")
        last = called.rpartition(".")[2]
        full = self.names.get(first, "")
        places = {name: module(name.rpartition(".")[0]) for name in self.names.values()}
        if not rest:
            found = [(self.functions, self)]
            found += [(place.functions, place) for place in [places.get(full)] if place]
        elif named := module(full):
            found = [(named.functions, named)]
        else:  # a method of some object, whose class is here or where something else comes from
            known = [self, *filter(None, places.values())]
            found = [(place.methods, place) for place in known]
        yield from ((names[last], place) for names, place in found if last in names)


@functools.cache
def module(name: str) -> Module | None:
    """A module of the tests folder by its full name; None for every other."""
    path = ROOT.joinpath(*name.split("."))
    found = [each for each in (path.with_suffix(".py"), path / "__init__.py") if each.is_file()]
    if not found or name.split(".")[0] != "tests":
        return None
    return Module(ast.parse(found[0].read_text(encoding="utf-8")))


def calls(function: ast.AST) -> Iterator[str]:
    """What is called in it, as written: ``helper``, ``module.helper``, ``object.method``."""
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def asserts(function: ast.AST, home: Module, seen: set[int]) -> bool:
    """Whether it asserts, or something that it calls; ``seen`` ends circles."""
    if id(function) in seen:
        return False
    seen.add(id(function))
    if any(isinstance(node, ast.Assert) for node in ast.walk(function)):
        return True
    called = set(calls(function))
    if any(name in OUTSIDE or name.rpartition(".")[2].startswith("assert_") for name in called):
        return True
    helpers = [helper for name in called for helper in home.helpers(name)]
    return any(asserts(helper, place, seen) for helper, place in helpers)


def silent(home: Module) -> list[str]:
    """Names of the tests that assert nothing."""
    tests = [node for name, node in home.functions.items() if name.startswith("test_")]
    return [test.name for test in tests if not asserts(test, home, set())]


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT / "tests")))
def test_every_test_asserts(path: Path) -> None:
    found = silent(Module(ast.parse(path.read_text(encoding="utf-8"))))
    assert not found, f"{path.relative_to(ROOT)}: no assertion in {', '.join(found)}"


SOME = """
from tests.mutants.__main__ import run
from tests import test_fp8_numbers as fp8
from tests.test_fp8_numbers import check
def helper(x):
    assert x
def circle():
    circle()
class Page:
    def shows(self, x):
        assert x
def test_it(page):
{body}
"""


@pytest.mark.parametrize(
    "body",
    [
        "    assert f()",
        "    with pytest.raises(ValueError):\n        f()",
        "    torch.testing.assert_close(f(), 1)",
        "    expect(page).to_have_title('x')",
        "    helper(1)",
        "    check(1, 2)",
        "    fp8.check(1)",
        "    page.shows(1)",
    ],
)
def test_an_assertion_is_found(body: str) -> None:
    assert not silent(Module(ast.parse(SOME.format(body=body))))


@pytest.mark.parametrize("body", ["    f()", "    run(1)", "    page.helper()", "    circle()"])
def test_a_test_without_one_is_named(body: str) -> None:
    assert silent(Module(ast.parse(SOME.format(body=body)))) == ["test_it"]
