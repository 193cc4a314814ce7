"""Exercises of notebook 11, work on several machines: what is sent, and who waits.

Legend: R ranks, T tokens of each, K chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_mini.course.checking import Draw, Drawing, Exercise, Function, Wrong

# ------------------------------------------------------- 11.3 dispatch, an all-to-all, report 3.2.2


def sent_case(draw: Draw) -> dict[str, Any]:
    ranks, tokens, chosen = draw.randint(4, 5), draw.randint(8, 11), draw.randint(2, 3)
    experts = ranks * draw.randint(2, 3)
    likes_R1E = draw.normal(ranks, 1, experts)  # so that ranks do not send to all alike
    affinity_RTE = likes_R1E + draw.normal(ranks, tokens, experts)
    return {"chosen_RTK": affinity_RTE.argsort(dim=2)[:, :, :chosen], "experts": experts}


def sent_one_by_one(chosen_RTK: Tensor, experts: int) -> Tensor:
    """Walk through the tokens, with the list of each rank's experts at hand."""
    numbers = range(experts)
    ranks = len(chosen_RTK)
    homes = [set(numbers[r * experts // ranks : (r + 1) * experts // ranks]) for r in range(ranks)]
    table = [[0] * ranks for _ in homes]
    for sender, tokens in enumerate(chosen_RTK.tolist()):
        for chosen in tokens:
            for receiver, home in enumerate(homes):
                table[sender][receiver] += not home.isdisjoint(chosen)
    return torch.tensor(table)


def sending(
    owner: Callable[[Tensor, int, int], Tensor] = lambda chosen, experts, ranks: (
        chosen * ranks // experts
    ),
    met: Callable[[Tensor], Tensor] = lambda hits_RTKR: hits_RTKR.amax(2),
    count: Callable[[Tensor], Tensor] = lambda met_RTR: met_RTR.sum(1),
    last: Callable[[Tensor], Tensor] = lambda rows_RR: rows_RR,
) -> Function:
    """The answer of somebody for whom experts live there, and tokens and rows are counted so."""

    def answer(chosen_RTK: Tensor, experts: int) -> Tensor:
        ranks = len(chosen_RTK)
        hits_RTKR = F.one_hot(owner(chosen_RTK, experts, ranks), ranks)
        return last(count(met(hits_RTKR)))

    return answer


def sent_picture(answer: Function) -> Drawing:
    affinity_RTE = Draw(0).normal(8, 128, 64)
    group_RTG = affinity_RTE.unflatten(2, (8, 8)).topk(2, dim=3).values.sum(3)
    lost_RTG = group_RTG.argsort(dim=2).argsort(dim=2) < 6  # all groups but the best two
    within_RTE = affinity_RTE.masked_fill(lost_RTG.repeat_interleave(8, 2), -torch.inf)
    near_RTE = affinity_RTE + 3 * torch.eye(8).repeat_interleave(8, 1)[:, None]
    kinds = {"any 8 of 64 experts": affinity_RTE, "from at most 2 groups": within_RTE,
             "a rank's own suit better": near_RTE}  # fmt: skip
    panels = {name: answer(x.topk(8, dim=2).indices, 64) for name, x in kinds.items()}
    return Drawing("maps", {
        "panels": panels, "rows": "sending rank", "columns": "receiving rank", "unit": "rows sent",
    })  # fmt: skip


SENT = Exercise(
    identifier="11.3", title="Who sends how much to whom",
    difficulty=3, importance=4, minutes=15, lines=4,
    case=sent_case, oracle=sent_one_by_one, picture=sent_picture,
    alt="rows from 8 ranks to 8 ranks, 128 tokens on each, 8 of 64 experts a token, a group of 8 "
    "experts on each rank. Without a limit each rank gets about two thirds of the tokens of each. "
    "With two groups a token it is a quarter. Where the experts at home suit better, the diagonal "
    "has all 128, and these rows stay at home.",
    wrong=(
        Wrong(sending(met=lambda hits: hits.sum(2)),
              "a row for each chosen expert; a token goes to a rank once, whatever it needs there"),
        Wrong(sending(last=lambda rows: rows.T),
              "a row is the receiver; it should be the sender"),
        Wrong(sending(last=lambda rows: rows - rows.diag().diag()),
              "the diagonal is empty; a rank hands rows to itself too"),
        Wrong(sending(owner=lambda chosen, experts, ranks: chosen % ranks),
              "experts are dealt out one by one, in turns; neighbours live together"),
        Wrong(sending(met=lambda hits: torch.ones_like(hits.amax(2))),
              "every token goes to every rank; only to those which have one of its experts"),
        Wrong(sending(met=lambda hits: hits[:, :, 0]),
              "each token goes to its first expert alone"),
        Wrong(sending(count=lambda met: met.amax(1)),
              "one for each pair that meets at all; how many tokens are it?"),
        Wrong(sending(last=lambda rows: rows + rows.T),
              "the way back is counted too; dispatch is one way"),
        Wrong(sending(count=lambda met: met.float().mean(1)),
              "shares of the tokens; rows are counted"),
        Wrong(sending(last=lambda rows: rows.float()),
              "the right numbers as floats; rows are whole numbers, so int64"),
        Wrong(sending(count=lambda met: met.sum((0, 1))),
              "what each rank receives in all; who sent it?"),
    ),
)  # fmt: skip

# ------------------------------------------------------------------ 11.4 idle time of a pipeline


def waiting_case(draw: Draw) -> dict[str, Any]:
    stages = draw.randint(3, 5)
    batches = stages + draw.randint(1, 3)
    forward = [draw.randint(2, 6) for _ in range(stages)]
    orders = []
    for stage in range(stages):
        ahead = stages - stage
        orders.append("F" * ahead + "BF" * (batches - ahead) + "B" * ahead)
    if draw.random() < 0.3:
        orders = ["F" * batches + "B" * batches] * stages
    return {"orders": orders, "forward": forward,
            "backward": [n + draw.randint(1, 4) for n in forward]}  # fmt: skip


def waiting_by_the_clock(orders: list[str], forward: list[int], backward: list[int]) -> list[int]:
    """Tick after tick: who is idle begins the next step if what it needs has arrived."""
    left = [list(order) for order in orders]
    arrived = [{"F": len(o) if s == 0 else 0, "B": len(o) if s == len(orders) - 1 else 0}
               for s, o in enumerate(orders)]  # fmt: skip
    until, doing = [0] * len(orders), [""] * len(orders)
    worked = [0] * len(orders)
    for now in count():
        for stage, kind in enumerate(doing):
            towards = stage + (1 if kind == "F" else -1)
            if kind and until[stage] == now:
                doing[stage] = ""
                if 0 <= towards < len(orders):
                    arrived[towards][kind] += 1
        if not any(left) and not any(doing):
            return [now - busy for busy in worked]
        for stage, steps in enumerate(left):
            if steps and not doing[stage] and arrived[stage][steps[0]]:
                doing[stage] = kind = steps.pop(0)
                arrived[stage][kind] -= 1
                lasts = (forward if kind == "F" else backward)[stage]
                until[stage], worked[stage] = now + lasts, worked[stage] + lasts
    raise AssertionError("a clock does not stop")


Spans = list[list[tuple[int, int]]]  # of each stage, when its steps begin and end


def idle(spans: Spans) -> list[int]:
    last = max(stop for steps in spans for _, stop in steps)
    return [last - sum(stop - start for start, stop in steps) for steps in spans]


def running(
    comes_from: Callable[[str, int], int] = lambda kind, stage: (
        stage - 1 if kind == "F" else stage + 1
    ),
    lasts: Callable[[list[int], list[int], str, int], int] = lambda f, b, kind, stage: (
        f if kind == "F" else b
    )[stage],
    told: Callable[[Spans], list[int]] = idle,
    order: Callable[[str], str] = lambda steps: steps,
    busy: bool = True,
) -> Function:
    """The answer of somebody whose steps wait for such a stage, and last so long."""

    def answer(orders: list[str], forward: list[int], backward: list[int]) -> list[int]:
        orders = [order(steps) for steps in orders]
        ends: dict[tuple[str, int, int], int] = {}
        spans: Spans = [[] for _ in orders]
        while any(len(done) < len(steps) for done, steps in zip(spans, orders, strict=True)):
            for stage, steps in enumerate(orders):
                done = spans[stage]
                if len(done) == len(steps):
                    continue
                kind, number = steps[len(done)], steps[: len(done)].count(steps[len(done)])
                need = (kind, number, comes_from(kind, stage))
                if need not in ends and 0 <= need[2] < len(orders):
                    continue
                free = done[-1][1] if done and busy else 0
                start = max(free, ends.get(need, 0))
                done.append((start, start + lasts(forward, backward, kind, stage)))
                ends[kind, number, stage] = done[-1][1]
        return told(spans)

    return answer


def by_formula(orders: list[str], forward: list[int], backward: list[int]) -> list[int]:
    return [(len(orders) - 1) * (f + b) for f, b in zip(forward, backward, strict=True)]


def waiting_picture(answer: Function) -> Drawing:
    orders = ["F" * (8 - s) + "BF" * (12 + s) + "B" * (8 - s) for s in range(8)]
    curves = {}
    for name, slow in {"all alike": 2, "stage 3: 1.5 times": 3, "stage 3: twice": 4}.items():
        forward = [2, 2, 2, slow, 2, 2, 2, 2]
        curves[name] = answer(orders, forward, [2 * n for n in forward])
    return Drawing("lines", {
        "x": list(range(8)), "curves": curves, "xlabel": "stage", "ylabel": "idle time",
        "title": "1F1B, 20 micro-batches, F = 2 and B = 4; stage 3 may take longer",
    })  # fmt: skip


WAITING = Exercise(
    identifier="11.4", title="Who waits, and how long?",
    difficulty=4, importance=3, minutes=30, lines=11,
    case=waiting_case, oracle=waiting_by_the_clock, picture=waiting_picture,
    alt="idle time of 8 stages. Where all are alike, each waits 42, as the closed form says. If "
    "stage 3 takes 1.5 times as long, it waits 30 and each other stage 90; if twice as long, 26 "
    "and 146. One slow stage makes seven wait.",
    wrong=(
        Wrong(running(comes_from=lambda kind, stage: stage - 1 if kind == "F" else -1),
              "a backward waits for nobody; its gradient comes from the next stage"),
        Wrong(running(comes_from=lambda kind, stage: -1 if kind == "F" else stage + 1),
              "a forward waits for nobody; its input comes from the stage before"),
        Wrong(running(comes_from=lambda kind, stage: -1),
              "no stage waits for another"),
        Wrong(running(comes_from=lambda kind, stage: stage - 1),
              "a gradient comes from the stage before; it travels the other way than a forward"),
        Wrong(running(busy=False),
              "a stage does several steps at a time; each begins after the one before it"),
        Wrong(running(order=lambda steps: "F" * steps.count("F") + "B" * steps.count("B")),
              "all forwards are done first; the order is given"),
        Wrong(running(lasts=lambda f, b, kind, stage: f[stage]),
              "a backward lasts as long as a forward; both are given"),
        Wrong(running(lasts=lambda f, b, kind, stage: (f if kind == "F" else b)[0]),
              "every stage takes the first one's times; each has its own"),
        Wrong(running(told=lambda spans: [idle([steps])[0] for steps in spans]),
              "a stage's time ends with its own last step; it waits until the last stage is done"),
        Wrong(running(told=lambda spans: [steps[0][0] for steps in spans]),
              "the wait before the first step alone; there is more of it later"),
        Wrong(running(told=lambda spans: [sum(b - a for a, b in steps) for steps in spans]),
              "how long each stage works; how long does it not?"),
        Wrong(running(told=lambda spans: [steps[-1][1] for steps in spans]),
              "when each stage ends; how long did it wait?"),
        Wrong(by_formula,
              "the closed form of 1F1B; it is for stages that are all alike"),
    ),
)  # fmt: skip

EXERCISES = (SENT, WAITING)
