"""Outputs of cells: alt text for figures, and room for long lines.

A notebook's PNG carries no alt text, but its cell says in print what the figure shows, or its axes
and title do. In this order: a line that begins with 'Figure:' or holds 'what it should look like:'
(to the end of its sentence); a line that is a whole sentence; the words of the call that draws, and
the section. Whatever is found stays visible in the page as well.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

MARKS = ("Figure: ", "what it should look like: ")
SENTENCE = re.compile(r"^[A-Z][^|=\[\]{}]{35,}[.!]$")
VIZ = Path(__file__).parent.parent / "dsv3_mini" / "viz"
WIDE = 100  # characters; an output with a longer line is prose, and wraps


def alt_text(printed: list[str], source: str, heading: str) -> str:
    """What to say of a figure: from its cell's lines and code, and from the section."""
    for number, line in enumerate(printed):
        for mark in MARKS:
            if mark in line:
                rest = [line.partition(mark)[2], *printed[number + 1 :]]
                end = next((n for n, text in enumerate(rest) if text.rstrip().endswith(".")), 0)
                return " ".join(text.strip() for text in rest[: end + 1])
    for line in printed:
        if SENTENCE.match(line.strip()):
            return line.strip()
    words = labels(source) or printed[:1]
    return f"{heading}: {'; '.join(words)}".replace(".; ", ". ")


def labels(source: str) -> list[str]:
    """What the last statement of a cell draws: the function's own words, and texts it is given."""
    inside = [node for last in ast.parse(source).body[-1:] for node in ast.walk(last)]
    called = [node.func.id for node in inside
              if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]  # fmt: skip
    said = [drawing_functions()[name] for name in called if name in drawing_functions()]
    texts = (node.value for node in inside if isinstance(node, ast.Constant))
    given = (" ".join(text.split()) for text in texts if isinstance(text, str) and len(text) > 3)
    return [*said[:1], *given]


@cache
def drawing_functions() -> dict[str, str]:
    """First paragraph of the docstring of each public function in viz."""
    found = {}
    for path in sorted(VIZ.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                text = ast.get_docstring(node) or ""
                found[node.name] = " ".join(text.split("\n\n")[0].replace("``", "").split())
    return found


def heading_of(node: nodes.Node) -> str:
    """The title of the section around a node."""
    while node.parent is not None:
        node = node.parent
        if isinstance(node, nodes.section):
            title = node.next_node(nodes.title)
            return "" if title is None else title.astext()
    return ""


class Outputs(SphinxTransform):
    """Works on every executed cell of a notebook."""

    default_priority = 400

    def apply(self, **kwargs: Any) -> None:
        """Give images their alt text, and blocks with long lines a class."""
        for cell in self.document.findall(nodes.container):
            if cell.get("nb_element") != "cell_code":
                continue
            source, *outputs = cell.findall(nodes.literal_block)
            for block in outputs:
                if max(map(len, block.astext().splitlines()), default=0) > WIDE:
                    block["classes"].append("wrap")
            printed = [line for block in outputs for line in block.astext().splitlines()]
            for image in cell.findall(nodes.image):
                if not image.get("alt"):
                    image["alt"] = alt_text(printed, source.astext(), heading_of(cell))


def level_captions(*event: Any) -> None:
    """Give the headings of the lists of pages the level that Sphinx leaves out."""
    context = event[3]
    for part in ("body", "furo_navigation_tree"):
        if part in context:
            level = 'role="heading" aria-level="2"'
            context[part] = context[part].replace('role="heading"', level)


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_transform(Outputs)
    app.connect("html-page-context", level_captions, priority=900)  # after the theme
    return {"parallel_read_safe": True, "parallel_write_safe": True}
