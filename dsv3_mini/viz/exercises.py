"""What the result of an exercise looks like: the target first, then the learner's own.

Why: a picture says what a function is for, before it is written. It is drawn from the oracle as
long as an attempt is not solved, and from the attempt afterwards, so that the learner sees that
nothing was painted in advance. An exercise gives plain data; ``DRAW`` has a function for each kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dsv3_mini.course.checking import judge
from dsv3_mini.course.exercises import exercise, in_lines
from dsv3_mini.viz.plots import lines
from dsv3_mini.viz.style import COLOURS, new_figure, styled


def show_result(identifier: str, attempt: Any) -> Figure:
    """Say in words what the picture shows and whose it is, and return the picture.

    ValueError for an unknown identifier.
    """
    asked = exercise(identifier)
    solved = judge(asked, attempt).state == "solved"
    whose = "drawn by your function" if solved else "what it should look like"
    print(in_lines(f"{identifier}, {whose}: {asked.alt}"))
    drawing = asked.picture(attempt if solved else asked.oracle)
    return DRAW[drawing.kind](**drawing.arguments)


def maps(
    panels: Mapping[str, Any], rows: str, columns: str, unit: str, ticks: Sequence[str] = ()
) -> Figure:
    """Tensors (rows, columns) side by side on one scale of colours; ``ticks`` names the rows."""
    values = {title: np.asarray(panel, dtype=float) for title, panel in panels.items()}
    low = min(panel.min() for panel in values.values())
    high = max(panel.max() for panel in values.values())
    with styled():
        figure = new_figure(8.6, 3.2)
        every = figure.subplots(1, len(values), sharey=True, squeeze=False)[0]
        for axes, (title, panel) in zip(every, values.items(), strict=True):
            # Its lightness only rises, so the order survives grey print and colour-blindness.
            shown = axes.imshow(panel, cmap="cividis", vmin=low, vmax=high, aspect="auto")
            axes.set(title=title, xlabel=columns)
            axes.grid(visible=False)
        every[0].set_ylabel(rows)
        if ticks:
            every[0].set_yticks(range(len(ticks)), ticks)
        figure.colorbar(shown, ax=list(every), label=unit)
    return figure


def bars(groups: Mapping[str, float], ylabel: str, title: str = "") -> Figure:
    """One bar a group, with its value above it."""
    with styled():
        figure = new_figure(8.6, 3.2)
        axes = figure.add_subplot()
        drawn = axes.bar(list(groups), list(groups.values()), color=COLOURS[0], width=0.6)
        shown = [f"{v:,.0f}" if v == int(v) else f"{v:,.3g}" for v in groups.values()]
        axes.bar_label(drawn, labels=shown, padding=2)
        axes.set(ylabel=ylabel, title=title)
        axes.margins(y=0.12)
        axes.grid(axis="x", visible=False)
    return figure


DRAW: dict[str, Callable[..., Figure]] = {"lines": lines, "maps": maps, "bars": bars}
