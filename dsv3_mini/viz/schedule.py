"""Pipeline schedules as Gantt charts: a row a device, a box a chunk, and the gaps are the bubbles.

Why one time axis for all: the same work ends sooner where the gaps are smaller, and that is what a
reader should see first. A kind of chunk is told by its letter and by how dark it is, and a
micro-batch that entered at the last device by a line under the letter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dsv3_mini.course.pipeline import Task, bubble
from dsv3_mini.viz.style import COLOURS, INK, new_figure, styled

LOOK = {  # fill, letter, meaning
    "F": ("#d3dfee", INK, "F forward"),  # lighter than COLOURS[4], to differ from W in grey
    "B": (COLOURS[0], "white", "B full backward"),
    "I": (COLOURS[2], "white", "I its part for the input"),
    "W": (COLOURS[3], INK, "W its part for the weights"),
}
IDLE: dict[str, Any] = dict(facecolor="white", edgecolor="#a6a6a6", hatch="////", linewidth=0)


def picture(schedules: Mapping[str, Sequence[Task]]) -> Figure:
    """The tasks of each named schedule, above each other on one time axis.

    Overlapped chunks share the height of a row. The number at its right is the idle time of that
    device until the schedule ends. Raises ValueError if there is nothing to draw.
    """
    if not schedules or not all(schedules.values()):
        raise ValueError("nothing to draw; expected names with tasks: {'1F1B': simulate(...)}")
    rows = [1 + max(task.device for task in tasks) for tasks in schedules.values()]
    end = max(task.end for tasks in schedules.values() for task in tasks)
    with styled():
        figure = new_figure(13.0, 0.32 * sum(rows) + 0.5 * len(rows) + 1.0)
        grid = figure.subplots(len(rows), sharex=True, squeeze=False, height_ratios=rows)
        for ax, (name, tasks) in zip(grid[:, 0], schedules.items(), strict=True):
            _chart(ax, name, tasks)
        ax.set(xlim=(0, 1.04 * end), xlabel="time (in the unit of the durations)")
        keys = [Patch(facecolor=fill, label=words) for fill, _, words in LOOK.values()]
        keys.append(Patch(**IDLE, label="idle (bubble)"))
        steps = [task.step for tasks in schedules.values() for task in tasks]
        if any(chunk.direction < 0 for step in steps for chunk in step):
            keys.append(Patch(alpha=0, label="underlined: entered at the last device"))
        figure.legend(handles=keys, loc="outside upper center", ncols=len(keys), frameon=False)
    return figure


def _chart(ax: Axes, name: str, tasks: Sequence[Task]) -> None:
    idle, end = bubble(tasks), max(task.end for task in tasks)
    ax.barh(range(len(idle)), end, height=0.9, **IDLE)
    for device, step, start, stop in tasks:
        height = 0.9 / len(step)
        for level, chunk in enumerate(step):
            y, x = device - 0.45 + (level + 0.5) * height, (start + stop) / 2
            fill, ink, _ = LOOK[chunk.kind]
            ax.barh(y, stop - start, height, start, color=fill, edgecolor="white", linewidth=0.6)
            ax.text(x, y, chunk.kind, color=ink, fontsize=9, ha="center", va="center_baseline")
            if chunk.direction < 0:
                inset = 0.15 * (stop - start)
                ax.hlines(y + 0.42 * height, start + inset, stop - inset, color=ink, linewidth=1.2)
    for device, time in enumerate(idle):
        ax.text(end, device, f" {time:g}", va="center", fontsize=9)
    ax.text(end, -0.85, " idle", va="center", fontsize=9)
    ax.set_title(f"{name}: ends at {end:g}", loc="left")
    ax.set(ylim=(len(idle) - 0.4, -0.6), ylabel="device", yticks=range(len(idle)))
    ax.grid(visible=False)
