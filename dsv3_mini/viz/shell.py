"""One shell for every explorer: controls on top, below them what two plain functions make of them.

Why so thin: an explorer is only as trustworthy as its numbers. So a picture and a table come from
functions of plain values, which a test, a static notebook or a reader can call without any widget;
all that is left here is to call them again when a control moves. Values that cannot work are
refused by the package itself, and its message is shown while picture and numbers stay as they were.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from typing import Any

import ipywidgets as widgets
from matplotlib.figure import Figure

from dsv3_mini.viz.style import png

ROWS = 16  # in one table; more numbers go into another table beside it
LONGEST_REPR = 110  # characters; a notebook cuts longer ones


class Explorer(widgets.VBox):  # type: ignore[misc]
    """Controls by name, and the figure and the numbers for their values.

    ``draw(**values)`` gives a figure and ``numbers(**values)`` texts by label. ``values`` and
    ``shown`` hold the values and numbers on display, which are the last ones that were possible.
    """

    def __init__(
        self,
        controls: Mapping[str, Any],
        draw: Callable[..., Figure],
        numbers: Callable[..., dict[str, str]],
        alt: str,
    ) -> None:
        self.controls = dict(controls)
        self.values: dict[str, Any] = {}
        self.shown: dict[str, str] = {}
        self.problem, self.numbers = widgets.HTML(), widgets.HTML()
        self.picture = widgets.Image(format="png", layout={"max_width": "100%"})
        # Image sends no alt text to the page, and with a tooltip it is not shown at all.
        caption = widgets.HTML(f"<small>{html.escape(alt, quote=False)}</small>")
        self._draw, self._numbers = draw, numbers
        _line_up(self.controls)
        for control in self.controls.values():
            control.observe(self._changed, names="value")
        grid = {"grid_template_columns": "repeat(auto-fill, minmax(420px, 1fr))"}
        controls_grid = widgets.GridBox(list(self.controls.values()), layout=grid)
        super().__init__([controls_grid, self.problem, self.picture, caption, self.numbers])
        self._changed(None)

    def _changed(self, _: object) -> None:
        values = {name: control.value for name, control in self.controls.items()}
        try:
            shown, picture = self._numbers(**values), png(self._draw(**values))
        except ValueError as error:  # ConfigError is one
            self.problem.value = refusal(error)
            return
        self.values, self.shown = values, shown
        self.problem.value = ""
        self.numbers.value = table(shown)
        self.picture.value = picture

    def __repr__(self) -> str:
        text = f"{type(self).__name__}: "
        for number, (label, value) in enumerate(self.shown.items()):
            more = f"{'; ' if number else ''}{label} = {value}"
            if len(text + more) > LONGEST_REPR:
                break
            text += more
        return text


def refusal(error: ValueError) -> str:
    """What an explorer says, as HTML, where the package refuses its values."""
    return f"<b>Not possible:</b> {html.escape(str(error), quote=False)}"


def table(numbers: Mapping[str, str]) -> str:
    """The numbers as HTML: tables of at most ``ROWS`` rows, side by side where there is room."""
    rows = [
        f"<tr><th scope='row' style='text-align:left;font-weight:normal'>{html.escape(label)}</th>"
        f"<td style='text-align:right'>{html.escape(value)}</td></tr>"
        for label, value in numbers.items()
    ]
    parts = ["".join(rows[start : start + ROWS]) for start in range(0, len(rows), ROWS)]
    tables = (f"<table style='border-spacing:12px 2px'>{part}</table>" for part in parts)
    return f"<div style='display:flex;flex-wrap:wrap;gap:0 24px'>{''.join(tables)}</div>"


def slider(label: str, value: float, low: float, high: float, step: float = 1) -> widgets.Widget:
    """A slider for whole numbers, or for fractions if any of its numbers is one."""
    whole = all(isinstance(number, int) for number in (value, low, high, step))
    kind = widgets.IntSlider if whole else widgets.FloatSlider
    look = {} if whole else {"readout_format": ".1f"}
    return kind(value=value, min=low, max=high, step=step, description=label, **look)


def choice(label: str, value: Any, options: Mapping[str, Any]) -> widgets.SelectionSlider:
    """A slider over named values, for steps that no even spacing would give."""
    return widgets.SelectionSlider(description=label, value=value, options=list(options.items()))


def _line_up(controls: Mapping[str, Any]) -> None:
    # One label width for all, with room for the longest at the notebook's 13 pixels.
    width = 8 * max((len(control.description) for control in controls.values()), default=0) + 14
    for control in controls.values():
        control.style.description_width = f"{width}px"
        control.layout.width = "auto"
        # Drawing takes up to a fifth of a second: once when a slider is let go, not at every pixel.
        if control.has_trait("continuous_update"):
            control.continuous_update = False
