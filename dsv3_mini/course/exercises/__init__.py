"""The exercises. Those of notebook 02 are in ``nb02.py``, or in several modules ``nb02_*.py``.

Each module defines ``EXERCISES``, a tuple of ``Exercise`` whose identifiers begin with its number.
It is found by its name; there is no list to add it to.
"""

from __future__ import annotations

import pkgutil
import textwrap
from importlib import import_module
from typing import Any

from dsv3_mini.course.checking import Exercise, judge


def notebooks() -> dict[str, list[str]]:
    """The notebooks that have exercises, as '02', each with the names of its modules."""
    found: dict[str, list[str]] = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name.startswith("nb"):
            found.setdefault(module.name[2:].partition("_")[0], []).append(module.name)
    return dict(sorted(found.items()))


def exercises(notebook: str) -> list[Exercise]:
    """Those of a notebook, by number. ValueError if it has none."""
    modules = notebooks()
    if notebook not in modules:
        raise ValueError(
            f"notebook {notebook!r} has no exercises; expected one of {', '.join(modules)}"
        )
    loaded = [import_module(f"{__name__}.{name}") for name in modules[notebook]]
    every = [each for module in loaded for each in module.EXERCISES]
    return sorted(every, key=lambda each: each.identifier)


def exercise(identifier: str) -> Exercise:
    """The exercise with this identifier, as '02.1'. ValueError if there is none."""
    of_notebook = exercises(identifier.partition(".")[0])
    for each in of_notebook:
        if each.identifier == identifier:
            return each
    listed = ", ".join(each.identifier for each in of_notebook)
    raise ValueError(f"exercise {identifier!r} does not exist; expected one of {listed}")


def check(identifier: str, attempt: Any) -> bool:
    """Print what is known of ``attempt``, and return whether it solves the exercise.

    The reply says open, solved, or not yet with the kind of mistake. ValueError for an unknown
    identifier only; nothing that an attempt raises comes through.
    """
    verdict = judge(exercise(identifier), attempt)
    print(in_lines(f"{identifier} {verdict}"))
    return verdict.state == "solved"


def in_lines(text: str) -> str:
    """``text`` broken between words; JupyterLab would break an output in the middle of one."""
    return textwrap.fill(text, 92, subsequent_indent="   ", break_on_hyphens=False)
