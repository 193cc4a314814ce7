"""A figure that is redrawn while a model trains.

One display is updated, with at most ``frames`` pictures whatever the number of steps, because a
notebook front end (and its test) cannot take thousands.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence

from IPython.display import Image, display
from matplotlib.figure import Figure

from dsv3_mini.train import Record
from dsv3_mini.viz.style import COLOURS, DASHES, new_figure, png, styled


def loss_figure(
    records: Sequence[Record], total: int, bar: float | None = None, note: str = ""
) -> Figure:
    """Losses of the main model and each MTP depth, and MaxVio, against the step.

    ``bar`` draws a level to get under, in nats (the unigram entropy).
    """
    steps = [record.step for record in records]
    depths = len(records[0].mtp_losses) if records else 0
    with styled():
        figure = new_figure(9.5, 3.4)
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        lines = {"next token": [record.loss for record in records]}
        for depth in range(depths):
            lines[f"MTP depth {depth + 1}"] = [record.mtp_losses[depth] for record in records]
        for index, (label, values) in enumerate(lines.items()):
            left.plot(steps, values, color=COLOURS[index], linestyle=DASHES[index], label=label)
        if bar is not None:
            left.axhline(bar, color=COLOURS[3], linewidth=1.2)
            left.text(total, bar, "unigram entropy ", ha="right", va="bottom", fontsize=9)
        left.set(xlim=(0, total), xlabel="step", ylabel="loss (nats per token)", title=note)
        left.legend(frameon=False)
        layers = len(records[0].max_violation) if records else 0
        for layer in range(layers):
            values = [record.max_violation[layer] for record in records]
            name = f"MoE layer {layer + 1}" + (" (MTP)" if layer >= layers - depths else "")
            colour, dash = COLOURS[layer % len(COLOURS)], DASHES[layer % len(DASHES)]
            right.plot(steps, values, color=colour, linestyle=dash, label=name, linewidth=1.2)
        right.set(xlim=(0, total), xlabel="step", ylabel="MaxVio (0 = balanced)")
        right.set_ylim(bottom=0)
        right.legend(frameon=False)
    return figure


def watch(
    records: Iterable[Record], total: int, bar: float | None = None, frames: int = 40
) -> Iterator[Record]:
    """Pass training records through and redraw ``loss_figure`` as they come.

    The title carries the progress and the time left. Interrupting the cell keeps every record
    that was yielded, and the model as it is.
    """
    seen: list[Record] = []
    began = time.perf_counter()
    shown = None
    every = math.ceil(total / frames)
    for record in records:
        seen.append(record)
        if record.step % every == 0 or record.step == total:
            left = (time.perf_counter() - began) / len(seen) * (total - record.step)
            ending = f"about {left:.0f} s left" if record.step < total else "done"
            note = f"step {record.step} of {total}, {ending}"
            picture = Image(png(loss_figure(seen, total, bar, note)))
            if shown is None:
                shown = display(picture, display_id=True)
            else:
                shown.update(picture)
        yield record
