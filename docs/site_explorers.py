"""Explorers on a page without a kernel: a slider over pictures that were drawn in advance.

A widget leaves one line of text in a committed notebook, such as 'RopeExplorer: distance ...'.
Where ``dsv3_mini.viz.states`` has states for it, they take the line's place; for any other widget
the page says that it needs a running notebook. Without JavaScript the first state is shown.
"""

from __future__ import annotations

import hashlib
import html
import pickle
import re
import struct
from importlib.metadata import version
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util import logging
from sphinx.util.osutil import relative_uri
from sphinx.writers.html5 import HTML5Translator

import dsv3_mini

PACKAGE = Path(dsv3_mini.__file__).parent
WIDGET = re.compile(r"^(\w+(?:Explorer|Balance))\b[:(]")
LOGGER = logging.getLogger(__name__)


class explorer(nodes.General, nodes.Element):
    """The place of a widget; ``name`` is its class."""


class Explorers(SphinxTransform):
    """Puts an ``explorer`` where a widget left its line."""

    default_priority = 390

    def apply(self, **kwargs: Any) -> None:
        """Look at all outputs."""
        seen = set()
        for block in list(self.document.findall(nodes.literal_block)):
            found = WIDGET.match(block.astext())
            if found and "output" in block["classes"]:
                block.replace_self(explorer(name=found[1], again=found[1] in seen))
                seen.add(found[1])


def drawn(name: str, folder: Path) -> Any:
    """The states of one explorer; kept in ``folder`` until a file of the package changes."""
    from dsv3_mini.viz import states  # torch and matplotlib, a few seconds

    if name not in states.MAKERS:
        return None
    digest = hashlib.sha256("".join(map(version, ("torch", "matplotlib", "numpy"))).encode())
    for pattern in ("*.py", "course/*.py", "viz/*.py", "assets/**/*"):
        for path in sorted(PACKAGE.glob(pattern)):
            digest.update(path.read_bytes() if path.is_file() else b"")
    kept = folder / f"{name}-{digest.hexdigest()[:16]}.pickle"
    if not kept.exists():
        LOGGER.info("drawing the states of %s", name)
        folder.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(pickle.dumps(states.MAKERS[name]()))
    return pickle.loads(kept.read_bytes())


def visit(self: HTML5Translator, node: explorer) -> None:
    """Write one explorer, its pictures beside the page's other static files."""
    from dsv3_mini.viz.shell import table

    name, builder = node["name"], self.builder
    found = None if node["again"] else drawn(name, Path(builder.doctreedir) / "states")
    if found is None:
        more = "; what it shows is above" if node["again"] else ""
        self.body.append(f"<p><em>{name} is a widget and needs a running notebook{more}.</em></p>")
        raise nodes.SkipNode
    folder = Path(builder.outdir) / "_static" / "states"
    folder.mkdir(parents=True, exist_ok=True)
    page = builder.get_target_uri(self.docnames[0])
    parts = []
    for number, state in enumerate(found.states):
        file = f"{name}-{number}.png"
        (folder / file).write_bytes(state.picture)
        width, height = struct.unpack(">II", state.picture[16:24])
        alt = html.escape(f"{found.control} {state.value}. {found.alt}")
        hidden = "" if number == found.start else " hidden"
        parts.append(
            f'<div class="state" data-value="{html.escape(state.value)}"{hidden}>'
            f'<img src="{relative_uri(page, f"_static/states/{file}")}" alt="{alt}" '
            f'width="{width}" height="{height}" loading="lazy">'
            f'<div class="numbers">{table(state.numbers)}</div></div>'
        )
    value = html.escape(found.states[found.start].value)
    self.body.append(
        f'<div class="explorer" role="group" aria-label="{name}">'
        f"<p>{name}, with one of its controls: {html.escape(found.control)}. {found.note} "
        "A running notebook has all of them.</p>"
        f"<label hidden><span>{html.escape(found.control)}</span>"
        f'<input type="range" min="0" max="{len(found.states) - 1}" step="1" '
        f'value="{found.start}" autocomplete="off" aria-valuetext="{value}">'
        f"<output>{value}</output></label>{''.join(parts)}</div>"
    )
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_node(explorer, html=(visit, None))
    app.add_transform(Explorers)
    return {"parallel_read_safe": True, "parallel_write_safe": False}
