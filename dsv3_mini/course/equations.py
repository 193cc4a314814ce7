"""From each equation of the report to its function, its test, and the cell that works it out.

Why: whoever reads the report asks where an equation is in the code, and whoever reads the code
whether anything checks it. Both answers are in docstrings: one that says 'report eqs 1-11' states
that the function is those equations or, in a test, that it checks them against a slower statement.
A notebook says 'eq 15' where it works with it. This module reads all three and makes one table:

    python -m dsv3_mini.course.equations --write    writes docs/equations.md

Only the package's core is read for functions: the slow statements of the course are no
implementation. 'Eq 21 prints the state first', without the word report, is a remark and not read.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dsv3_mini.course.settled import Cell, cells

ROOT = Path(__file__).resolve().parents[2]
PAGE = Path("docs/equations.md")

MEANING = {
    1: "Hidden state down to the latent c_KV, which is cached",
    2: "Latent up to the content part of every head's key",
    3: "Hidden state to one rotary key for all heads, rotated, which is cached",
    4: "A head's key: its content part, then the shared rotary part",
    5: "Latent up to every head's value, which is never rotated",
    6: "Hidden state down to the query latent c_Q, which is not cached",
    7: "Query latent up to the content part of every head's query",
    8: "Query latent to a rotary query for each head, rotated",
    9: "A head's query: its content part, then its rotary part",
    10: "Causal softmax attention, scores divided by the root of the whole key width",
    11: "Heads side by side, and the output projection",
    12: "Feed-forward: input, plus shared experts, plus gated routed experts",
    13: "A chosen expert's gate, normalised over the chosen",
    14: "Chosen are the K experts with the highest affinity",
    15: "Affinity of a token to an expert: a sigmoid of their product",
    16: "With a bias, which takes part in the choice and not in the gate",
    17: "Balance loss of one sequence: alpha times the sum of f_i P_i",
    18: "f_i: how often expert i is among the K best, against its even share",
    19: "Affinities of a token, normalised over all experts",
    20: "P_i: the mean normalised affinity of expert i over the sequence",
    21: "MTP joins the state of the depth before with the next token's embedding",
    22: "The module's own Transformer block",
    23: "The main model's output head on the module's state",
    24: "Cross-entropy of depth k: T - k terms, divided by T",
    25: "Mean over depths, times lambda, added to the main loss",
}

_NUMBER = r"\d+(?!\d|\.\d)"  # 'eq 10, 4.3' is equation 10 and section 4.3
_LIST = rf"{_NUMBER}(?:(?:-|, | and | to |, and ){_NUMBER})*"
REPORT = re.compile(rf"\breport eqs? ({_LIST})", re.IGNORECASE)
ANY = re.compile(rf"\beqs? ({_LIST})", re.IGNORECASE)
ELSEWHERE = re.compile(r"(?:arXiv [\d.]+v?\d*|Balancing|\")[, ]*eqs? \d+", re.IGNORECASE)


@dataclass(frozen=True)
class Function:
    """A function, or a method as 'Class.method', of the package or of the tests."""

    path: str
    name: str
    equations: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """What there is for one equation; functions with the fewest equations come first."""

    equation: int
    functions: list[Function]
    tests: list[Function]
    cells: list[Cell]


def numbers(text: str, pattern: re.Pattern[str] = REPORT) -> tuple[int, ...]:
    """The equations that a text refers to: 'report eqs 1-3, 5 and 7 to 9' has seven."""
    found: set[int] = set()
    for match in pattern.finditer(" ".join(text.split())):
        for part in re.split(r", and |, | and ", match[1]):
            first, *last = map(int, re.split(r"-| to ", part))
            found.update(range(first, (last or [first])[-1] + 1))
    return tuple(sorted(found))


def functions(root: Path, pattern: str) -> list[Function]:
    """Functions and methods whose docstring names equations of the report, file by file."""
    found = []
    for path in sorted(root.glob(pattern)):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for name, node in _functions(tree):
            if named := numbers(ast.get_docstring(node) or ""):
                found.append(Function(path.relative_to(root).as_posix(), name, named))
    return found


def _functions(tree: ast.AST, inside: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            yield inside + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node, f"{inside}{node.name}.")


def mentions(cell: Cell) -> tuple[int, ...]:
    """The equations that a cell names: in its text or, if it is code, in comments."""
    text = cell.source
    if cell.kind == "code":
        text = "\n".join(re.findall(r"#(.*)", text))
    return numbers(ELSEWHERE.sub("", text), ANY)


def index(root: Path = ROOT) -> list[Row]:
    """One row for each equation, 1 to 25. ValueError where the repository has no notebooks."""
    code = functions(root, "dsv3_mini/*.py")
    tests = [each for each in functions(root, "tests/test_*.py") if each.name.startswith("test_")]
    named = [(cell, mentions(cell)) for cell in cells(root / "notebooks")]
    return [
        Row(
            equation,
            sorted((f for f in code if equation in f.equations), key=lambda f: len(f.equations)),
            sorted((t for t in tests if equation in t.equations), key=lambda t: len(t.equations)),
            [cell for cell, found in named if equation in found],
        )
        for equation in MEANING
    ]


def missing(rows: list[Row]) -> list[str]:
    """What an equation lacks, and how to add it."""
    wrong = []
    for row in rows:
        eq = f"eq {row.equation}"
        if not row.functions:
            wrong.append(f"{eq}: no docstring in dsv3_mini/*.py says 'report {eq}'")
        if not row.tests:
            wrong.append(f"{eq}: no docstring of a test says 'report {eq}'")
        if not row.cells:
            wrong.append(f"{eq}: no notebook says '{eq}' in its text or in a comment")
    return wrong


def page(rows: list[Row]) -> str:
    """The table as Markdown, with links as seen from docs/."""
    lines = [
        "# Equations of the report",
        "",
        "Equations 1 to 25 of the DeepSeek-V3 Technical Report (arXiv 2412.19437): the functions",
        "that are them, the tests that check these against a slower statement, and sections of the",
        "notebooks that work with them. A function of few equations stands before one of many.",
        "`python -m dsv3_mini.course.equations --write` makes this page from docstrings.",
        "",
        "| eq | meaning | functions | tests | notebooks |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        columns = [str(row.equation), MEANING[row.equation]]
        columns += [_listed(row.functions), _listed(row.tests)]
        sections: dict[str, list[str]] = {}
        for cell in row.cells:
            listed = sections.setdefault(cell.notebook, [])
            listed += [] if cell.section in listed else [cell.section]
        links = [
            f"[{name.partition('_')[0]}](../notebooks/{name}): {'; '.join(listed)}"
            for name, listed in sections.items()
        ]
        lines.append(f"| {' | '.join([*columns, '<br>'.join(links)])} |")
    return "\n".join(lines) + "\n"


def _listed(found: list[Function]) -> str:
    by_file: dict[str, list[str]] = {}
    for each in found:
        by_file.setdefault(each.path, []).append(f"`{each.name}`")
    files = by_file.items()
    return "<br>".join(f"[{Path(path).stem}](../{path}): {', '.join(n)}" for path, n in files)


def main(words: list[str]) -> int:
    """Print the page, or write it with ``--write``; says what is missing, and then returns 1."""
    rows = index()
    if words == ["--write"]:
        (ROOT / PAGE).parent.mkdir(exist_ok=True)
        (ROOT / PAGE).write_text(page(rows), encoding="utf-8")
    else:
        print(page(rows), end="")
    print("\n".join(missing(rows)), file=sys.stderr, end="\n" if missing(rows) else "")
    return 1 if missing(rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
