"""The shape of the package: who imports whom, how long files are, what has a docstring.

The table below is the design. A reader who knows it can read any module with only the modules
named in its row open beside it.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.environment import ROOT

PACKAGE = ROOT / "dsv3_mini"

MAY_IMPORT: dict[str, set[str]] = {
    "config": set(),
    "environment": {"config"},
    "rope": {"config"},
    "layers": set(),
    "cache": {"config"},
    "attention": {"config", "rope", "layers", "cache"},
    "mla": {"config", "rope", "layers", "cache"},
    "moe": {"config", "layers"},
    "balance": set(),
    "block": {"mla", "attention", "moe", "layers", "config", "cache", "rope"},
    "mtp": {"block", "moe", "layers", "config", "cache", "rope"},
    "model": {"block", "mtp", "cache", "config", "layers", "rope", "balance", "moe"},
    "fp8_numbers": set(),
    "fp8": {"fp8_numbers"},
    "data": set(),
    "train": {"model", "balance", "data", "fp8", "mtp", "config", "checkpoint", "environment"},
    "resume": {"train", "model", "data", "checkpoint", "config", "shards"},
    "train_command": {
        "job",
        "train",
        "resume",
        "data",
        "environment",
        "config",
        "checkpoint",
        "parallel",
        "parallel_run",
    },
    "generate": {"model", "cache"},
    "generate_command": {
        "job",
        "generate",
        "speculative",
        "data",
        "environment",
        "checkpoint",
        "parallel",
    },
    "speculative": {"generate", "model", "cache"},
    "shards": set(),
    "checkpoint": {"block", "model", "fp8_numbers", "config", "shards"},
    "inspect_command": {"checkpoint", "model", "shards"},
    "parallel": {"balance", "model", "moe", "train"},
    "job": {"parallel", "environment"},
    "parallel_run": {"parallel", "resume", "train", "model", "data", "config"},
    "accounting": {"config"},
    "measure": {
        "accounting",
        "attention",
        "cache",
        "config",
        "generate",
        "mla",
        "model",
        "rope",
        "speculative",
    },
}
OUTSIDE = {"torch", "safetensors"}
MAY_ALSO_IMPORT = {
    "data": {"tokenizers"},
    "train_command": {"tqdm"},
    "generate_command": {"tokenizers"},
}
HEAVY = ["matplotlib", "ipywidgets", "IPython", "transformers"]
MAX_LINES_IN_FILE = 300
MAX_LINES_IN_CORE = 2_500

FILES = sorted(PACKAGE.rglob("*.py"))
CORE = sorted(PACKAGE.glob("*.py"))  # viz/ and course/ are folders, and not core
MODULES = [path for path in CORE if path.stem != "__init__"]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, full name) of everything a core module imports, also inside functions.

    What stands under ``if __name__ == "__main__"`` belongs to a command, not to the library.
    ``from dsv3_mini import cache`` and ``from . import cache`` give dsv3_mini.cache.
    """
    library = [node for node in tree.body if "__main__" not in ast.unparse(node)[:40]]
    for node in ast.walk(ast.Module(library, [])):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                module = "dsv3_mini." + module if module else "dsv3_mini"
            if module == "dsv3_mini":
                yield from ((node.lineno, f"dsv3_mini.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module


def forbidden_imports(name: str, tree: ast.Module) -> list[str]:
    """What the module ``name`` imports against the table, as messages that say what to do."""
    where = f"dsv3_mini/{name}.py"
    if name not in MAY_IMPORT:
        return [
            f"{where}:1: the table in tests/test_structure.py has no row for {name}; put the code "
            "into a module that has one, or add a row, here and in the design"
        ]
    inside, outside = MAY_IMPORT[name], OUTSIDE | MAY_ALSO_IMPORT.get(name, set())
    wrong = []
    for line, imported in imports(tree):
        top, _, rest = imported.partition(".")
        if top != "dsv3_mini":
            if top not in outside and top not in sys.stdlib_module_names:
                wrong.append(
                    f"{where}:{line}: imports {imported}; the core may import "
                    f"{', '.join(sorted(outside))} and the standard library, so move this to "
                    "dsv3_mini/viz or dsv3_mini/course"
                )
        elif (target := rest.split(".")[0]) not in inside:
            allowed = ", ".join(sorted(inside)) or "no other module of the package"
            wrong.append(
                f"{where}:{line}: imports {imported}; {name} may import {allowed}. Pass in what "
                f"it needs from {target or 'the package'}, or move the code further down the table"
            )
    return wrong


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_go_down_the_table(path: Path) -> None:
    wrong = forbidden_imports(path.stem, parse(path))
    assert not wrong, "\n".join(wrong)


def test_the_table_has_no_circle() -> None:
    done: set[str] = set()
    while ready := {m for m, needs in MAY_IMPORT.items() if needs <= done} - done:
        done |= ready
    assert done == set(MAY_IMPORT), f"in a circle: {sorted(set(MAY_IMPORT) - done)}"


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("config", "import json\nfrom dsv3_mini.model import Transformer", "config.py:2"),
        ("moe", "from .block import DecoderLayer", "moe may import config, layers"),
        ("moe", "from . import block", "imports dsv3_mini.block"),
        ("moe", "from dsv3_mini import ModelConfig", "imports dsv3_mini.ModelConfig"),
        ("moe", "import dsv3_mini", "what it needs from the package"),
        ("model", "def f():\n    import dsv3_mini.viz.style", "model.py:2"),
        ("rope", "import matplotlib.pyplot as plt", "move this to dsv3_mini/viz"),
        ("rope", "import tokenizers", "rope.py:1"),
        ("helpers", "", "has no row for helpers"),
    ],
)
def test_a_wrong_import_is_named(name: str, source: str, message: str) -> None:
    wrong = forbidden_imports(name, ast.parse(source))
    assert len(wrong) == 1
    assert message in wrong[0]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("moe", "import math\nimport torch.nn.functional as F\nfrom .layers import SwiGLU"),
        ("data", "import tokenizers\nfrom safetensors.torch import load_file"),
        ("block", "from dsv3_mini import mla, moe\nimport dsv3_mini.config"),
    ],
)
def test_a_right_import_is_let_through(name: str, source: str) -> None:
    assert forbidden_imports(name, ast.parse(source)) == []


def test_the_core_brings_no_heavy_package_along() -> None:
    """One fresh process imports the modules in turn and says which one brought what."""
    program = (
        "import importlib, json, sys\n"
        "names, heavy = json.loads(sys.argv[1])\n"
        "for name in names:\n"
        "    importlib.import_module(name)\n"
        "    for package in heavy:\n"
        "        if package in sys.modules:\n"
        "            sys.exit(f'{name} imports {package}, directly or through another module')\n"
    )
    names = ["dsv3_mini", *(f"dsv3_mini.{path.stem}" for path in MODULES)]
    result = subprocess.run(
        [sys.executable, "-c", program, json.dumps([names, HEAVY])],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_file_is_short_enough_to_read_in_one_go(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES_IN_FILE, (
        f"{name_of(path)} has {lines} lines, at most {MAX_LINES_IN_FILE} allowed: split it"
    )


def test_the_core_can_be_read_in_an_afternoon() -> None:
    # What one reads to follow the model; text, folders and commands are around it.
    around = {"accounting", "checkpoint", "data", "environment", "measure", "resume"}
    around |= {"inspect_command", "parallel", "parallel_run", "shards", "train_command"}
    around |= {"generate_command", "job"}
    read = [path for path in CORE if path.stem not in around]
    lines = {name_of(p): len(p.read_text(encoding="utf-8").splitlines()) for p in read}
    total = sum(lines.values())
    longest = sorted(lines.items(), key=lambda item: -item[1])[:5]
    assert total <= MAX_LINES_IN_CORE, (
        f"the core has {total} lines, at most {MAX_LINES_IN_CORE} allowed; longest: {longest}"
    )


@pytest.mark.parametrize("path", CORE, ids=name_of)
def test_everything_public_has_a_docstring(path: Path) -> None:
    tree = parse(path)
    bare = [] if ast.get_docstring(tree) else [f"{name_of(path)}:1: the module"]
    named = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [n for n in tree.body if isinstance(n, named) and not n.name.startswith("_")]
    bare += [f"{name_of(path)}:{n.lineno}: {n.name}" for n in public if not ast.get_docstring(n)]
    assert not bare, "no docstring; say why it is there, shapes and errors:\n" + "\n".join(bare)
