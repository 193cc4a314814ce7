"""Exercises of notebook 05 on the bias rule: one step of it (05.1), and many in a row (05.4).

Legend: M micro-batches, S steps, T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv3_mini.course.checking import Draw, Drawing, Exercise, Function, Wrong

# -------------------------------------------------------------------------- 05.1 a step of the bias


def step_case(draw: Draw) -> dict[str, Any]:
    micro, scale = draw.randint(2, 4), draw.randint(1, 3)
    # One expert at exactly the mean, two a little off, three far: mean and median differ.
    near, far = draw.randint(1, 2), scale * draw.randint(20, 30)
    loads = [120 * scale + off for off in (0, near, -near, -2 * far, -far, 3 * far)]
    draw.shuffle(loads)
    load_E = torch.tensor(loads)
    shares_ME = draw.normal(micro, len(loads)).softmax(0)
    counts_ME = (shares_ME * load_E).long()
    counts_ME[-1] += load_E - counts_ME.sum(0)
    return {
        "b_E": 0.05 * draw.normal(len(loads)),
        "counts_ME": counts_ME,
        "gamma": draw.choice([0.01, 0.02, 0.05]),
    }


def step_one_by_one(b_E: Tensor, counts_ME: Tensor, gamma: float) -> Tensor:
    """Whole numbers: load x experts is compared with the sum of all loads."""
    moved, counts = [], counts_ME.tolist()
    every = sum(map(sum, counts))
    for expert, b in enumerate(b_E.tolist()):
        times = len(b_E) * sum(micro[expert] for micro in counts)
        moved.append(b - gamma if times > every else b + gamma if times < every else b)
    return torch.tensor(moved)


def stepping(change: Callable[[Tensor], Tensor]) -> Function:
    """The answer of somebody who makes so the change of the bias, over gamma, of the loads."""

    def answer(b_E: Tensor, counts_ME: Tensor, gamma: float) -> Tensor:
        return b_E + gamma * change(counts_ME.sum(0).double()).float()

    return answer


def per_micro_batch(b_E: Tensor, counts_ME: Tensor, gamma: float) -> Tensor:
    mean_M1 = counts_ME.double().mean(1, keepdim=True)
    return b_E + gamma * (mean_M1 - counts_ME).sign().sum(0).float()


def last_micro_batch(b_E: Tensor, counts_ME: Tensor, gamma: float) -> Tensor:
    return step_one_by_one(b_E, counts_ME[-1:], gamma)


def dead_zone(load_E: Tensor) -> Tensor:
    off_E = (load_E.mean() - load_E) / load_E.mean()
    return torch.where(off_E.abs() > 0.05, off_E.sign(), 0.0)


def step_picture(answer: Function) -> Drawing:
    loads = [10, 60, 99, 100, 101, 140, 190]
    b_E = answer(torch.zeros(7), torch.tensor([loads]), 0.001)
    groups = {f"load {load}": float(b) for load, b in zip(loads, b_E, strict=True)}
    return Drawing("bars", {"groups": groups, "ylabel": "change of the bias",
                            "title": "mean load 100, gamma 0.001"})  # fmt: skip


STEP = Exercise(
    identifier="05.1", title="One step of the bias",
    difficulty=1, importance=5, minutes=10, lines=3,
    case=step_case, oracle=step_one_by_one, picture=step_picture,
    alt="seven experts whose mean load is 100. Loads of 10, 60 and 99 move the bias up by 0.001, "
    "loads of 101, 140 and 190 down by 0.001, and a load of exactly 100 leaves it. How far a load "
    "is off makes no difference.",
    wrong=(
        Wrong(stepping(lambda load: (load - load.mean()).sign()),
              "the wrong sign: busy experts become more attractive, and the router collapses", 12),
        Wrong(stepping(lambda load: (load.mean() - load) / load.mean()),
              "a step in proportion to the relative error; how long is V3's step?", 12),
        Wrong(stepping(lambda load: load.mean() - load),
              "a step in proportion to the number of tokens; how long is V3's step?", 12),
        Wrong(stepping(lambda load: ((load.mean() - load) / load.mean()).tanh()),
              "a step through tanh: nearly none for a small error; how long is V3's step?", 12),
        Wrong(stepping(dead_zone),
              "a dead zone: loads near the mean move nothing; is that in the rule?", 12),
        Wrong(per_micro_batch,
              "a step for each micro-batch; when does the report move the bias?", 12),
        Wrong(last_micro_batch,
              "the load of the last micro-batch alone; what is the load of a training step?", 12),
        Wrong(stepping(lambda load: torch.where(load < load.mean(), 1.0, -1.0)),
              "an expert at exactly the mean moves; it is neither over- nor underloaded"),
        Wrong(stepping(lambda load: (load.median() - load).sign()),
              "loads are compared with the median; the rule asks for the mean load"),
    ),
)  # fmt: skip

# ------------------------------------------------------------------- 05.4 the rule, step after step


def balance_case(draw: Draw) -> dict[str, Any]:
    steps, tokens, experts = draw.randint(8, 12), draw.randint(20, 40), draw.randint(5, 8)
    favour_E = draw.normal(experts)
    return {
        "s_STE": (draw.normal(steps, tokens, experts) + favour_E).sigmoid(),
        "chosen": draw.randint(2, 3),
        "gamma": draw.choice([0.02, 0.05]),
    }


def balance_one_by_one(s_STE: Tensor, chosen: int, gamma: float) -> Tensor:
    """Lists of Python; an expert is chosen if fewer than ``chosen`` others are ahead of it."""
    experts, tokens = s_STE.shape[2], s_STE.shape[1]
    bias, loads = [0.0] * experts, []
    for batch in s_STE.double().tolist():
        load = [0] * experts
        for s in batch:
            x = [a + b for a, b in zip(s, bias, strict=True)]
            for expert, mine in enumerate(x):
                load[expert] += sum(other > mine for other in x) < chosen
        ahead = [int(np.sign(n * experts - tokens * chosen)) for n in load]
        bias = [b - gamma * sign for b, sign in zip(bias, ahead, strict=True)]
        loads.append(load)
    return torch.tensor(loads)


def balancing(
    move: Callable[[Tensor, Tensor], Tensor] = lambda b, load: (
        b + (load.double().mean() - load).sign()
    ),
    routed: Callable[[Tensor, Tensor, Callable[[Tensor], Tensor]], Tensor] = (
        lambda b, after, load_with: load_with(b)
    ),
) -> Function:
    """The answer of somebody who moves the bias, in steps of gamma, so, and tells these loads."""

    def answer(s_STE: Tensor, chosen: int, gamma: float) -> Tensor:
        steps_E, loads = torch.zeros(s_STE.shape[2], dtype=torch.float64), []
        for s_TE in s_STE.double():

            def load_with(n_E: Tensor, s_TE: Tensor = s_TE) -> Tensor:
                top_TK = (s_TE + gamma * n_E).topk(chosen, dim=1).indices
                return torch.bincount(top_TK.flatten(), minlength=len(n_E))

            after_E = move(steps_E, load_with(steps_E))
            loads.append(routed(steps_E, after_E, load_with))
            steps_E = after_E
        return torch.stack(loads)

    return answer


def balance_picture(answer: Function) -> Drawing:
    draw = Draw(0)
    s_STE = (draw.normal(40, 200, 8) + 0.7 * draw.normal(8)).sigmoid()
    panels = {f"gamma {gamma:g}": answer(s_STE, 2, gamma).T for gamma in (0.0, 0.01, 0.2)}
    return Drawing("maps", {
        "panels": panels, "rows": "expert", "columns": "step", "unit": "load (tokens)",
    })  # fmt: skip


BALANCE = Exercise(
    identifier="05.4", title="Balance, step after step",
    difficulty=3, importance=5, minutes=20, lines=8,
    case=balance_case, oracle=balance_one_by_one, picture=balance_picture,
    alt="the loads of 8 experts over 40 steps of 200 tokens, three times. With gamma 0 some "
    "experts stay busy and others idle. With 0.01 the rows even out, and the emptiest expert "
    "needs until about step 30. "
    "With 0.2 nearly all jump between too much and too little from one step to the next.",
    wrong=(
        Wrong(balancing(lambda b, load: b),
              "a router whose bias never moves or never reaches the choice: nothing fails, and "
              "nothing is balanced", 18),
        Wrong(balancing(lambda b, load: b - (load.double().mean() - load).sign()),
              "the wrong sign: the load of busy experts grows from step to step", 12),
        Wrong(balancing(lambda b, load: b + (load.double().mean() - load) / load.double().mean()),
              "steps in proportion to the error; how long is V3's step?", 12),
        Wrong(balancing(routed=lambda b, after, load_with: load_with(after)),
              "a batch is routed with a bias that was made from that same batch; so its first "
              "tokens depend on its last ones"),
        Wrong(balancing(lambda b, load: (load.double().mean() - load).sign()),
              "the bias begins anew in each step; what moved it before is lost"),
        Wrong(lambda s, k, gamma: balance_one_by_one(s, k, gamma).cumsum(0),
              "loads are added up over the steps; each step is judged by its own load"),
    ),
)  # fmt: skip

EXERCISES = (STEP, BALANCE)
