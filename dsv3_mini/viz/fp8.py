"""FP8 numbers on a line, and which matrix of a layer has which format in which product.

Why see it: 256 codes are few enough to draw all of them. In every factor of two there are equally
many, so what is rounded loses the same share whether it is large or small, until the exponent has
no lower value: below that codes are equally far apart, and there are fewer and fewer of them.

``number_line``, ``format_picture`` and ``format_text`` are plain functions of a dtype or of rows
that ``dsv3_mini.course.fp8_formats.formats`` gives.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullLocator
from torch import Tensor, nn

from dsv3_mini.course.fp8_formats import Format, formats
from dsv3_mini.fp8 import E4M3, E5M2, NAMES
from dsv3_mini.viz.style import COLOURS, INK, new_figure, styled

WIDEST = 100  # characters of a line of text
COLUMNS = ("stored", "input", "weight", "gradient")


class Layout(NamedTuple):
    """How many bits exponent and mantissa have, and the bias that is taken off the exponent."""

    name: str
    exponent: int
    mantissa: int
    bias: int

    @property
    def lowest(self) -> int:
        """The power of two of the smallest normal number and of all subnormal ones."""
        return 1 - self.bias


def layout(dtype: torch.dtype) -> Layout:
    """The layout of E4M3 or E5M2, from torch's own account. Raises ValueError for others."""
    if dtype not in NAMES:
        raise ValueError(f"dtype is {dtype}; expected {E4M3} or {E5M2}")
    info = torch.finfo(dtype)
    mantissa = -round(math.log2(info.eps))
    bias = 1 - round(math.log2(info.smallest_normal))
    return Layout(NAMES[dtype], 7 - mantissa, mantissa, bias)


def code_values(dtype: torch.dtype) -> Tensor:
    """What each of the 256 codes stands for, by cast: (256,) fp32, with infinities and NaN."""
    layout(dtype)
    return torch.arange(256, dtype=torch.uint8).view(dtype).float()


def plain(value: float) -> str:
    """A number in full, without a tail of zeros: '448', '0.001953125', '-5.5', 'nan'."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _short(value: float) -> str:
    form = ",.0f" if 1000 <= abs(value) < 1e9 else ".4g" if abs(value) >= 1 else ".3g"
    return f"{value:{form}}".replace("-", "−")


def _powers(dtype: torch.dtype) -> dict[float, str]:
    """Places on a logarithmic axis and their names, from the smallest code to the largest."""
    form, info = layout(dtype), torch.finfo(dtype)
    end, every = math.floor(math.log2(info.max)) - 1, 3 if form.mantissa == 3 else 4
    powers = [form.lowest - form.mantissa, *range(form.lowest, end, every)]
    return {2.0**power: f"2^{power}" for power in powers} | {info.max: f"{info.max:,g}"}


# ----------------------------------------------------------------------------- the number line


def number_line(dtype: torch.dtype = E4M3) -> Figure:
    """All finite codes of a format as ticks: on a linear axis, and the positive ones on a log axis.

    Raises ValueError for a dtype that is no FP8 format.
    """
    form, values = layout(dtype), code_values(dtype)
    finite = values[values.isfinite()]
    left_out = {"NaN": int(values.isnan().sum()), "infinite": int(values.isinf().sum())}
    without = " and ".join(f"{count} {kind}" for kind, count in left_out.items() if count)
    line = sorted(set(finite.tolist()))
    with styled():
        figure = new_figure(8.6, 4.6)
        top, bottom = figure.subplots(2, 1, height_ratios=(4, 5))
        _linear_panel(top, line, form)
        top.set_title(
            f"{form.name}: {len(finite)} of 256 codes are finite, zero twice; left out: {without}"
        )
        _log_panel(bottom, [value for value in line if value > 0], dtype)
    return figure


def _ticks(axes: Axes, values: Sequence[float], height: float, colour: str, width: float) -> None:
    axes.vlines(values, 0, height, colors=colour, linewidths=width)
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)


def _linear_panel(axes: Axes, line: Sequence[float], form: Layout) -> None:
    largest = line[-1]
    _ticks(axes, line, 1, COLOURS[0], 0.9)
    power = 2.0 ** math.floor(math.log2(largest))
    step = power / 2**form.mantissa
    _span(axes, power, largest, 1.14, f"{step:,g} apart")
    _span(axes, power / 2, power, 1.14, f"{step / 2:,g} apart")
    near = sum(abs(value) <= 1 for value in line)
    axes.annotate(
        f"{near} of these {len(line)} numbers lie within 1 of zero", (0, 1.02),
        (-0.12 * largest, 1.35), fontsize=9, va="center", ha="right",
        arrowprops={"arrowstyle": "->", "color": INK, "shrinkA": 2, "shrinkB": 0},
    )  # fmt: skip
    places = [-largest, -largest / 2, 0, largest / 2, largest]
    axes.set_xticks(places, [f"{place:,g}".replace("-", "−") for place in places])
    axes.set(ylim=(0, 1.6), xlim=(-1.03 * largest, 1.03 * largest))
    axes.set_xlabel(f"number (no unit, linear); the largest is {largest:,g}")


_BOTH = {"arrowstyle": "<->", "color": INK, "shrinkA": 0, "shrinkB": 0, "linewidth": 0.9}


def _span(axes: Axes, low: float, high: float, height: float, text: str) -> None:
    axes.annotate("", (low, height), (high, height), arrowprops=_BOTH)
    log = axes.get_xscale() == "log"
    middle = math.sqrt(low * high) if log else (low + high) / 2
    axes.text(middle, height + 0.06, text, ha="center", va="bottom", fontsize=9)


def _log_panel(axes: Axes, line: Sequence[float], dtype: torch.dtype) -> None:
    form = layout(dtype)
    smallest, normal, largest = line[0], 2.0**form.lowest, line[-1]
    below = [value for value in line if value < normal]
    axes.set_xscale("log", base=2)
    _ticks(axes, line[len(below) :], 1, COLOURS[0], 1.1)
    _ticks(axes, below, 0.7, COLOURS[1], 2.2)
    counts = Counter(math.floor(math.log2(value)) for value in line)
    for power, count in counts.items():
        axes.text(2 ** (power + 0.5), 1.04, str(count), ha="center", va="bottom", fontsize=9)
    lowest = min(counts)
    subnormal = f"subnormal, from 2^{lowest}:\n{len(below)} codes, 2^{lowest} apart"
    axes.annotate("", (smallest, 1.4), (normal, 1.4), arrowprops=_BOTH)
    axes.text(smallest, 1.46, subnormal, ha="left", va="bottom", fontsize=9)
    each = 2**form.mantissa
    fewer = f" ({counts[max(counts)]} in the last)" if counts[max(counts)] < each else ""
    span = f"normal, from 2^{form.lowest} to {largest:,g}:\n"
    _span(axes, normal, largest, 1.4, f"{span}{each} codes in each factor of two{fewer}")
    ticks = _powers(dtype)
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlim=(smallest * 0.8, 2.0 ** (max(counts) + 1)), ylim=(0, 2.1))
    axes.set_xlabel("positive number (no unit, logarithmic); above: codes in each factor of two")


def place_figure(
    value: float, dtype: torch.dtype = E4M3, wanted: float | None = None, title: str = ""
) -> Figure:
    """Where a code's number lies: its magnitude among all of them, itself among its neighbours.

    A cross marks ``wanted``, which was rounded to it; infinity and NaN have no place.
    """
    finite = sorted(set(code_values(dtype)[code_values(dtype).isfinite()].tolist()))
    with styled():
        figure = new_figure(8.6, 3.0)
        top, bottom = figure.subplots(2, 1)
        _magnitude_panel(top, [number for number in finite if number >= 0], dtype)
        top.set_title(title)
        if not math.isfinite(value):
            bottom.text(0.5, 0.5, "this code has no place on the line", ha="center", fontsize=10)
            bottom.axis("off")
            return figure
        middle, around = finite.index(value), layout(dtype).mantissa  # fewer where they are longer
        near = finite[max(middle - around, 0) : middle + around + 1]
        _ticks(bottom, near, 1, COLOURS[2], 1.6)
        for axes, place in ((top, abs(value)), (bottom, value)):
            axes.plot(place, 0.5, "D", color=COLOURS[0], markersize=9, mec="white", zorder=3)
        bottom.set_xticks(near, [_short(number) for number in near])
        bottom.margins(x=0.06)
        bottom.set(ylim=(0, 1.8), xlabel="the nearest codes (no unit, linear)")
        if wanted is not None:
            _wanted(bottom, wanted, near)
    return figure


def _magnitude_panel(axes: Axes, line: Sequence[float], dtype: torch.dtype) -> None:
    axes.set_xscale("symlog", base=2, linthresh=line[1], linscale=2)
    _ticks(axes, line, 1, COLOURS[2], 0.8)
    ticks = {0.0: "0"} | _powers(dtype)
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlim=(-line[1] / 8, 1.5 * line[-1]), ylim=(0, 1.1))
    axes.set_xlabel("magnitude of every code (no unit, logarithmic down to the smallest, then 0)")


def _wanted(axes: Axes, wanted: float, near: Sequence[float]) -> None:
    text = f"typed / scale: {_short(wanted)}"
    right = wanted > (near[0] + near[-1]) / 2
    if near[0] <= wanted <= near[-1]:
        axes.vlines(wanted, 0, 1.4, colors=COLOURS[1], linewidths=1.4, linestyles=":")
        axes.plot(wanted, 1.4, "X", color=COLOURS[1], markersize=8)
        axes.annotate(
            text, (wanted, 1.4), xytext=(-8 if right else 8, 0), textcoords="offset points",
            ha="right" if right else "left", va="center", fontsize=9,
        )  # fmt: skip
    else:
        axes.text(
            0.99 if right else 0.01, 0.78, f"{text} →" if right else f"← {text}", fontsize=9,
            ha="right" if right else "left", va="center", transform=axes.transAxes,
        )  # fmt: skip


# ------------------------------------------------------------------------- formats of a layer


def layer_formats(model: nn.Module, index: int) -> list[Format]:
    """The formats of one layer, and of embedding, final norm and head, in the order of their use.

    'model.layers.<index>.' is left out of the names. Raises ValueError if there is no such layer.
    """
    rows, start = formats(model), f"model.layers.{index}."
    layer = [row._replace(name=row.name.removeprefix(start)) for row in rows
             if row.name.startswith(start)]  # fmt: skip
    if not layer:
        parts = (row.name.split(".") for row in rows if row.name.startswith("model.layers."))
        numbers = sorted({int(part[2]) for part in parts})
        raise ValueError(f"no layer {index} has parameters; expected one of {numbers}")
    others = [row for row in rows if not row.name.startswith("model.layers.")]
    before = [row for row in others if "embed" in row.name]
    head = [row for row in others if "head" in row.name]
    between = [row for row in others if row not in before + head]
    return [*before, *layer, *between, *head]


def format_text(rows: Sequence[Format]) -> str:
    """One line a parameter with its formats in aligned columns, at most 100 characters wide."""
    _check(rows)
    widths = [max(len(column), *(len(getattr(row, column)) for row in rows)) for column in COLUMNS]
    room = WIDEST - sum(width + 2 for width in widths)
    names = [_shorter(row.name, room) for row in rows]
    first = max(len("parameter"), *map(len, names))
    lines = [("parameter", *COLUMNS)]
    lines += [(name, *row[1:]) for name, row in zip(names, rows, strict=True)]
    form = "  ".join(f"{{:{width}}}" for width in (first, *widths))
    return "\n".join(form.format(*line).rstrip() for line in lines)


def format_picture(rows: Sequence[Format]) -> Figure:
    """The same as a table: dark cells are E4M3, hatched ones E5M2, white ones high precision."""
    _check(rows)
    with styled():
        figure = new_figure(8.6, 0.75 + 0.245 * len(rows))
        axes = figure.add_subplot()
        for y, row in enumerate(rows):
            name = _shorter(row.name.removesuffix(".weight"), 34)
            axes.text(-0.04, y + 0.5, name, ha="right", va="center", fontsize=9)
            for x, column in enumerate(COLUMNS):
                _cell(axes, x, y, getattr(row, column))
        heads = ("stored", "input in\nproducts", "weight in\nproducts", "gradient of\nthe output")
        for x, text in enumerate(heads):
            axes.text(x + 0.5, -0.12, text, ha="center", va="bottom", fontsize=9)
        axes.text(-0.04, -0.12, "parameter", ha="right", va="bottom", fontsize=9)
        axes.set(xlim=(-2.0, len(heads)), ylim=(len(rows) + 0.05, -1.6))
        axes.axis("off")
    return figure


def _cell(axes: Axes, x: int, y: int, text: str) -> None:
    look: dict[str, Any] = {"facecolor": "white", "edgecolor": "#8a8a8a", "linewidth": 0.8}
    ink, paper = INK, None
    if text.startswith(NAMES[E4M3]):
        look["facecolor"], ink = COLOURS[0], "white"
    elif text.startswith(NAMES[E5M2]):
        look |= {"facecolor": "white", "edgecolor": COLOURS[1], "hatch": "////"}
        paper = {"facecolor": "white", "pad": 1.2, "linewidth": 0}
    axes.add_patch(Rectangle((x + 0.02, y + 0.05), 0.96, 0.9, **look))
    axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=9, color=ink, bbox=paper)


def _shorter(name: str, room: int) -> str:
    return name if len(name) <= room else f"…{name[len(name) - room + 1 :]}"


def _check(rows: Sequence[Format]) -> None:
    if not rows:
        raise ValueError("no rows to show; expected what formats(model) gives, or a part of it")
