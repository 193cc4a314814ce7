"""One picture: ratios as dots with their spread, and how our times grow beside the operations."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from dsv3_mini.viz.style import COLOURS, INK, new_figure, styled
from tests.bench.growth import Curve
from tests.bench.report import headline
from tests.bench.results import Results

MARKERS = "os^DvPX"


def draw(results: Results) -> Figure:
    """Left: everything raced at the most threads. Right: a panel for each curve."""
    with styled():
        rows = max(len(rows_of(results)), 1)
        panels = max(len(results.curves), 1)
        deep = -(-panels // 2)
        figure = new_figure(15, max(0.27 * rows + 2.2, 2.3 * deep + 0.8))
        halves: Any = figure.subfigures(1, 2, width_ratios=[1.15, 1], wspace=0.03)
        left, right = halves
        ratios(left.add_subplot(), results)
        grid = right.subplots(deep, 2, squeeze=False).flatten()
        for axes, curve in zip(grid, results.curves, strict=False):
            growth(axes, curve)
        for axes in grid[len(results.curves) :]:
            axes.set_visible(False)
        right.suptitle("How our times grow; dashed: the operations, through the last point")
    return figure


Row = tuple[str, dict[str, tuple[float, float, float]]]


def rows_of(results: Results) -> list[Row]:
    """A label, and by implementation the ratio to ours: median, smallest, largest."""
    rows: list[Row] = []
    races, most_held = headline(results)
    for race in races:
        others = [name for name in race.seconds if name != race.first]
        rows.append((race.label, {name: race.ratio(name) for name in others}))
    for held in most_held:  # a cache's ratio is the same at every context
        ratio = {name: held.ratio(name) for name in list(held.nbytes)[1:]}
        rows.append((held.label, {name: (r, r, r) for name, r in ratio.items()}))
    return rows


def ratios(axes: Axes, results: Results) -> None:
    """Dots right of the line are slower, or larger, than ours."""
    rows = rows_of(results)
    names = list(dict.fromkeys(name for _, others in rows for name in others))
    for index, name in enumerate(names):
        # Below each other in their row, however many others there are elsewhere.
        found = [
            (at + (list(others).index(name) - (len(others) - 1) / 2) * 0.18, others[name])
            for at, (_, others) in enumerate(rows)
            if name in others
        ]
        heights = [height for height, _ in found]
        middle = [ratio[0] for _, ratio in found]
        low = [ratio[0] - ratio[1] for _, ratio in found]
        high = [ratio[2] - ratio[0] for _, ratio in found]
        axes.errorbar(
            middle, heights, xerr=[low, high], fmt=MARKERS[index % 7], markersize=5,
            color=COLOURS[index % 5], markeredgecolor=INK, markeredgewidth=0.5, elinewidth=1.2,
            label=name,
        )  # fmt: skip
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=12))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    threads = "1 thread" if results.most_threads == 1 else f"{results.most_threads} threads"
    axes.set_xlabel(f"time (or bytes) of the others, in multiples of dsv3_mini's; {threads}")
    axes.figure.legend(loc="outside upper center", ncols=3, frameon=False)


def growth(axes: Axes, curve: Curve) -> None:
    """Our times on double logarithmic axes, and the operations in the unit that makes ends meet."""
    unit = curve.seconds[-1] / curve.operations[-1]
    milliseconds = [1e3 * seconds for seconds in curve.seconds]
    axes.plot(curve.x, milliseconds, "o-", color=COLOURS[0], markersize=4.5)
    expected = [1e3 * unit * count for count in curve.operations]
    axes.plot(curve.x, expected, "--", color=COLOURS[1])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(curve.x)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    # At least a factor of 8, or noise would fill the panel.
    every = [*milliseconds, *expected]
    middle, half = math.sqrt(min(every) * max(every)), math.sqrt(max(8, max(every) / min(every)))
    axes.set_ylim(middle / half / 1.1, middle * half * 1.1)
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5), numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    measured, counted = curve.slopes()
    axes.set_title(f"{curve.title}\nslope {measured:.2f}, operations {counted:.2f}", fontsize=10)
    axes.set(xlabel=curve.axis, ylabel="ms")
