"""Slides: ``-b slides`` makes one HTML deck of each notebook, ``05b.html`` of ``05b_....ipynb``.

A notebook is cut where its rhythm is: what is asked (Predict ...) stands on a slide of its own, the
code with its result on the next, the explanation on the one after. Text, code and figures are those
of the site; links to pages that are no deck become plain text. The deck itself is three small files
in ``_slides``; a slide that is too full is set in smaller type.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.builders.html import StandaloneHTMLBuilder
from sphinx.errors import NoUri
from sphinx.writers.html5 import HTML5Translator

LETTERS = 700  # of text on a slide
LINES = 16  # of code on a slide with a result


class slide(nodes.General, nodes.Element):
    """One slide; ``title`` and ``level`` of its heading, ``more`` if it goes on with a section."""


def blocks(section: nodes.Element, level: int = 1) -> Iterator[tuple[str, int, nodes.Element]]:
    """Title and level of its section, for every block of a page in order."""
    first = section.next_node(nodes.title)
    title = "" if first is None else first.astext()
    for child in section.children:
        if isinstance(child, nodes.section):
            yield from blocks(child, level + 1)
        elif isinstance(child, nodes.Element) and not isinstance(child, nodes.title):
            yield title, level, child


def lines(node: nodes.Element) -> int:
    """Lines of code and of printed text."""
    return sum(block.astext().count("\n") + 1 for block in node.findall(nodes.literal_block))


def cut(document: nodes.document) -> list[nodes.Element]:
    """The slides of a page."""
    slides: list[nodes.Element] = []
    code, seen = False, ""  # whether the last slide is code that still waits for its result
    for title, level, block in blocks(next(document.findall(nodes.section))):
        cell = block.get("nb_element") == "cell_code"
        if cell and len(block.children) == 1 and block.astext().startswith(("import", "from")):
            continue  # nothing to look at
        last = slides[-1] if slides else None
        if last is None or last["title"] != title:
            fits = False
        elif cell:
            fits = code and lines(last) + lines(block) <= LINES
        else:
            text = sum(len(child.astext()) for child in last.children)
            fits = not last["cell"] and text + len(block.astext()) <= LETTERS
        if not fits:
            slides.append(slide(title=title, level=min(level, 2), more=title == seen, cell=cell))
            seen = title
        if isinstance(block, nodes.paragraph) and "Predict" in block.astext():
            block["classes"].append("predict")
        slides[-1].append(block)
        code = cell and len(block.children) == 1
    return slides


def visit(self: HTML5Translator, node: slide) -> None:
    """Open a slide and write its heading."""
    name = f"h{node['level']}"
    more = " more" if node["more"] else ""
    title = self.encode(node["title"])
    self.body.append(f'<section class="slide{more}"><{name}>{title}</{name}>')


def depart(self: HTML5Translator, node: slide) -> None:
    """Close it."""
    self.body.append("</section>")


class Slides(StandaloneHTMLBuilder):
    """Writes the decks, and a page that lists them."""

    name = "slides"
    search = False

    def get_theme_config(self) -> tuple[str, dict[str, Any]]:
        """The theme beside this file."""
        return "slides", {}

    def is_deck(self, docname: str) -> bool:
        """Whether a page is a notebook of the course."""
        return str(PurePosixPath(docname).parent) == "notebooks"

    def get_outdated_docs(self) -> Iterator[str]:
        """All decks, always: they are written in seconds."""
        return filter(self.is_deck, sorted(self.env.found_docs))

    def get_target_uri(self, docname: str, typ: str | None = None) -> str:
        """Decks link to decks only."""
        if not self.is_deck(docname) and docname != "index":
            raise NoUri(docname, typ)
        return f"{PurePosixPath(docname).name.split('_')[0]}.html"

    def get_output_path(self, page_name: str, /) -> Path:
        """The file of a deck."""
        return Path(self.outdir) / self.get_target_uri(page_name)

    def write_documents(self, docnames: Any) -> None:
        """Decks only, although a change elsewhere may ask for more."""
        super().write_documents(set(filter(self.is_deck, docnames)))

    def write_doc(self, docname: str, doctree: nodes.document) -> None:
        """One deck."""
        doctree.children = cut(doctree)
        for child in doctree.children:
            child.parent = doctree
        super().write_doc(docname, doctree)

    def get_doc_context(self, docname: str, body: str, metatags: str) -> dict[str, Any]:
        """No neighbours and no table of contents."""
        return {"body": body, "title": self.env.titles[docname].astext()}

    def gen_indices(self) -> None:
        """None."""

    def gen_additional_pages(self) -> None:
        """The list of decks."""
        decks = [
            (self.get_target_uri(name), f"{name.split('/')[-1].split('_')[0]} {title.astext()}")
            for name, title in sorted(self.env.titles.items())
            if self.is_deck(name)
        ]
        self.handle_page("index", {"decks": decks}, "decks.html")

    def copy_extra_files(self) -> None:
        """None."""

    def dump_inventory(self) -> None:
        """None: nothing links into a deck from elsewhere."""


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_node(slide, html=(visit, depart))
    app.add_html_theme("slides", str(Path(__file__).parent / "_slides"))
    app.add_builder(Slides)
    return {"parallel_read_safe": True, "parallel_write_safe": False}
