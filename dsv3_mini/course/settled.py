"""Where each claim is put to the vote, and which cell settles it, read from the notebooks.

Why: a verdict that only this package asserts would be one more thing heard. So each is tied to a
cell that a reader can run, by the message of an assertion: ``assert ..., "6, 17: ..."`` settles
claims 6 and 17. Nothing is listed by hand; what the notebooks say is kept in ``settled.json``,
for readers who have the package and not the notebooks. Write it anew with

    python -m dsv3_mini.course.settled --write
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
RECORD = Path(__file__).with_name("settled.json")
# '53', '6, 17: the reason', 'claims 4 and 5: the reason'.
MESSAGE = re.compile(r"(?:claims? )?(\d+(?:(?:, | and )\d+)*)(?::|$)")


@dataclass(frozen=True)
class Cell:
    """A cell, the heading above it, and its count among code cells, which Jupyter shows as [n]."""

    notebook: str
    section: str
    number: int
    identifier: str
    kind: str
    source: str


@dataclass(frozen=True)
class Place:
    """A cell that settles a claim: enough to name it on paper, and to open it in JupyterLab."""

    notebook: str
    section: str
    number: int
    identifier: str

    def __str__(self) -> str:
        return f"{self.notebook.partition('_')[0]}, {self.section}, code cell {self.number}"

    @property
    def link(self) -> str:
        """Relative to the folder of the notebooks; JupyterLab opens it at the cell."""
        return f"{self.notebook}#cell-id={self.identifier}"


def cells(folder: Path = NOTEBOOKS) -> Iterator[Cell]:
    """The cells of all notebooks in ``folder``, in order. ValueError if it holds none."""
    paths = sorted(folder.glob("[0-9]*.ipynb"))
    if not paths:
        raise ValueError(f"{folder} holds no notebook; expected the repository's notebooks/")
    for path in paths:
        section, number = "", 0
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            kind, source = cell["cell_type"], "".join(cell["source"])
            number += kind == "code"
            if kind == "markdown" and (headings := re.findall(r"^#+ +(.+)$", source, re.MULTILINE)):
                section = headings[-1]
            yield Cell(path.name, section, number, cell["id"], kind, source)


def parse(source: str) -> ast.Module:
    """A cell's code as a tree; lines that only IPython knows are passed over. SyntaxError."""
    return ast.parse(re.sub(r"^([ \t]*)[%!].*$", r"\1pass", source, flags=re.MULTILINE))


def _parsed(folder: Path) -> Iterator[tuple[Cell, ast.AST]]:
    for cell in cells(folder):
        if cell.kind == "code":
            yield from ((cell, node) for node in ast.walk(parse(cell.source)))


def votes(folder: Path = NOTEBOOKS) -> dict[int, list[str]]:
    """Claim to the notebooks that put it to the vote: ``Vote(53, 54)`` in one of their cells."""
    found: dict[int, list[str]] = {}
    for cell, node in _parsed(folder):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Vote":
            for number in map(ast.literal_eval, node.args):
                found.setdefault(number, []).append(cell.notebook)
    return found


def settled(folder: Path = NOTEBOOKS) -> dict[int, list[str]]:
    """Claim to the notebooks that settle it, by ``vote.settle()`` or ``vote.settle(53, 54)``."""
    found: dict[int, list[str]] = {}
    voted = votes(folder)
    for cell, node in _parsed(folder):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("vote.settle"):
            named = [ast.literal_eval(number) for number in node.args]
            for number in named or [n for n, where in voted.items() if cell.notebook in where]:
                found.setdefault(number, []).append(cell.notebook)
    return found


def asserted(folder: Path = NOTEBOOKS) -> dict[int, list[Place]]:
    """Claim to the cells that have an assertion whose message begins with its number."""
    found: dict[int, list[Place]] = {}
    for cell, node in _parsed(folder):
        message = node.msg if isinstance(node, ast.Assert) else None
        if isinstance(message, ast.Constant) and (named := MESSAGE.match(str(message.value))):
            place = Place(cell.notebook, cell.section, cell.number, cell.identifier)
            for number in map(int, re.findall(r"\d+", named[1])):
                places = found.setdefault(number, [])
                places += [] if place in places else [place]
    return dict(sorted(found.items()))


def record(folder: Path = NOTEBOOKS) -> str:
    """What ``settled.json`` must hold for the notebooks in ``folder``."""
    places = {n: [asdict(place) for place in found] for n, found in asserted(folder).items()}
    return json.dumps(places, indent=2, ensure_ascii=False) + "\n"


def places(number: int) -> list[Place]:
    """The cells that settle this claim, from the record; empty if none does."""
    kept = json.loads(RECORD.read_text(encoding="utf-8"))
    return [Place(**place) for place in kept.get(str(number), [])]


def main(words: list[str]) -> None:
    """Print the record, or write it with ``--write``."""
    if words == ["--write"]:
        RECORD.write_text(record(), encoding="utf-8")
    else:
        print(record(), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
