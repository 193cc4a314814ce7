"""The load of every expert, moving while a model trains, and the reader's hand on the controls.

Why live: that a router collapses when it is left alone, that a bias pulls it back within some
hundred steps, and that a change of text unbalances it again are three events in time. A curve of a
finished run tells that they happened; causing them tells why.

A thin shell: ``LiveRun`` trains, ``load_svg`` draws its records, and here are the buttons. The
pictures are made in the training thread, between two steps, so that none is of a half-done step.
"""

from __future__ import annotations

import html
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import ipywidgets as widgets
from matplotlib.figure import Figure

from dsv3_mini.viz.live_run import BIAS_MODES, LOSS_MODES, MODES, LiveRun
from dsv3_mini.viz.load_picture import load_figure, load_svg

__all__ = ["LiveBalance", "LiveRun"]

ALPHAS = (0.0001, 0.001, 0.01, 0.1)


class LiveBalance(widgets.VBox):  # type: ignore[misc]
    """Buttons on a LiveRun, and its loads as they move.

    At most ``per_second`` pictures are made, at most ``max_frames`` from a start to its end (spread
    over its steps, the last one kept for the end), and none while the one before was slow to make
    or to send: a picture is left out, never queued.
    """

    def __init__(self, run: LiveRun, max_frames: int = 200, per_second: float = 8.0) -> None:
        self.run, self.max_frames, self.per_second = run, max_frames, per_second
        if not (max_frames >= 1 and per_second > 0):
            raise ValueError(f"{max_frames} frames, {per_second} a second; expected 1 and above 0")
        self.frames = self._end = self._drawn = 0
        self._next = 0.0
        self._saying = threading.RLock()  # both threads say what is going on; the last one is right
        self.image, self.status = widgets.HTML(layout={"width": "100%"}), widgets.HTML()
        wide, label = {"width": "auto"}, {"description_width": "initial"}
        self.toggle = widgets.Button(description="Start", layout={"width": "90px"})
        self.halt = widgets.Button(description="Stop", layout={"width": "90px"})
        self.mode = widgets.Dropdown(
            options=MODES, value=run.mode, description="balance by", style=label, layout=wide
        )
        self.gamma = widgets.FloatLogSlider(
            value=run.gamma, base=10, min=-4, max=-1, step=0.1, description="gamma", style=label,
            readout_format=".4f", continuous_update=False, layout={"width": "320px"},
        )  # fmt: skip
        self.alpha = widgets.Dropdown(
            options=sorted({*ALPHAS, run.alpha}), value=run.alpha, description="alpha",
            style=label, layout=wide,
        )  # fmt: skip
        self.domain = widgets.Button(layout={"width": "170px"}, tooltip="Train on other text")
        self.reset = widgets.Button(description="Set biases to 0", layout={"width": "140px"})
        run.gamma = self.gamma.value  # the slider has cut it to its own range
        for name in ("mode", "gamma", "alpha"):
            getattr(self, name).observe(partial(self._changed, name), names="value")
        actions: dict[widgets.Button, Callable[[], object]] = {
            self.toggle: self._toggle, self.halt: run.stop, self.reset: run.reset_bias,
            self.domain: self._shift,
        }  # fmt: skip
        for button in actions:
            button.on_click(lambda button: self._press(actions[button]))
        row = {"flex_flow": "row wrap", "grid_gap": "4px 12px"}
        first = widgets.HBox([self.toggle, self.halt, self.mode, self.domain, self.reset])
        second = widgets.HBox([self.gamma, self.alpha, self.status])
        first.layout = second.layout = widgets.Layout(**row)
        super().__init__([first, second, self.image])
        run.watch = self._watch
        self._draw()

    def picture(self) -> Figure:
        """The last state as a figure, which a notebook keeps as PNG."""
        return load_figure(self.run.records, list(self.run.changes))

    def close(self) -> None:
        """Stop the run and take the controls away."""
        self.run.stop()
        super().close()

    def __repr__(self) -> str:
        return "LiveBalance: press Start, then move the controls while it trains"

    def _changed(self, name: str, change: dict[str, Any]) -> None:
        # Only the control that moved: a cell may have set another one on the run itself.
        self.run.set(**{name: change["new"]})
        self._say()

    def _press(self, action: Callable[[], object]) -> None:
        action()
        self._say()

    def _toggle(self) -> None:
        {"running": self.run.pause, "paused": self.run.resume}.get(self.run.phase, self.run.start)()

    def _shift(self) -> None:
        order = (None, *self.run.corpus.domains)
        self.run.domain = order[(order.index(self.run.domain) + 1) % len(order)]

    def _watch(self) -> None:
        run, now = self.run, time.perf_counter()
        if run.end != self._end:
            self._end, self.frames = run.end, 0
        rests = run.phase != "running"
        due = now >= self._next and run.step - self._drawn >= run.total // self.max_frames
        if (rests or due) and self.frames < self.max_frames - (run.phase != "ended"):
            self._draw()
        elif rests:
            self._say()

    def _draw(self) -> None:
        began = time.perf_counter()
        self._say()
        self.image.value = load_svg(self.run.records, list(self.run.changes))
        self.frames, self._drawn = self.frames + 1, self.run.step
        cost = time.perf_counter() - began
        self._next = began + max(1 / self.per_second, 10 * cost)

    def _say(self) -> None:
        with self._saying:
            self._say_now(self.run)

    def _say_now(self, run: LiveRun) -> None:
        names = {"ready": "Start", "running": "Pause", "paused": "Resume", "ended": "Go on"}
        self.toggle.description = names[run.phase]
        self.halt.disabled = not run.alive
        self.gamma.disabled = run.mode not in BIAS_MODES
        self.alpha.disabled = run.mode not in LOSS_MODES
        self.domain.description = f"text: {run.domain or 'all'}"
        words = (
            f"{run.phase}, step {run.step:,} of {run.end or run.total:,}, "
            f"{run.steps_per_second:.0f} steps/s, {run.seconds:.1f} s; "
            f"balance by {run.mode} since step {run.mode_since:,}"
        )
        if run.error is not None:
            problem = html.escape(f"{type(run.error).__name__}: {run.error}", quote=False)
            words = f"<b>Training failed.</b> {problem} ({words})"
        self.status.value = words
