"""Training in the background, driven by plain attributes and methods, with no widget anywhere.

Why a thread: a notebook whose cell is running hears no slider, so training goes on beside it, and
what the reader changes acts from the next step on. Why no widget: a run that a test or a script can
start, disturb and stop is one whose numbers can be trusted. A step is ``train_step`` on the batch
of its number, so a run whose controls nobody touches has the losses of ``train``.

The learning rate follows ``settings.steps``, however long a run turns out to be; for one without
an end give ``final_ratio=1.0``. A cell that calls ``wait`` hears no control until it returns.
"""

from __future__ import annotations

import atexit
import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dsv3_mini.config import ConfigError
from dsv3_mini.data import Corpus
from dsv3_mini.model import Transformer
from dsv3_mini.train import Record, TrainConfig, TrainState, new_state, train, train_step

MODES = ("off", "bias", "auxiliary loss", "both")
BIAS_MODES, LOSS_MODES = ("bias", "both"), ("auxiliary loss", "both")
REMAINING_ALPHA = 0.0001  # beside the bias V3 keeps this little of the loss (report 4.2)
PATIENCE = 1.8  # seconds to wait for the step that is under way


@dataclass(frozen=True)
class Controls:
    """What the reader holds: one object, so that a step sees all of a change or nothing of it."""

    mode: str
    gamma: float
    alpha: float
    domain: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"mode is {self.mode!r}; expected one of {MODES}")
        for name in ("gamma", "alpha"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected 0 or more")

    def settings(self, base: TrainConfig) -> TrainConfig:
        """``base`` with the gamma and the alphas of this mode."""
        bias, loss = self.mode in BIAS_MODES, self.mode in LOSS_MODES
        return dataclasses.replace(
            base,
            gamma=self.gamma if bias else 0.0,
            alpha=self.alpha if loss else REMAINING_ALPHA if bias else 0.0,
            alpha_batch=base.alpha_batch if loss else 0.0,
        )

    def changed_from(self, before: Controls) -> str:
        """What differs, in a few words; a weight that this mode does not use is left out."""
        words = [self.mode] if self.mode != before.mode else []
        if self.gamma != before.gamma and self.mode in BIAS_MODES:
            words.append(f"gamma {self.gamma:.2g}")
        if self.alpha != before.alpha and self.mode in LOSS_MODES:
            words.append(f"alpha {self.alpha:g}")
        words += [self.domain or "all text"] if self.domain != before.domain else []
        return ", ".join(words)


def _control(name: str) -> Any:
    def write(run: LiveRun, value: object) -> None:
        run.set(**{name: value})

    return property(lambda run: getattr(run.controls, name), write)


class LiveRun:
    """Training in a thread. ``mode``, ``gamma``, ``alpha``, ``domain`` act from the next step on.

    Modes: 'off' balances nothing and leaves biases where they are; 'bias' moves them by gamma and
    keeps an alpha of 0.0001; 'auxiliary loss' uses alpha alone; 'both' both. A domain of None is
    all of them. A start is worth ``total`` steps (default ``settings.steps``); the last ``history``
    records are kept. ``watch`` is called in the thread after each step, on a pause and at the end.

    ``phase`` is 'ready', 'running', 'paused' or 'ended'; ``error`` is what ended a run too early;
    ``changes`` are (first step, what was altered). Raises ConfigError.
    """

    mode, gamma, alpha, domain = map(_control, ("mode", "gamma", "alpha", "domain"))

    def __init__(
        self, model: Transformer, corpus: Corpus, settings: TrainConfig, total: int | None = None,
        mode: str = "off", history: int = 1000,
    ) -> None:  # fmt: skip
        self.model, self.corpus, self.settings = model, corpus, settings
        self.total = settings.steps if total is None else total
        self.state = new_state(model, settings)
        done = TrainState(self.state.optimizer, settings.steps)
        list(train(model, corpus, settings, done))  # no step is left, so this only checks sizes
        self.controls = self._used = Controls(mode, settings.gamma, settings.alpha)
        self.phase, self.end = "ready", 0
        self.changes: deque[tuple[int, str]] = deque(maxlen=40)
        self.mode_since, self.seconds = 1, 0.0
        self.error: Exception | None = None
        self.watch: Callable[[], None] = lambda: None
        self._records: deque[Record] = deque(maxlen=history)
        self._recent: deque[float] = deque(maxlen=40)
        self._thread: threading.Thread | None = None
        self._lock = threading.Condition()
        self._wish, self._reset = "run", False

    @property
    def step(self) -> int:
        """Steps done."""
        return self.state.step

    @property
    def records(self) -> list[Record]:
        """The last ``history`` records, oldest first."""
        with self._lock:
            return list(self._records)

    @property
    def alive(self) -> bool:
        """Whether it is running or paused."""
        return self.phase in ("running", "paused")

    @property
    def steps_per_second(self) -> float:
        """Over the last 40 steps, pictures included and pauses not."""
        recent = list(self._recent)
        return len(recent) / sum(recent) if recent else 0.0

    def set(self, **values: Any) -> None:
        """Change some of mode, gamma, alpha and domain at once. Raises ConfigError, ValueError."""
        domain = values.get("domain")
        if domain is not None and domain not in self.corpus.domains:
            raise ValueError(f"this corpus holds {self.corpus.domains}, not {domain!r}")
        with self._lock:
            self.controls = dataclasses.replace(self.controls, **values)

    def reset_bias(self) -> None:
        """Set the bias of every router to 0: now, or before the next step if one is under way."""
        with self._lock:
            self._reset = True
            if self.phase != "running":
                self._zero_bias()

    def start(self) -> None:
        """Train ``total`` steps more in the background; resumes a paused run."""
        if self.alive:
            return self.resume()
        self.stop()
        self.error, self.end = None, self.step + self.total
        self._wish, self.phase = "run", "running"
        self._thread = threading.Thread(target=self._work, name="LiveRun", daemon=True)
        # A daemon that Python kills inside torch may abort the process; so it is asked to leave.
        atexit.register(self.stop)
        self._thread.start()

    def pause(self) -> bool:
        """Rest after the step under way; the model may then be used. False if that takes long."""
        with self._lock:
            if self.phase == "running":
                self._wish = "pause"
                if threading.current_thread() is not self._thread:
                    self._lock.wait_for(lambda: self.phase != "running", PATIENCE)
        return self.phase != "running"

    def resume(self) -> None:
        """Go on after a pause."""
        with self._lock:
            if self.alive:
                self._wish, self.phase = "run", "running"
                self._lock.notify_all()

    def stop(self) -> bool:
        """End after the step under way, with model and optimizer whole. False if that takes long.

        ``start`` goes on from there.
        """
        with self._lock:
            self._wish = "stop"
            self._lock.notify_all()
        return self._join(PATIENCE)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end; False if it did not come. Raises what training raised."""
        ended = self._join(timeout)
        if self.error is not None:
            raise self.error
        return ended

    def _join(self, timeout: float | None) -> bool:
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return thread is None
        thread.join(timeout)
        return not thread.is_alive()

    # ------------------------------------------------------------- from here on, in the thread

    def _work(self) -> None:
        was_training = self.model.training
        try:
            while self.step < self.end and self._may_go_on():
                began = time.perf_counter()
                record = self._take_step()
                with self._lock:
                    self._records.append(record)
                self.watch()
                self._recent.append(time.perf_counter() - began)
                self.seconds += self._recent[-1]
        except Exception as error:
            self.error = error
        self.state.optimizer.zero_grad(set_to_none=True)
        self.model.train(was_training)
        with self._lock:
            self.phase = "ended"
            if self._reset:
                self._zero_bias()
            self._lock.notify_all()
        atexit.unregister(self.stop)
        try:
            self.watch()
        except Exception as error:
            self.error = self.error or error

    def _may_go_on(self) -> bool:
        while True:
            with self._lock:
                if self._wish != "pause":
                    return self._wish == "run"
                self.phase = "paused"
            self.watch()
            with self._lock:
                self._lock.notify_all()
                self._lock.wait_for(lambda: self.phase != "paused" or self._wish == "stop")

    def _take_step(self) -> Record:
        with self._lock:
            controls, before, self._used = self.controls, self._used, self.controls
            number = self.step + 1
            words = [controls.changed_from(before)] if number > 1 else []
            if self._reset:
                self._zero_bias()
                words.append("bias 0")
        if controls.mode != before.mode:
            self.mode_since = number
        if text := ", ".join(filter(None, words)):
            self.changes.append((number, text))
        sizes, device = self.settings, self.model.lm_head.weight.device
        batches = [
            self.corpus.batch(
                index, sizes.batch_size, sizes.seq_len, sizes.seed, domain=controls.domain
            )[0].to(device)
            for index in range(self.step * sizes.accumulate, number * sizes.accumulate)
        ]
        return train_step(self.model, self.state, controls.settings(sizes), batches)

    def _zero_bias(self) -> None:
        self._reset = False
        for gate in self.model.gates:
            gate.e_score_correction_bias.zero_()
