"""Rules that a committed notebook keeps, as functions that return what is wrong.

nbval compares outputs, but only outputs that were committed: a cell without an execution count
passes it silently. So the rules here first make sure that there is something to compare, then
that the notebook can be read in one sitting and carries nothing of the machine it was made on.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat

from tests.environment import ROOT
from tests.notebooks import fingerprint

MAX_CELLS = 40
MAX_LINES = 15
MIN_STRICT_SHARE = 0.60
FULL_WIDTH = "full-width"
INSTALL = "install"
INSTALL_SOURCE = """# On Colab, say, the package is missing: then install it.
from importlib.util import find_spec

if find_spec("dsv3_mini") is None:
    %pip install --quiet "dsv3_mini[notebooks] @ git+{repository}\""""
UNCOMPARED_TAGS = {"nbval-ignore-output", "nbval-skip"}

ANSI = re.compile(r"\x1b\[[0-9;]*m")
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|Users|work)/[^\s\"']*|[A-Z]:\\+Users\\")
BUILD = re.compile(r"\d\+(?:cpu|cu\d+|rocm[\d.]*|xpu)\b")

Notebook = nbformat.NotebookNode
Rule = Callable[[Notebook], list[str]]


def read(path: Path) -> Notebook:
    """The notebook at ``path`` in format 4."""
    return nbformat.read(path, as_version=4)


def tags(cell: Notebook) -> set[str]:
    return set(cell.metadata.get("tags", []))


def code_cells(notebook: Notebook) -> list[tuple[int, Notebook]]:
    """(position, cell) of every code cell that has code; positions count all cells from 1."""
    numbered = enumerate(notebook.cells, start=1)
    return [(n, c) for n, c in numbered if c.cell_type == "code" and c.source.strip()]


def install_cell() -> Notebook:
    """The cell that follows every title: it installs the package from where it is published."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        repository = tomllib.load(file)["project"]["urls"]["Repository"]
    source = INSTALL_SOURCE.format(repository=repository)
    # remove-cell: neither the site nor the slides show it.
    metadata = {"tags": [INSTALL, "remove-cell"]}
    return nbformat.v4.new_code_cell(source, id=INSTALL, metadata=metadata)


def put_install_cell(notebook: Notebook) -> None:
    """Place it after the title, or bring the one that is there up to date."""
    others = [cell for cell in notebook.cells if INSTALL not in tags(cell)]
    notebook.cells = [*others[:1], install_cell(), *others[1:]]


def comparison(notebook: Notebook) -> tuple[int, int, int]:
    """How many code cells have outputs, are compared strictly, and of those hold a picture.

    nbval never compares the pixels of a picture, so the third number says how much of the second
    rests on assertions in the notebook.
    """
    with_outputs = [cell for _, cell in code_cells(notebook) if cell.outputs]
    strict = [cell for cell in with_outputs if not tags(cell) & UNCOMPARED_TAGS]
    pictures = [c for c in strict if any("image/png" in o.get("data", {}) for o in c.outputs)]
    return len(with_outputs), len(strict), len(pictures)


def full_width_cells(notebook: Notebook) -> list[Notebook]:
    """The cells that tests/test_full_width.py runs at V3's width, on a card that is not there."""
    return [cell for _, cell in code_cells(notebook) if FULL_WIDTH in tags(cell)]


def opens_with_title(notebook: Notebook) -> list[str]:
    first = notebook.cells[0] if notebook.cells else None
    if first is not None and first.cell_type == "markdown" and first.source.startswith("# "):
        return []
    return ["the first cell is not a markdown cell that begins with a title ('# ...')"]


def installs_the_package(notebook: Notebook) -> list[str]:
    second = notebook.cells[1] if len(notebook.cells) > 1 else None
    if second is not None and INSTALL in tags(second) and second.source == install_cell().source:
        return []
    return ["no cell after the title installs the package where it is missing: `make notebooks`"]


def is_short(notebook: Notebook) -> list[str]:
    wrong = []
    if len(notebook.cells) > MAX_CELLS:
        wrong.append(f"{len(notebook.cells)} cells, at most {MAX_CELLS} allowed: split the topic")
    for number, cell in code_cells(notebook):
        lines = len(cell.source.splitlines())
        if lines > MAX_LINES:
            wrong.append(f"cell {number} has {lines} lines, at most {MAX_LINES} allowed: split it")
    return wrong


def is_executed_in_order(notebook: Notebook) -> list[str]:
    counts = [cell.execution_count for _, cell in code_cells(notebook)]
    if counts == list(range(1, len(counts) + 1)):
        return []
    missing = [number for number, cell in code_cells(notebook) if cell.execution_count is None]
    if missing:
        return [f"cells {missing} have no execution count, so nbval compares nothing there"]
    return [f"execution counts are {counts}, not 1 to {len(counts)}: it was not run in order"]


def has_only_expected_errors(notebook: Notebook) -> list[str]:
    wrong = []
    for number, cell in code_cells(notebook):
        errors = [o.ename for o in cell.outputs if o.output_type == "error"]
        expected = "raises-exception" in tags(cell)
        if errors and not expected:
            wrong.append(f"cell {number} raised {errors[0]} without the tag raises-exception")
        if expected and not errors:
            wrong.append(f"cell {number} has the tag raises-exception but raised nothing")
    return wrong


def is_mostly_compared(notebook: Notebook) -> list[str]:
    with_outputs, strict, _ = comparison(notebook)
    if strict >= MIN_STRICT_SHARE * with_outputs:
        return []
    return [
        f"{strict} of {with_outputs} cells with outputs are compared strictly, at least "
        f"{MIN_STRICT_SHARE:.0%} expected: print what a seed or exact arithmetic makes repeatable"
    ]


def asserts_what_is_not_compared(notebook: Notebook) -> list[str]:
    cells = code_cells(notebook)
    wrong = []
    for place, (number, cell) in enumerate(cells):
        if "nbval-ignore-output" not in tags(cell):
            continue
        following = [c for _, c in cells[place + 1 : place + 3] if "nbval-skip" not in tags(c)]
        if not any(re.search(r"^\s*assert\b", c.source, re.MULTILINE) for c in following):
            wrong.append(
                f"cell {number} has the tag nbval-ignore-output, and neither of the next two code "
                "cells asserts what must hold on every machine"
            )
    return wrong


def runs_its_full_width(notebook: Notebook) -> list[str]:
    """'At full width' follows DSV3_SCALE and DSV3_DEVICE in a cell that a test runs at V3's width.

    A notebook without such a part (whose whole subject is the width, say) needs no such cell.
    """
    headings = [c.source for c in notebook.cells if c.cell_type == "markdown"]
    cells = full_width_cells(notebook)
    if any(re.search(r"^## At full width$", text, re.M) for text in headings) and not cells:
        return [
            "the part 'At full width' has no cell tagged full-width: tag the one that takes "
            "scale() and device() and needs the first code cell's imports only"
        ]
    if any(tags(cell) & UNCOMPARED_TAGS for cell in cells):
        return ["a full-width cell is not compared: print shapes and bytes, measure in the next"]
    return []


def uses_tags_for_nbval(notebook: Notebook) -> list[str]:
    marked = [n for n, c in code_cells(notebook) if re.search(r"^\s*#+\s*NBVAL_", c.source, re.M)]
    return [f"cell {n} has an NBVAL_ comment: use a cell tag, which is counted" for n in marked]


def is_free_of_machine_paths(notebook: Notebook) -> list[str]:
    wrong = []
    here = [str(path) for path in (ROOT, Path.home()) if len(path.parts) > 1]
    for number, cell in enumerate(notebook.cells, start=1):
        text = ANSI.sub("", _text_of(cell))
        hits = [m.group(0) for m in MACHINE_PATH.finditer(text)]
        hits += [path for path in here if path + "/" in text]
        if hits:
            wrong.append(f"cell {number} names a path of one machine: {hits[0]}")
    return wrong


def is_free_of_build_strings(notebook: Notebook) -> list[str]:
    wrong = []
    for number, cell in code_cells(notebook):
        found = BUILD.search(_text_of(Notebook(outputs=cell.outputs)))
        if found and not tags(cell) & UNCOMPARED_TAGS:
            wrong.append(
                f"cell {number} prints the build {found.group(0)!r}, which other installations do "
                "not have: print torch.__version__.split('+')[0]"
            )
    return wrong


def is_made_by_this_package(notebook: Notebook) -> list[str]:
    if notebook.metadata.get(fingerprint.KEY) == fingerprint.fingerprint(notebook):
        return []
    return ["its outputs were made by other cells or another package: run make notebooks"]


def has_plain_metadata(notebook: Notebook) -> list[str]:
    wrong = []
    kernel = notebook.metadata.get("kernelspec", {}).get("name")
    if kernel != "python3":
        wrong.append(f"the kernel is called {kernel!r}, expected 'python3'")
    if "widgets" in notebook.metadata:
        wrong.append("it carries the state of widgets: run make notebooks")
    timed = [n for n, c in code_cells(notebook) if "execution" in c.metadata]
    if timed:
        wrong.append(f"cells {timed} carry times of execution: run make notebooks")
    return wrong


RULES: list[Rule] = [
    opens_with_title,
    installs_the_package,
    is_short,
    is_executed_in_order,
    has_only_expected_errors,
    is_mostly_compared,
    asserts_what_is_not_compared,
    runs_its_full_width,
    uses_tags_for_nbval,
    is_free_of_machine_paths,
    is_free_of_build_strings,
    is_made_by_this_package,
    has_plain_metadata,
]


def _text_of(node: Any) -> str:
    """All text in a cell, without the base64 of its pictures."""
    if isinstance(node, dict):
        shown = {k: v for k, v in node.items() if not str(k).startswith(("image/p", "image/j"))}
        return "\n".join(_text_of(value) for value in shown.values())
    if isinstance(node, list):
        return "\n".join(_text_of(value) for value in node)
    return node if isinstance(node, str) else json.dumps(node)
