"""MathJax from a package on this machine, and of it only what a page can ask for."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.fileutil import copy_asset

NEEDED = ("tex-chtml.js", "output/chtml/fonts/woff-v2", "input/tex/extensions")


def copy(app: Sphinx, error: Exception | None) -> None:
    """Put MathJax beside the pages. ExtensionError where its package is not installed."""
    if error or app.builder.format != "html":
        return
    package = find_spec("sphinx-mathjax-offline")
    if package is None or package.origin is None:
        raise ExtensionError("sphinx-mathjax-offline is missing; install requirements.txt")
    source = Path(package.origin).parent / "static" / "mathjax"
    for part in NEEDED:
        target = app.outdir / "_static" / "mathjax" / part
        copy_asset(source / part, target.parent if (source / part).is_file() else target)


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.config.mathjax_path = "mathjax/tex-chtml.js"
    # The menu could load more parts, which are not there. Wide formulas scroll, so a key must reach
    # them.
    app.config.mathjax3_config = {"options": {"enableMenu": False}}
    app.connect("build-finished", copy)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
