"""Pipeline schedules: legal, complete, and as idle as Table 2 of the report says, to the unit.

Times are integers, so every comparison is exact.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from dsv3_mini.course.pipeline import (
    SCHEDULES,
    Chunk,
    Cost,
    Task,
    Times,
    bubble,
    closed_form,
    dual_pipe,
    measured,
    one_f_one_b,
    peak_activations,
    simulate,
    step_name,
    zero_bubble,
)
from dsv3_mini.viz.schedule import picture
from dsv3_mini.viz.style import png

# Every ratio of F, I = B - W and W up to 1 : 4 and back, and F&B from one hidden to none hidden.
TIMES = [
    Times(f, i + w, w, fb)
    for f, i, w in product(range(1, 5), repeat=3)
    for fb in sorted({max(f, i + w), max(f, i + w) + 1, f + i + w})
]
SIZES = [(2, 4), (4, 8), (4, 14), (6, 12), (8, 20)]
EVERY = pytest.mark.parametrize("name", SCHEDULES)
SIZE = pytest.mark.parametrize(("stages", "micro_batches"), SIZES)


def rows(orders: Any) -> list[str]:
    return [" ".join(step_name(step) for step in order) for order in orders]


def run(name: str, stages: int, micro_batches: int, times: Times) -> list[Task]:
    return simulate(SCHEDULES[name](stages, micro_batches), times)


def test_1f1b_by_hand() -> None:
    tasks = simulate(one_f_one_b(2, 2), Times(F=1, B=2, W=1, FB=3))
    ran = [(device, *step, start, end) for device, step, start, end in tasks]
    assert ran == [
        (0, Chunk("F", 0), 0, 1),
        (0, Chunk("F", 1), 1, 2),
        (1, Chunk("F", 0), 1, 2),
        (1, Chunk("B", 0), 2, 4),
        (0, Chunk("B", 0), 4, 6),
        (1, Chunk("F", 1), 4, 5),
        (1, Chunk("B", 1), 5, 7),
        (0, Chunk("B", 1), 7, 9),
    ]
    assert bubble(tasks) == [3, 3]
    assert peak_activations(tasks) == [2, 1]
    assert measured(tasks) == Cost(bubble=3, parameters=1, activations=2)


def test_the_orders_as_one_reads_them() -> None:
    assert rows(one_f_one_b(2, 4)) == ["F F B F B F B B", "F B F B F B F B"]
    assert rows(zero_bubble(2, 3)) == ["F F I W F I W I W", "F I F I W F I W W"]
    outer = "F F F F I W F F&B F&B B F&B B I W I W"
    inner = "F F F F F&B F&B F&B F&B B B I I W W"
    assert rows(dual_pipe(4, 8)) == [outer, inner, inner, outer]


def test_dual_pipe_feeds_both_ends_alike() -> None:
    """Device 0 seen from direction +1 is the last device seen from -1, and so on inwards."""
    orders = dual_pipe(6, 14)
    mirrored = [
        [tuple(Chunk(k, (m + 7) % 14, -d) for k, m, d in step) for step in order]
        for order in reversed(orders)
    ]
    assert orders == mirrored
    assert orders[0][0] == (Chunk("F", 0, 1),)
    assert orders[5][0] == (Chunk("F", 7, -1),)
    overlapped = [step for order in orders for step in order if len(step) == 2]
    assert all(step[0].direction == -step[1].direction for step in overlapped)


@EVERY
@SIZE
def test_every_chunk_runs_once_on_every_device(name: str, stages: int, micro_batches: int) -> None:
    for order in SCHEDULES[name](stages, micro_batches):
        chunks = [chunk for step in order for chunk in step]
        forward = sorted(m for kind, m, _ in chunks if kind == "F")
        full = [m for kind, m, _ in chunks if kind == "B"]
        for part in "IW":
            backward = full + [m for kind, m, _ in chunks if kind == part]
            assert sorted(backward) == forward == list(range(micro_batches))
        half = micro_batches // 2 if name == "DualPipe" else micro_batches
        assert all(direction == (1 if m < half else -1) for _, m, direction in chunks)


@EVERY
@SIZE
@pytest.mark.parametrize("times", TIMES[::17], ids=str)
def test_no_task_is_too_early_or_too_late(
    name: str, stages: int, micro_batches: int, times: Times
) -> None:
    """Every task starts at the later of: its device is free, the last thing it needs is done."""
    tasks = run(name, stages, micro_batches, times)
    lasts = {"F": times.F, "B": times.B, "I": times.B - times.W, "W": times.W, "F&B": times.FB}
    done: dict[tuple[str, int, int], float] = {}  # kind, device, micro-batch
    for device, step, _, end in tasks:
        done |= {(kind, device, m): end for kind, m, _ in step}
        done |= {("I", device, m): end for kind, m, _ in step if kind == "B"}
    free = [0.0] * stages
    for device, step, start, end in tasks:
        earliest = free[device]
        for kind, m, direction in step:
            path = list(range(stages))[::direction]  # devices in the order of the forward
            place = path.index(device)
            if kind == "F" and place > 0:
                earliest = max(earliest, done["F", path[place - 1], m])
            if kind in "BI":
                earliest = max(earliest, done["F", device, m])
                if place < stages - 1:
                    earliest = max(earliest, done["I", path[place + 1], m])
            if kind == "W":
                earliest = max(earliest, done["I", device, m])
        assert start == earliest
        assert end == start + lasts[step_name(step)]
        free[device] = end


@SIZE
def test_bubbles_are_those_of_table_2_where_it_holds(stages: int, micro_batches: int) -> None:
    checked = dict.fromkeys(SCHEDULES, 0)
    for times in TIMES:
        f, i, w = times.F, times.B - times.W, times.W
        holds = {"1F1B": True, "ZB1P": w <= min(f, i), "DualPipe": max(f, w) <= i}
        for name in SCHEDULES:
            if holds[name]:
                tasks = run(name, stages, micro_batches, times)
                assert measured(tasks) == closed_form(name, stages, times), (name, times)
                checked[name] += 1
    assert len(TIMES) == checked["1F1B"] > checked["DualPipe"] > 50
    assert checked["ZB1P"] > 50


@SIZE
def test_bubbles_of_every_device_for_all_times(stages: int, micro_batches: int) -> None:
    """Also where Table 2 is left: the longer formulas of the module's docstring."""
    differs = {"ZB1P": 0, "DualPipe": 0}
    for times in TIMES:
        f, i, w = times.F, times.B - times.W, times.W
        idle = (stages - 1) * max(f, i, f + i - w)
        zb1p = run("ZB1P", stages, micro_batches, times)
        assert bubble(zb1p) == [idle] * stages, times
        hops = stages // 2 - 1
        idle = hops * (max(f, i) + times.FB - times.B + max(i - w, 0))
        less = times.F + times.B - times.FB
        half = [idle - (hops - device) * less for device in range(stages // 2)]
        dual = run("DualPipe", stages, micro_batches, times)
        assert bubble(dual) == half + half[::-1], times
        for name, tasks in (("ZB1P", zb1p), ("DualPipe", dual)):
            table = closed_form(name, stages, times).bubble
            assert measured(tasks).bubble >= table, (name, times)
            differs[name] += measured(tasks).bubble > table
    assert differs["ZB1P"] > 50
    assert differs["DualPipe"] > 50 or stages == 2  # two devices are both in the middle: no bubble


@SIZE
def test_activations_of_every_device(stages: int, micro_batches: int) -> None:
    for times in TIMES[::17]:
        peaks = {n: peak_activations(run(n, stages, micro_batches, times)) for n in SCHEDULES}
        assert peaks["1F1B"] == list(range(stages, 0, -1))
        assert peaks["ZB1P"] == [stages] * stages
        assert peaks["DualPipe"] == [stages + 1] * stages


def test_a_pipeline_of_one_and_one_that_is_just_full() -> None:
    times = Times(F=2, B=4, W=2, FB=5)
    for name in ("1F1B", "ZB1P"):
        assert measured(run(name, 1, 1, times)) == closed_form(name, 1, times) == Cost(0, 1, 1)
        assert measured(run(name, 5, 5, times)) == closed_form(name, 5, times)
    assert measured(run("DualPipe", 8, 16, times)) == closed_form("DualPipe", 8, times)


def test_table_2_at_eight_stages() -> None:
    times = Times(F=2, B=4, W=2, FB=5)
    assert [closed_form(name, 8, times) for name in SCHEDULES] == [
        Cost(7 * (2 + 4), 1, 8),
        Cost(7 * (2 + 4 - 2 * 2), 1, 8),
        Cost(3 * (5 + 4 - 3 * 2), 2, 9),
    ]


def test_picture_has_a_chart_a_schedule_and_a_letter_a_chunk() -> None:
    times = Times(F=2, B=4, W=2, FB=5)
    schedules = {name: run(name, 4, 8, times) for name in SCHEDULES}
    figure = picture(schedules)
    assert [ax.get_title("left").split(":")[0] for ax in figure.axes] == list(SCHEDULES)
    for ax, tasks in zip(figure.axes, schedules.values(), strict=True):
        letters = sorted(text.get_text() for text in ax.texts if text.get_text() in [*"FBIW"])
        assert letters == sorted(kind for task in tasks for kind, _, _ in task.step)
        numbers = [text.get_text() for text in ax.texts if text.get_text().strip().isdigit()]
        assert numbers == [f" {idle}" for idle in bubble(tasks)]
    assert png(figure, dpi=30).startswith(b"\x89PNG")


F0, B0, I0, W0 = ((Chunk(kind, 0),) for kind in "FBIW")


@pytest.mark.parametrize(
    ("function", "values", "message"),
    [
        (Times, (0, 2, 1, 2), "expected F above 0"),
        (Times, (1, 2, 2, 3), "W, a part of B"),
        (Times, (1, 2, float("nan"), 3), "W, a part of B"),
        (Times, (1, 2, 1, 4), r"between 2 .* and 3"),
        (Times, (3, 2, 1, 2), r"between 3 .* and 5"),
        (one_f_one_b, (4, 3), "4 stages and 3 micro-batches; expected at least 1 and 4"),
        (zero_bubble, (0, 3), "0 stages"),
        (dual_pipe, (4, 6), "expected at least 1 and 8"),
        (dual_pipe, (3, 8), "both must be even"),
        (dual_pipe, (4, 9), "both must be even"),
        (closed_form, ("GPipe", 4, TIMES[0]), "'GPipe'; expected one of"),
        (closed_form, ("1F1B", 0, TIMES[0]), "0 stages"),
        (closed_form, ("DualPipe", 3, TIMES[0]), "must be even"),
        (simulate, ([], TIMES[0]), "one order a device"),
        (simulate, ([[F0, B0], []], TIMES[0]), "none empty"),
        (simulate, ([[F0, (Chunk("X", 0),)]], TIMES[0]), r"steps \['X'\]"),
        (simulate, ([[B0, F0]], TIMES[0]), "wait for what never ends"),
        (simulate, ([[F0, W0, I0]], TIMES[0]), "wait for what never ends"),
        (simulate, ([[F0 + B0]], TIMES[0]), "wait for what never ends"),
        (simulate, ([[F0, B0], [(Chunk("F", 1),)]], TIMES[0]), r"device: \{0: .*'B'.*, 1: .*'F'"),
        (picture, ({},), "nothing to draw"),
        (picture, ({"1F1B": []},), "nothing to draw"),
    ],
)
def test_refuses_what_cannot_be(function: Any, values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(*values)
