"""Settings of the site and of the slides. Both are built in the repository's root:

    python -m sphinx -q -W --keep-going -E -c docs -d build/doctrees . build/site
    python -m sphinx -q -W --keep-going -E -c docs -d build/doctrees -b slides . build/slides

-E reads all pages anew: a link may lead to a page that was not there before.

Pages are the committed notebooks (never executed here), the Markdown files and the Python sources.
Nothing is fetched, neither by the build nor by a page.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = "DeepSeek-V3, small enough to read"
author = "The dsv3_mini authors"
project_copyright = author
language = "en"

extensions = [
    "myst_nb",
    "sphinx.ext.mathjax",
    "site_math",
    "site_sources",
    "site_figures",
    "site_explorers",
    "site_slides",
]
root_doc = "docs/index"
include_patterns = [
    "*.md",
    "docs/**.md",
    "tests/mutants/*.md",
    "notebooks/*.ipynb",
    "notebooks/exercises/*.ipynb",
    "dsv3_mini/**.py",
    "tests/test_*.py",
]
exclude_patterns = [
    "build",
    "docs/_*",
    ".*",
    "**/.*",
    "venv",
    "**/__pycache__",
    "**/__init__.py",
    "runs",
]

# Notebooks: outputs as committed; no front end is there for widgets.
nb_execution_mode = "off"
nb_ipywidgets_js: dict[str, dict[str, str]] = {}
nb_merge_streams = True
nb_render_markdown_format = "myst"
kinds = ("image/png", "text/markdown", "text/plain")
nb_mime_priority_overrides = [("slides", kind, place) for place, kind in enumerate(kinds)]

# As GitHub reads Markdown: heading anchors, and formulas between $ or in ```math, where "$5 at $2"
# is money.
myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_fence_as_directive = ["math"]
myst_dmath_allow_space = False
myst_dmath_allow_digits = False
math_numfig = False

html_theme = "furo"
html_title = project
html_favicon = "_static/favicon.svg"
html_static_path = ["_static"]
html_extra_path = ["_root"]
html_css_files = ["site.css"]
html_js_files = [("site.js", {"defer": "defer"})]
html_use_index = False
html_show_sourcelink = False
html_copy_source = False
html_show_copyright = False
html_permalinks_icon = "#"
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"
