"""What a notebook's outputs were made from, as one short text in its metadata.

nbval compares outputs, except those that differ from run to run, and pictures. Those could have
been made by a package that no longer exists. So `make notebooks` writes a fingerprint of the code
that ran, and a test asks whether it is still the one of the code at hand: that of the notebook's
cells and of every module of the package that they reach. Comments, docstrings and layout are no
part of it: they change nothing that runs (what `show` prints, nbval compares).
"""

from __future__ import annotations

import ast
import functools
import hashlib
from pathlib import Path

import nbformat

from dsv3_mini.course.settled import parse
from tests.environment import ROOT

KEY = "dsv3_mini"
PACKAGE = "dsv3_mini"
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def fingerprint(notebook: nbformat.NotebookNode) -> str:
    """Sixteen hexadecimal digits."""
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    tree = parse("\n".join(cells))
    digest = hashlib.sha256(ast.dump(tree).encode())
    modules = sorted(reached(tree))
    for name in modules:
        digest.update(f"{name} {_module(name)[1]}".encode())
    for path in sorted((ROOT / PACKAGE / "assets").rglob("*")) if modules else ():
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()[:16]


def reached(tree: ast.AST) -> set[str]:
    """Names of the package's modules that this code imports, directly or through others."""
    found, todo = set[str](), _imported(tree)
    while todo:
        name = todo.pop()
        if name not in found and _path(name) is not None:
            found.add(name)
            todo |= _module(name)[0]
    return found


def _imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name.split(".")[0] == PACKAGE}


def _path(name: str) -> Path | None:
    base = ROOT.joinpath(*name.split("."))
    choices = (base.with_suffix(".py"), base / "__init__.py")
    return next((path for path in choices if path.is_file()), None)


@functools.cache
def _module(name: str) -> tuple[set[str], str]:
    """What a module imports, and its code without docstrings: read once for all notebooks."""
    path = _path(name)
    assert path is not None
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return _imported(tree), ast.dump(tree)
