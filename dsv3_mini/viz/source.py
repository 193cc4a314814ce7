"""Show a piece of the package from its file, so that a notebook never holds a copy of it."""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path
from typing import Any

from IPython.display import Markdown

PACKAGE = Path(__file__).resolve().parent.parent


def show(thing: Any) -> Markdown:
    """The source of a function or class, with a link to its file, for display in a notebook."""
    file = Path(inspect.getsourcefile(thing) or "").resolve().relative_to(PACKAGE.parent)
    code = textwrap.dedent(inspect.getsource(thing)).rstrip()
    return Markdown(f"[{file.as_posix()}](../{file.as_posix()})\n\n```python\n{code}\n```")
