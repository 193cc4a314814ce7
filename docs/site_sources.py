"""Links that leave the pages: a page for each Python file, and a way for links to folders.

A page is cut at the file's functions and classes, each with its name as anchor: the list beside the
page is then the file's table of contents, and ``mla.py#MultiHeadLatentAttention`` is a link.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.parsers import Parser
from sphinx.transforms import SphinxTransform

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def pieces(text: str) -> list[tuple[str, list[str], int, str]]:
    """Name ('' at the start), names of methods, first line from 1, and text; in order."""
    lines, starts = text.splitlines(), [("", list[str](), 1)]
    for node in ast.parse(text).body:
        if isinstance(node, DEFINITIONS):
            inside = [n.name for n in getattr(node, "body", []) if isinstance(n, DEFINITIONS)]
            inside = inside if isinstance(node, ast.ClassDef) else []
            first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
            while first > 1 and lines[first - 2].startswith("#"):
                first -= 1  # a comment right above belongs to it
            starts.append((node.name, inside, first))
    ends = [first - 1 for _, _, first in starts[1:]] + [len(lines)]
    return [
        (name, inside, first, "\n".join(lines[first - 1 : end]).rstrip())
        for (name, inside, first), end in zip(starts, ends, strict=True)
    ]


class SourceParser(Parser):
    """Reads Python files as documents."""

    supported = ("python-source",)

    def parse(self, inputstring: str | StringList, document: nodes.document) -> None:
        """Title, then one literal block for each piece."""
        text = inputstring if isinstance(inputstring, str) else "\n".join(inputstring)
        self.setup_parse(text, document)
        env = document.settings.env
        title = f"{env.docname}.py"
        page = nodes.section(ids=["source"], names=[])
        page += nodes.title("", "", nodes.literal("", title))
        document += page
        slugs = env.metadata[env.docname]
        slugs["orphan"], slugs["nosearch"] = True, True
        known: dict[str, tuple[int, str, str]] = {}
        for name, inside, first, code in pieces(text):
            into = page
            if name:
                into = nodes.section(ids=[name], names=[])
                into += nodes.title("", "", nodes.literal("", name))
                page += into
                known[name] = (first, name, name)
                for method in (f"{name}.{each}" for each in inside):
                    into["ids"].append(method)
                    known[method] = (first, method, method)
            if code:
                block = nodes.literal_block(code, code, language="python", linenos=True)
                block["highlight_args"] = {"linenostart": first}
                into += block
        slugs["myst_slugs"] = known
        self.finish_parse()


class Folders(SphinxTransform):
    """A link to a folder leads to the start page, which lists what is in it."""

    default_priority = 400

    def apply(self, **kwargs: Any) -> None:
        """Look at links that name no document."""
        page = Path(self.env.doc2path(self.env.docname))
        for link in self.document.findall(pending_xref):
            if link["reftype"] == "myst" and (page.parent / link["reftarget"]).is_dir():
                link["refdomain"], link["reftargetid"] = "doc", None
                link["reftarget"] = self.config.root_doc


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_transform(Folders)
    app.add_source_suffix(".py", "python-source")
    app.add_source_parser(SourceParser)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
