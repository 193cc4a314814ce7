"""Races: implementations run in turn, round after round; medians, spreads, ratios and slopes."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

BEGAN = time.perf_counter()


def nothing() -> None:
    """What most entrants need before a run."""


@dataclass(frozen=True)
class Entrant:
    """What is timed, and what must happen before it, untimed: a path chosen, a cache put back."""

    run: Callable[[], object]
    before: Callable[[], object] = nothing
    times: int = 1
    """Runs in a row, whose mean counts: a decode step follows its like, not another model's."""


@dataclass(frozen=True)
class Pace:
    """How often a race repeats: ``least`` rounds, then more while they fit into ``seconds``."""

    least: int = 3
    seconds: float = 3.0
    most: int = 21


@dataclass(frozen=True)
class Race:
    """One comparison: seconds by implementation, one number a round; the first is the measure."""

    what: str
    size: str
    at: int
    unit: str
    """Of ``at``: tokens of a prompt or of context, experts, sequences, wide (hidden size)."""
    threads: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    launches: dict[str, int] = field(default_factory=dict)
    """Products and others of one run of the first, where they were counted."""

    @property
    def label(self) -> str:
        """What was raced, at how much of what, and on which model."""
        unit = self.unit.removesuffix("s") if self.at == 1 else self.unit
        return f"{self.what}, {self.at:,} {unit}, {self.size}"

    @property
    def first(self) -> str:
        """The implementation that the others are divided by."""
        return next(iter(self.seconds))

    def median(self, name: str) -> float:
        """Seconds, the median over rounds."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str) -> tuple[float, float, float]:
        """Time of ``name`` over the first's, round by round: median, smallest, largest."""
        pairs = zip(self.seconds[name], self.seconds[self.first], strict=True)
        ratios = [theirs / ours for theirs, ours in pairs]
        return statistics.median(ratios), min(ratios), max(ratios)


def run_race(race: Race, entrants: Mapping[str, Entrant], pace: Pace, warm: bool = True) -> Race:
    """Fill ``race`` with times, after one round that does not count (unless ``warm`` is off)."""
    race.seconds.update({name: [] for name in entrants})
    if warm:
        for entrant in entrants.values():
            _seconds(entrant)
    began, rounds = time.perf_counter(), 0
    while rounds < pace.least or (
        rounds < pace.most and (time.perf_counter() - began) * (rounds + 1) / rounds <= pace.seconds
    ):
        for name, entrant in entrants.items():
            race.seconds[name].append(_seconds(entrant))
        rounds += 1
    medians = ", ".join(f"{name} {duration(race.median(name))}" for name in entrants)
    threads = "1 thread" if race.threads == 1 else f"{race.threads} threads"
    say(f"{race.label}, {threads}: {medians} ({rounds} rounds)")
    return race


def _seconds(entrant: Entrant) -> float:
    entrant.before()
    began = time.perf_counter()
    for _ in range(entrant.times):
        entrant.run()
    return round((time.perf_counter() - began) / entrant.times, 7)  # the clock is less exact


def say(line: str) -> None:
    """A line of progress on stderr, with the seconds since the start."""
    print(f"[{time.perf_counter() - BEGAN:4.0f} s] {line}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Three digits: 412 µs, 8.40 ms, 1.25 s."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{digits(seconds / size)} {unit}"
    return f"{digits(seconds / 1e-6)} µs"


def digits(value: float) -> str:
    """Three significant digits, never as a power of ten: 0.0123, 1.85, 22.8, 1,240."""
    if value >= 100 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - int(np.floor(np.log10(value))))}f}"


def slope(x: list[float], y: list[float]) -> float:
    """The exponent p of y = a x^p that fits best: a straight line through the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])
