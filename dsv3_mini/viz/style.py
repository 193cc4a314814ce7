"""One look for every figure: colours that differ in lightness too, lines that differ in dashes.

Why: a reader may be colour-blind, or may have printed the page. So no figure tells two things
apart by hue alone, text is at least 9 points, and every axis has a unit.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK = "#1a1a1a"
GRID = "#d9d9d9"
# From dark to light: still in order when printed in grey.
COLOURS = ("#1b2a5e", "#b5423c", "#2c8c8c", "#d99a2b", "#9fb8d8")
DASHES = ("-", "--", "-.", ":", (0, (1, 1)))

STYLE: dict[str, Any] = {
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "axes.labelsize": 10.0,
    "xtick.labelsize": 9.0,
    "ytick.labelsize": 9.0,
    "legend.fontsize": 9.0,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "figure.facecolor": "white",
    "svg.hashsalt": "dsv3_mini",
    "svg.fonttype": "path",
}


@contextmanager
def styled() -> Iterator[None]:
    """Draw with the project's style, leaving the reader's own settings alone."""
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type,unused-ignore]
        yield


class Picture(Figure):
    """A figure that a notebook shows as PNG when it is the last value of a cell."""

    def _repr_png_(self) -> bytes:
        return png(self)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that belongs to no window and no pyplot state."""
    figure = Picture(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure, dpi: int = 100) -> bytes:
    """The figure as PNG bytes, for an Image widget or a display."""
    buffer = io.BytesIO()
    with styled():
        figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()
