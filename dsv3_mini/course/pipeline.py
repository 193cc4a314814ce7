"""Which device waits when? Three pipeline schedules, simulated instead of believed.

Why: a model cut into stages on PP devices leaves a device idle until its first chunk of work
arrives, and again when the last one has gone. That idle time is the bubble. Three orders of the
same work differ in it (report 3.2.1, Table 2):

- 1F1B: forwards until the first gradient is back, then one backward and one forward in turn.
- ZB1P: a backward is split. I makes the gradient of the input, for which the previous stage waits;
  W makes the gradient of the weights, for which nobody waits, so that it can fill a gap.
- DualPipe: micro-batches enter at both ends. Every device holds two stages, and in the middle of
  the run computes a forward of one direction together with a backward of the other. This pair, F&B,
  takes at most F + B, less if the traffic of each hides under the work of the other. The report
  shows its order as a figure; the one here is worked out from the idea and may differ in detail.

Where the orders below meet the bubbles of Table 2 (I = B - W; traffic takes no time of its own):

- 1F1B: always. A hop costs F on the way in and B on the way back.
- ZB1P: if W <= F and W <= I. Its bubble is PP-1 times max(F, I, F + I - W). The last device waits
  F a hop for its first chunk; the first device, with PP micro-batches alive, waits I a hop for its
  first gradient. There is no W yet to fill either gap, so a longer W cannot help any more.
- DualPipe: if F <= I and W <= I, on the two devices in the middle. Their bubble is PP/2-1 times
  max(F, I) + (F&B - B) + max(I - W, 0). First they wait for a chunk (F a hop) or for a gradient
  (I a hop), whichever takes longer. Near the end the outermost devices alternate F&B and B where
  these have two B. At last a gradient needs I a hop to get out, and a postponed W fills part of it.
  In the table the two maxima are I and I - W: the sum is then F&B + B - 3W. A device k hops from
  these two overlaps k pairs less, so it works longer and idles k (F + B - F&B) less.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple


@dataclass(frozen=True)
class Times:
    """Durations in the report's symbols, in any one unit; integers keep a simulation exact.

    B is a full backward chunk, W its part for the weights, FB an overlapped pair (F&B). Raises
    ValueError unless 0 < F, 0 < W < B and max(F, B) <= FB <= F + B.
    """

    F: float
    B: float
    W: float
    FB: float

    def __post_init__(self) -> None:
        if not (self.F > 0 and 0 < self.W < self.B):
            raise ValueError(f"{self}; expected F above 0, and W, a part of B, between 0 and B")
        if not max(self.F, self.B) <= self.FB <= self.F + self.B:
            raise ValueError(
                f"{self}; expected FB, an overlapped pair, between {max(self.F, self.B)} (the "
                f"shorter chunk is hidden) and {self.F + self.B} (nothing is hidden)"
            )


class Chunk(NamedTuple):
    """One stage's work for one micro-batch: F, B, or the parts of B: I (input) and W (weights)."""

    kind: str
    micro_batch: int
    direction: int = 1
    """+1 if the micro-batch enters at device 0, -1 if it enters at the last device."""


Step = tuple[Chunk, ...]  # one chunk, or an F and a B that overlap


class Task(NamedTuple):
    """A step that has run."""

    device: int
    step: Step
    start: float
    end: float


class Cost(NamedTuple):
    """A row of Table 2. Activations are counted in micro-batches of one stage."""

    bubble: float
    parameters: int
    activations: int


def one_f_one_b(stages: int, micro_batches: int) -> list[list[Step]]:
    """1F1B, a list of steps a device. Raises ValueError unless micro_batches >= stages."""
    _check(stages, micro_batches, least=stages)
    orders = []
    for device in range(stages):
        ahead = stages - device  # forwards that start before the first gradient can be back
        steps = ["F"] * ahead + ["B", "F"] * (micro_batches - ahead) + ["B"] * ahead
        orders.append(_numbered(steps, micro_batches))
    return orders


def zero_bubble(stages: int, micro_batches: int) -> list[list[Step]]:
    """ZB1P: 1F1B with I in B's place and W ``device`` rounds later, so that each keeps PP alive.

    Raises ValueError unless micro_batches >= stages.
    """
    _check(stages, micro_batches, least=stages)
    orders = []
    for device in range(stages):
        ahead = stages - device
        steps = ["F"] * ahead + ["I", "F"] * device + ["I", "W", "F"] * (micro_batches - stages)
        steps += ["I", "W"] * ahead + ["W"] * device
        orders.append(_numbered(steps, micro_batches))
    return orders


def dual_pipe(stages: int, micro_batches: int) -> list[list[Step]]:
    """DualPipe; micro-batches from ``micro_batches / 2`` on enter at the last device.

    Raises ValueError unless both are even and micro_batches >= 2 * stages.
    """
    _check(stages, micro_batches, least=2 * stages, even=True)
    orders = []
    for device in range(stages):
        outer = min(device, stages - 1 - device)  # hops to the nearer end
        inner = stages // 2 - 1 - outer  # hops to the middle
        # n is the direction that enters at the nearer end and so comes early, f the other one.
        n, f = ("+", "-") if device < stages // 2 else ("-", "+")
        # PP forwards, as many as it takes f's first micro-batch to turn round and come back.
        steps = [f"F{n}"] * (2 * inner) + [f"F{n}", f"F{f}"] * (outer + 1)
        # n's first gradient is still far away. I lets f's hurry on, W fills the time.
        steps += [f"I{f}", "W", f"F{f}"] * inner
        pairs = micro_batches // 2 - (2 * inner + outer + 1)  # forwards that n has left
        steps += [f"F{n}&B{f}", f"F{f}&B{n}"] * pairs
        # n has none left, f as many as it came later.
        steps += [f"B{f}", f"F{f}&B{n}"] * inner
        # Only backwards now. The last PP/2 are split, so that the last gradients get out sooner.
        kinds = ["B"] * (outer + 1) + ["I"] * (outer + 1)
        steps += [kind + end for kind, end in zip(kinds, [f, n] * (outer + 1), strict=True)]
        steps += ["W", f"I{n}"] * inner + ["W"] * (outer + 1)
        orders.append(_numbered(steps, micro_batches // 2))
    return orders


SCHEDULES = {"1F1B": one_f_one_b, "ZB1P": zero_bubble, "DualPipe": dual_pipe}


def simulate(orders: Sequence[Sequence[Step]], times: Times) -> list[Task]:
    """Run every device's steps in order, each as soon as it can start; the tasks, by start.

    F needs the previous stage's F; B and I need their own F and the next stage's B or I; W needs
    its own I. Raises ValueError if a device has no step, or a step no duration, or if a step waits
    for what never ends.
    """
    durations = {"F": times.F, "B": times.B, "I": times.B - times.W, "W": times.W, "F&B": times.FB}
    unknown = {step_name(step) for order in orders for step in order} - {*durations}
    if unknown or not orders or not all(orders):
        raise ValueError(
            f"steps {sorted(unknown)} in {len(orders)} orders, shortest "
            f"{min(map(len, orders), default=0)}; expected one order a device, none empty, of "
            f"{', '.join(durations)}"
        )
    free: list[float] = [0] * len(orders)
    ends: dict[tuple[int, Chunk], float] = {}  # when a device has a result; B gives that of I
    tasks: list[Task] = []
    left = [deque(order) for order in orders]
    while any(left):
        before = len(tasks)
        for device, steps in enumerate(left):
            while steps and all(need in ends for need in _needs(device, steps[0], len(orders))):
                needs, step = _needs(device, steps[0], len(orders)), steps.popleft()
                start = max([free[device], *(ends[need] for need in needs)])
                free[device] = start + durations[step_name(step)]
                tasks.append(Task(device, step, start, free[device]))
                for chunk in step:
                    kind = chunk.kind.replace("B", "I")
                    ends[device, chunk._replace(kind=kind)] = free[device]
        if len(tasks) == before:
            stuck = {device: steps[0] for device, steps in enumerate(left) if steps}
            raise ValueError(f"these wait for what never ends, by device: {stuck}; mend the order")
    return sorted(tasks, key=lambda task: (task.start, task.device))


def step_name(step: Step) -> str:
    """F, B, I, W or F&B."""
    return "&".join(chunk.kind for chunk in step)


def bubble(tasks: Sequence[Task]) -> list[float]:
    """Idle time of each device from time 0 until the last device ends."""
    idle = [max(task.end for task in tasks)] * (1 + max(task.device for task in tasks))
    for task in tasks:
        idle[task.device] -= task.end - task.start
    return idle


def peak_activations(tasks: Sequence[Task]) -> list[int]:
    """The most micro-batches that each device keeps activations of, for tasks sorted by start.

    They are kept from the start of F to the end of B, or of W, which needs them too. So both
    micro-batches of an F&B count while it runs, which is the + 1 of DualPipe.
    """
    alive, peak = ([0] * (1 + max(task.device for task in tasks)) for _ in range(2))
    for device, step, _, _ in tasks:
        kinds = step_name(step)
        alive[device] += kinds.count("F")
        peak[device] = max(peak[device], alive[device])
        alive[device] -= kinds.count("B") + kinds.count("W")
    return peak


def measured(tasks: Sequence[Task]) -> Cost:
    """The longest bubble, the most stages on a device (parameters), the most activations."""
    stages = {(task.device, chunk.direction) for task in tasks for chunk in task.step}
    held = [device for device, _ in stages]
    return Cost(max(bubble(tasks)), max(map(held.count, held)), max(peak_activations(tasks)))


def closed_form(name: str, stages: int, times: Times) -> Cost:
    """What Table 2 says of a schedule, whatever the times; see above where it is exact.

    Raises ValueError for an unknown name, no stage, or an odd number of stages for DualPipe.
    """
    F, B, W, FB = times.F, times.B, times.W, times.FB
    rows = {
        "1F1B": Cost((stages - 1) * (F + B), 1, stages),
        "ZB1P": Cost((stages - 1) * (F + B - 2 * W), 1, stages),
        "DualPipe": Cost((stages // 2 - 1) * (FB + B - 3 * W), 2, stages + 1),
    }
    if name not in rows:
        raise ValueError(f"schedule {name!r}; expected one of {[*rows]}")
    _check(stages, 2 * stages, least=stages, even=name == "DualPipe")
    return rows[name]


def _check(stages: int, micro_batches: int, least: int, even: bool = False) -> None:
    where = f"{stages} stages and {micro_batches} micro-batches"
    if stages < 1 or micro_batches < least:
        raise ValueError(f"{where}; expected at least 1 and {least}, so that the pipeline fills")
    if even and (stages % 2 or micro_batches % 2):
        raise ValueError(f"{where}; DualPipe feeds both ends alike, so both must be even")


def _numbered(steps: Sequence[str], each: int) -> list[Step]:
    """The k-th F and the k-th backward of a direction are micro-batch k's; W is the oldest I's."""
    numbers = {kind + end: count(each * (end == "-")) for kind in "FB" for end in "+-"}
    split: deque[Chunk] = deque()
    order = []
    for step in steps:
        chunks = []
        for word in step.split("&"):
            if word == "W":
                chunks.append(split.popleft()._replace(kind="W"))
                continue
            end = word[1:] or "+"
            number = next(numbers[word[0].replace("I", "B") + end])
            chunks.append(Chunk(word[0], number, 1 if end == "+" else -1))
            if word[0] == "I":
                split.append(chunks[-1])
        order.append(tuple(chunks))
    return order


def _needs(device: int, step: Step, stages: int) -> list[tuple[int, Chunk]]:
    """The results, each with its device, that must be there before a step can start."""
    needs = []
    for chunk in step:
        forward, gradient = chunk._replace(kind="F"), chunk._replace(kind="I")
        if chunk.kind == "F":
            needs.append((device - chunk.direction, forward))
        elif chunk.kind == "W":
            needs.append((device, gradient))
        else:
            needs += [(device, forward), (device + chunk.direction, gradient)]
    return [(where, what) for where, what in needs if 0 <= where < stages]
