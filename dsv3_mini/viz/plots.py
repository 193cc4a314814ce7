"""Plain plots that the notebooks share: lines with labels at their ends, seeds as dots, shares as
heat maps, and the roofline.

Why labels at the ends: a reader should not have to match five greys with a legend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from dsv3_mini.measure import Ceilings
from dsv3_mini.viz.style import COLOURS, DASHES, INK, new_figure, styled

MARKERS = "os^DvP"


def lines(
    x: Sequence[float], curves: Mapping[str, Sequence[float]], xlabel: str, ylabel: str,
    title: str = "", logx: bool = False, logy: bool = False, marks: bool = True,
) -> Figure:  # fmt: skip
    """One line a curve over the same ``x``, each named where it ends."""
    with styled():
        figure = new_figure(8.6, 4.0)
        axes = figure.add_subplot()
        for index, values in enumerate(curves.values()):
            axes.plot(
                x, values, color=COLOURS[index % 5], linestyle=DASHES[(index + index // 5) % 5],
                marker=MARKERS[index % 6] if marks else "", markersize=4.5,
            )  # fmt: skip
        _scales(axes, x, logx, logy)
        axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
        _label_ends(axes, x[-1], {name: values[-1] for name, values in curves.items()})
    return figure


def _scales(axes: Axes, x: Sequence[float], logx: bool, logy: bool) -> None:
    if logx:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
        if len(x) <= 9:
            axes.set_xticks(list(x))
    if logy:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))


def _label_ends(axes: Axes, x: float, ends: Mapping[str, float]) -> None:
    # In points, so that names which would overlap can be moved apart.
    low, high = axes.get_ylim()
    height = 230.0
    where = axes.yaxis.get_transform().transform(np.array([low, high, *ends.values()]))
    heights = (where[2:] - where[0]) / (where[1] - where[0]) * height
    taken = -1e9
    for position in np.argsort(heights):
        name, value = list(ends.items())[position]
        taken = max(heights[position], taken + 13.0)
        axes.annotate(
            name, (x, value), xytext=(8, taken - heights[position]), textcoords="offset points",
            va="center", fontsize=9, color=INK, annotation_clip=False,
        )  # fmt: skip


def dots(
    groups: Mapping[str, Sequence[float]], ylabel: str, title: str = "",
    bar: tuple[str, float] | None = None, logy: bool = False,
) -> Figure:  # fmt: skip
    """Every value of a group as a dot (one a seed), their mean as a dash; ``bar`` names a level."""
    with styled():
        figure = new_figure(8.6, 3.6)
        axes = figure.add_subplot()
        for place, values in enumerate(groups.values()):
            spread = np.linspace(-0.12, 0.12, len(values)) if len(values) > 1 else [0.0]
            axes.plot([place + s for s in spread], values, "o", color=COLOURS[0], markersize=6)
            axes.plot([place - 0.25, place + 0.25], [np.mean(values)] * 2, color=COLOURS[1])
        if logy:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        if bar is not None:
            axes.set_ylim(top=max(axes.get_ylim()[1], bar[1] * (2 if logy else 1.1)))
            _level(axes, *bar, COLOURS[3])
        axes.set_xticks(range(len(groups)), list(groups))
        axes.set_xlim(-0.6, len(groups) - 0.4)
        axes.set(ylabel=ylabel, title=title)
        axes.grid(axis="x", visible=False)
    return figure


def stacks(
    columns: Mapping[str, Mapping[str, float]], ylabel: str, title: str = "",
    bar: tuple[str, float] | None = None,
) -> Figure:  # fmt: skip
    """A column a name, its parts on top of one another with their values; ``bar`` is a level."""
    with styled():
        figure = new_figure(8.6, 3.8)
        axes = figure.add_subplot()
        names = list(next(iter(columns.values())))
        below = np.zeros(len(columns))
        highest = max(sum(parts.values()) for parts in columns.values())
        for index, name in enumerate(names):
            values = np.array([parts[name] for parts in columns.values()])
            colour = COLOURS[(0, 4, 2, 3, 1)[index % 5]]
            shown = axes.bar(range(len(columns)), values, 0.6, below, color=colour, label=name)
            dark = index % 5 in (0, 2)
            labels = [f"{value:,.1f}" if value > highest / 15 else "" for value in values]
            axes.bar_label(
                shown, labels, label_type="center", color="white" if dark else INK, fontsize=9
            )
            below += values
        for place, total in enumerate(below):
            axes.annotate(
                f"{total:,.1f}", (place, total), xytext=(0, 3), textcoords="offset points",
                ha="center", fontsize=10, fontweight="bold",
            )  # fmt: skip
        if bar is not None:
            _level(axes, *bar, COLOURS[1])
        axes.set_xticks(range(len(columns)), list(columns))
        axes.set_ylim(top=max(highest, bar[1] if bar else 0) * 1.12)
        axes.set(ylabel=ylabel, title=title)
        axes.grid(axis="x", visible=False)
        axes.legend(loc="upper right", reverse=True, frameon=False, bbox_to_anchor=(1.0, 1.0))
    return figure


def _level(axes: Axes, name: str, height: float, colour: str) -> None:
    axes.axhline(height, color=colour, linestyle="--", linewidth=1.2)
    axes.annotate(
        fill(name, 14), (1, height), xycoords=("axes fraction", "data"), xytext=(5, 0),
        textcoords="offset points", va="center", fontsize=9,
    )  # fmt: skip


def heatmaps(
    panels: Mapping[str, Sequence[Sequence[float]]], rows: Sequence[str], xlabel: str, unit: str
) -> Figure:
    """One map a panel, all on one scale; the numbers of a row are its columns' values."""
    highest = max(max(map(max, values)) for values in panels.values())
    with styled():
        figure = new_figure(8.6, 0.62 + (0.45 + 0.28 * len(rows)) * len(panels))
        every = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (name, values) in zip(every, panels.items(), strict=True):
            shown = axes.imshow(values, cmap="Blues", vmin=0, vmax=highest, aspect="auto")
            axes.set_title(name)
            axes.set_yticks(range(len(rows)), rows)
            axes.grid(visible=False)
        every[-1].set_xticks(range(len(values[0])))
        every[-1].set_xlabel(xlabel)
        figure.colorbar(shown, ax=list(every), label=unit)
    return figure


def roofline(ceilings: Ceilings, points: Mapping[str, tuple[float, float, float]]) -> Figure:
    """Both ceilings of this machine, and work on it: name to (operations, bytes, seconds)."""
    with styled():
        figure = new_figure(8.6, 4.2)
        axes = figure.add_subplot()
        intensity = {name: flops / read for name, (flops, read, _) in points.items()}
        span = np.geomspace(
            min(*intensity.values(), ceilings.ridge) / 4,
            max(*intensity.values(), ceilings.ridge) * 8, 200,
        )  # fmt: skip
        roof = np.minimum(span * ceilings.bandwidth, ceilings.flops) / 1e9
        axes.plot(span, roof, color=COLOURS[0])
        axes.text(
            span[-1], roof[-1] * 1.12, f"{ceilings.flops / 1e9:.0f} GFLOP/s", ha="right", fontsize=9
        )
        axes.text(span[0] * 1.1, roof[0] * 2.3, f"{ceilings.bandwidth / 1e9:.0f} GB/s", fontsize=9)
        for index, (name, (flops, _, seconds)) in enumerate(points.items()):
            speed = flops / seconds / 1e9
            axes.plot(intensity[name], speed, MARKERS[index % 6], color=COLOURS[1], markersize=8)
            axes.annotate(
                name, (intensity[name], speed), xytext=(9, -11), textcoords="offset points",
                fontsize=9,
            )  # fmt: skip
        axes.set(
            xscale="log", yscale="log", xlabel="operations per byte read (FLOP/B)",
            ylabel="speed (GFLOP/s)", title="What bounds a decode step on this machine",
        )  # fmt: skip
        axes.set_ylim(top=roof.max() * 2.5)
    return figure
