"""The load of every expert in one picture, made from training records by plain functions.

Why bars of load over mean load: balance is a relation between experts, so 1 is what everybody
should have, whatever the batch. MaxVio (Loss-Free Balancing, eq 4) is the height of the tallest bar
less 1, and a mean over experts would hide the one that holds up all others. Why SVG as text: it
takes a millisecond and ten kilobytes, so that a picture can follow training eight times a second;
a drawn PNG takes 77 ms, the time of several steps of the model it shows.

Curves cover the records that are handed in. They are means over equal ranges of steps, so that a
long history costs no more than ``POINTS``; a range is drawn when it is complete, and stays.

Legend: L MoE layers (MTP last), E experts.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from matplotlib.figure import Figure

from dsv3_mini.train import Record
from dsv3_mini.viz.style import COLOURS, DASHES, GRID, INK, new_figure, styled

POINTS = 200  # of a curve, at most, and one for a range that began before the records
TOP = 4.0  # load over mean load at the upper end of a row; taller bars are cut and say so
OVERLOADED = 2.0  # bars above it are dark and striped
WIDTH, LEFT, RIGHT = 900, 200, 804  # of the picture; of a row of bars
HEAD, ROW, BARS, CHART = 54, 146, 100, 252  # heights: heading, a layer, its bars, the curves
SIZE = 17  # of all text, so that it is still 11 pixels in a picture 600 wide
LINES = ("", "9 5", "9 4 2 4", "2 4", "14 4")  # SVG's dashes, one for each of COLOURS
Changes = Sequence[tuple[int, str]]


@dataclass(frozen=True)
class Point:
    """Means over a range of steps; ``step`` is the mean too."""

    step: float
    loss: float
    max_violation: tuple[float, ...]


def ratios(record: Record) -> list[list[float]]:
    """Load over mean load of each expert, one list a layer; 0 where nothing was counted."""
    rows = [[float(load) for load in row] for row in record.counts_LE.tolist()]
    return [[load * len(row) / (sum(row) or 1.0) for load in row] for row in rows]


def thinned(records: Sequence[Record], points: int = POINTS) -> list[Point]:
    """Means over ranges of 1, 2, 5, 10, ... steps, so wide that about ``points`` remain at most."""
    if not records:
        return []
    span = records[-1].step - records[0].step
    widths = (m * 10**e for e in range(10) for m in (1, 2, 5))
    width = next(w for w in widths if span // w < points)
    groups = [list(group) for _, group in groupby(records, lambda record: record.step // width)]
    if len(groups) > 1 and len(groups[-1]) < width:
        groups.pop()  # half a range is noisier than the rest, and would look like news
    return [
        Point(
            sum(record.step for record in group) / len(group),
            sum(record.loss for record in group) / len(group),
            tuple(
                sum(values) / len(group)
                for values in zip(*(record.max_violation for record in group), strict=True)
            ),
        )
        for group in groups
    ]


def layer_names(record: Record) -> list[str]:
    """What to call each row of ``counts_LE``."""
    layers, depths = len(record.max_violation), len(record.mtp_losses)
    return [f"MoE layer {i + 1}" + " (MTP)" * (i >= layers - depths) for i in range(layers)]


def summary(record: Record) -> str:
    """The picture in words, for those who do not see it."""
    parts = [f"Load of each expert over the mean load, at step {record.step:,}."]
    for name, row, worst in zip(
        layer_names(record), ratios(record), record.max_violation, strict=True
    ):
        most = max(range(len(row)), key=row.__getitem__)
        parts.append(
            f"{name}: MaxVio {worst:.2f}, expert {most} has the most with {row[most]:.2f} times "
            f"the mean, {sum(r > OVERLOADED for r in row)} of {len(row)} have over twice the mean."
        )
    parts.append(f"Below, MaxVio and loss over the steps; loss now {record.loss:.2f} nats a token.")
    return " ".join(parts)


def load_svg(records: Sequence[Record], changes: Changes = ()) -> str:
    """Bars for the last record, and MaxVio and loss over all of them, as one inline SVG.

    ``changes`` are (first step, words) of what was altered while training. Equal records give
    equal text; it has no ids, so that many pictures can stand on one page.
    """
    if not records:
        note = _text(WIDTH / 2, 40, "No step yet: start the run.", anchor="middle")
        return _svg(64, "No training step yet.", [note])
    last, points = records[-1], thinned(records)
    names = layer_names(last)
    title = f"Load of each expert at step {last.step:,}: tokens it got / mean over experts"
    parts = [_text(12, 26, title, weight="bold")]
    for layer, (name, row) in enumerate(zip(names, ratios(last), strict=True)):
        top = HEAD + layer * ROW
        parts += _bars(row, top)
        low = sum(ratio < 0.5 for ratio in row)
        high = sum(ratio > OVERLOADED for ratio in row)
        parts.append(_text(12, top + 18, name, weight="bold"))
        parts.append(_line(12, top + 35, 46, top + 35, *_look(layer)))  # as the curve below
        parts.append(_text(54, top + 40, f"MaxVio {last.max_violation[layer]:.2f}"))
        parts.append(_text(12, top + 62, f"{high} above 2x"))
        parts.append(_text(12, top + 84, f"{low} below 0.5x"))
    below = HEAD + len(names) * ROW
    parts.append(_text((LEFT + RIGHT) / 2, below - 4, "expert", anchor="middle"))
    steps = [point.step for point in points]
    violations = [[point.max_violation[layer] for point in points] for layer in range(len(names))]
    ends = (records[0].step, last.step)
    title = "MaxVio of each layer (0 = balanced)"
    parts += _chart(60, below + 36, title, steps, violations, ends, changes, low=0.0)
    title, losses = f"loss, now {last.loss:.2f} nats per token", [[point.loss for point in points]]
    parts += _chart(510, below + 36, title, steps, losses, ends, changes)
    return _svg(below + CHART, summary(last), parts)


def load_figure(records: Sequence[Record], changes: Changes = ()) -> Figure:
    """The same as a matplotlib figure, for a notebook that keeps the last state as PNG."""
    rows = ratios(records[-1]) if records else []
    with styled():
        figure = new_figure(9.0, 1.5 * len(rows) + 2.8)
        if not records:
            figure.text(0.5, 0.5, "no step yet", ha="center")
            return figure
        grid = figure.add_gridspec(len(rows) + 1, 2, height_ratios=[1.5] * len(rows) + [2.5])
        worst, loss = (figure.add_subplot(grid[len(rows), column]) for column in range(2))
        names, points = layer_names(records[-1]), thinned(records)
        steps = [point.step for point in points]
        for layer, (name, row) in enumerate(zip(names, rows, strict=True)):
            ax = figure.add_subplot(grid[layer, :])
            bars = ax.bar(range(len(row)), row, color=COLOURS[4], edgecolor=INK, linewidth=0.6)
            for bar in bars:
                if bar.get_height() > OVERLOADED:
                    bar.set(facecolor=COLOURS[0], hatch="///", edgecolor="white")
            ax.axhline(1, color=INK, linewidth=1.2)
            ax.text(1.005, 1, "balanced", va="center", transform=ax.get_yaxis_transform())
            ax.set(ylim=(0, max(TOP, *row)), ylabel="load / mean", xlim=(-0.6, len(row) - 0.4))
            ax.set_title(f"{name}: MaxVio {records[-1].max_violation[layer]:.2f}", loc="left")
            ax.grid(axis="x", visible=False)
            ax.set_xticks(range(0, len(row), _every(len(row))))
            colour, dash = COLOURS[layer % len(COLOURS)], DASHES[layer % len(DASHES)]
            values = [point.max_violation[layer] for point in points]
            worst.plot(steps, values, color=colour, linestyle=dash, label=name)
            if layer == len(rows) - 1:
                ax.set_xlabel("expert")
                worst.legend(frameon=False)
        loss.plot(steps, [point.loss for point in points], color=COLOURS[0])
        worst.set(ylim=(0, None), xlabel="step", ylabel="MaxVio (0 = balanced)")
        loss.set(xlabel="step", ylabel="loss (nats per token)")
        for step, words in _inside(changes, records[0].step, records[-1].step):
            for ax in (worst, loss):
                ax.axvline(step, color=INK, linewidth=0.8, linestyle=":")
            above = loss.get_xaxis_transform()
            loss.text(step, 1.01, words, fontsize=9, rotation=20, transform=above)
    return figure


def _svg(height: float, words: str, parts: Iterable[str]) -> str:
    # A ground of its own: a dark theme would leave dark text on dark.
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img" '
        f'aria-label="{html.escape(words)}" font-family="sans-serif" font-size="{SIZE}" '
        f'fill="{INK}" style="display:block;width:100%;max-width:{WIDTH}px;height:auto">'
        f'<rect width="{WIDTH}" height="{height:g}" fill="white"/>{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, words: str, anchor: str = "start", weight: str = "") -> str:
    more = f' text-anchor="{anchor}"' if anchor != "start" else ""
    more += f' font-weight="{weight}"' if weight else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{more}>{html.escape(words, quote=False)}</text>'


def _line(x: float, y: float, to_x: float, to_y: float, colour: str, more: str = "") -> str:
    ends = f'x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}"'
    return f'<line {ends} stroke="{colour}" {more}/>'


def _every(experts: int) -> int:
    return next(step for step in (1, 2, 4, 8, 16, 32, 64, experts) if experts / step <= 20)


def _bars(row: Sequence[float], top: float) -> list[str]:
    unit, floor = BARS / TOP, top + BARS
    slot = (RIGHT - LEFT) / len(row)
    wide, free = slot * 0.76, 0.0
    parts = [_line(LEFT, floor - y * unit, RIGHT, floor - y * unit, GRID) for y in (2, 4)]
    parts += [_text(LEFT - 8, floor - y * unit + 5, f"{y}x", "end") for y in (0, 1, 2, 4)]
    for expert, ratio in enumerate(row):
        x, tall = LEFT + (expert + 0.12) * slot, min(ratio, TOP) * unit
        over = ratio > OVERLOADED
        parts.append(
            f'<rect class="bar" x="{x:.1f}" y="{floor - tall:.2f}" width="{wide:.1f}" '
            f'height="{tall:.2f}" fill="{COLOURS[0] if over else COLOURS[4]}" stroke="{INK}">'
            f"<title>expert {expert}: {ratio:.2f} times the mean</title></rect>"
        )
        if over:  # stripes, drawn one by one because a pattern would need an id
            slant = min(7.0, wide)
            path = "".join(
                f"M{x + 1:.1f} {floor - tall + y + slant:.1f}l{wide - 2:.1f} {-slant:.1f}"
                for y in range(3, int(tall - slant), 8)
            )
            parts.append(f'<path d="{path}" stroke="white" stroke-width="1.6"/>')
        if ratio > TOP + 0.05 and x >= free:
            parts.append(_text(max(x + wide / 2, LEFT + 22), top - 4, f"{ratio:.1f}x", "middle"))
            free = x + 52
        if expert % _every(len(row)) == 0:
            parts.append(_text(x + wide / 2, floor + 18, str(expert), "middle"))
    parts.append(_line(LEFT, floor, RIGHT, floor, INK))
    parts.append(_line(LEFT, floor - unit, RIGHT, floor - unit, INK, 'stroke-width="2"'))
    parts.append(_text(RIGHT + 8, floor - unit + 5, "balanced"))
    return parts


def _chart(
    x: float, y: float, title: str, steps: Sequence[float], lines: Sequence[Sequence[float]],
    ends: tuple[int, int], changes: Changes, low: float | None = None,
) -> list[str]:  # fmt: skip
    wide, tall = 356.0, 124.0
    top = y + 40
    span = next(s for e in range(2, 12) for s in (10**e, 2 * 10**e, 5 * 10**e)
                if s >= ends[1] - ends[0])  # fmt: skip
    known = [value for line in lines for value in line if math.isfinite(value)] or [0.0]
    bottom = min(known) if low is None else low
    tick = _tick(max(known) - bottom, 4)
    bottom = math.floor(bottom / tick) * tick
    height = max(math.ceil((max(known) - bottom) / tick), 1) * tick

    def at(step: float, value: float) -> tuple[float, float]:
        return x + (step - ends[0]) / span * wide, top + tall * (1 - (value - bottom) / height)

    parts = [_text(x - 48, y, title, weight="bold")]
    for k in range(round(height / tick) + 1):
        value = bottom + k * tick
        row = at(0, value)[1]
        parts.append(_line(x, row, x + wide, row, GRID))
        parts.append(_text(x - 8, row + 5, f"{value:.{0 if tick >= 1 else 1}f}", "end"))
    mark = _tick(span, 5)
    for k in range(math.ceil(ends[0] / mark), int((ends[0] + span) / mark) + 1):
        place = at(k * mark, 0)[0]
        parts.append(_line(place, top + tall, place, top + tall + 5, INK))
        parts.append(_text(place, top + tall + 21, f"{k * mark:,.0f}", "middle"))
    parts.append(_line(x, top + tall, x + wide, top + tall, INK))
    parts.append(_text(x + wide, top + tall + 40, "step", "end"))
    free = math.inf
    for step, words in reversed(_inside(changes, *ends)):  # the latest word has the first choice
        place, room = at(step, 0)[0], 9 * len(words)
        parts.append(_line(place, top - 2, place, top + tall, INK, 'stroke-dasharray="2 3"'))
        begin = place + 3 if place + room < x + wide + 20 else place - 3 - room
        if x - 50 < begin and begin + room <= free:
            anchor = "start" if begin > place else "end"
            parts.append(_text(place + (3 if begin > place else -3), top - 6, words, anchor))
            free = begin
    for index in reversed(range(len(lines))):
        colour, look = _look(index)
        pairs = zip(steps, lines[index], strict=True)
        places = [at(step, value) for step, value in pairs if math.isfinite(value)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" {look}/>')
    return parts


def _look(layer: int) -> tuple[str, str]:
    dash = LINES[layer % len(LINES)]
    more = f' stroke-dasharray="{dash}"' if dash else ""
    return COLOURS[layer % len(COLOURS)], f'stroke-width="2.2"{more}'


def _inside(changes: Changes, first: int, last: int) -> list[tuple[int, str]]:
    return [(step, words) for step, words in changes if first < step <= last]


def _tick(span: float, count: int) -> float:
    # The smallest of 1, 2, 5 times a power of ten that cuts ``span`` into at most ``count``.
    least = max(span, 0.1) / count
    power = 10.0 ** math.floor(math.log10(least))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= least * 0.999)
