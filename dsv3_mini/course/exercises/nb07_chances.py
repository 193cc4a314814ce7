"""Exercises of notebook 07, chances: what drafts are worth, and sampling that keeps p.

Legend: V vocabulary, B sequences.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv3_mini.course.checking import Draw, Drawing, Exercise, Function, Wrong

# ----------------------------------------------------------------------- 07.1 what drafts are worth


def speed_case(draw: Draw) -> dict[str, Any]:
    return {
        "right": round(draw.uniform(0.4, 0.95), 2), "drafts": draw.randint(1, 5),
        "verify_cost": round(draw.uniform(1.05, 1.6), 2),
        "draft_cost": round(draw.uniform(0.02, 0.3), 2),
    }  # fmt: skip


def speed_by_enumeration(right: float, drafts: int, verify_cost: float, draft_cost: float) -> float:
    """Every way that a round can go, with its probability and its tokens."""
    mean = 0.0
    for each in itertools.product((True, False), repeat=drafts):
        kept = each.index(False) if False in each else drafts
        mean += (kept + 1) * float(np.prod([right if good else 1 - right for good in each]))
    costs = [verify_cost, *[draft_cost] * drafts]
    return mean / sum(costs)


def tokens_of_a_round(right: float, drafts: int) -> float:
    return sum(right**n for n in range(drafts + 1))


def expecting(
    tokens: Callable[[float, int], float] = tokens_of_a_round,
    cost: Callable[[float, float, int], float] = lambda verify, draft, k: verify + k * draft,
) -> Function:
    """The answer of somebody who counts the tokens of a round, or its cost, so."""

    def answer(right: float, drafts: int, verify_cost: float, draft_cost: float) -> float:
        return tokens(right, drafts) / cost(verify_cost, draft_cost, drafts)

    return answer


def speed_picture(answer: Function) -> Drawing:
    counts = list(range(11))
    curves = {
        f"{share:.0%} right": [answer(share, k, 1.0 + 0.02 * k, 0.15) for k in counts]
        for share in (0.5, 0.7, 0.9)
    }
    return Drawing("lines", {
        "x": counts, "curves": curves, "xlabel": "drafts a round", "ylabel": "speed, plain being 1",
        "title": "a draft costs 0.15, and 0.02 more to verify",
    })  # fmt: skip


SPEED = Exercise(
    identifier="07.1", title="What are drafts worth?",
    difficulty=2, importance=4, minutes=15, lines=2,
    case=speed_case, oracle=speed_by_enumeration, picture=speed_picture,
    alt="the speed over the number of drafts a round, plain decoding being 1. Each line rises from "
    "1 to a peak and falls again: the rarer a draft is right, the lower the peak and the fewer "
    "drafts it takes. With drafts that are right half of the time, six are slower than none.",
    wrong=(
        Wrong(expecting(lambda p, k: 1 + k * p),
              "drafts after a refused one are counted; the third is kept only if three are right"),
        Wrong(expecting(lambda p, k: 1 + k * p**k),
              "all or nothing; drafts before the first wrong one are kept"),
        Wrong(expecting(lambda p, k: tokens_of_a_round(p, k) - 1),
              "the main model's own token is not counted; a round decides at least one"),
        Wrong(expecting(lambda p, k: tokens_of_a_round(p, k - 1)),
              "one draft is not counted; k drafts and the main model's own token can make k + 1"),
        Wrong(expecting(lambda p, k: 1 / (1 - p)),
              "drafts without end; a round has `drafts` of them"),
        Wrong(expecting(lambda p, k: 1 + p),
              "one draft a round; each draft more is kept if those before it were"),
        Wrong(expecting(lambda p, k: k + 1),
              "every draft is kept; they are right with probability `right`"),
        Wrong(expecting(cost=lambda verify, draft, k: verify + draft),
              "one draft is paid for; they are made one after another"),
        Wrong(expecting(cost=lambda verify, draft, k: verify),
              "drafts are taken to be free"),
        Wrong(expecting(cost=lambda verify, draft, k: (k + 1) * verify + k * draft),
              "the main model is paid for once a token; it verifies all drafts in one pass"),
        Wrong(expecting(cost=lambda verify, draft, k: 1.0),
              "tokens a round; divide by what the round costs"),
    ),
)  # fmt: skip

# --------------------------------------------------- 07.4 what to draw instead of a refused draft


def instead_case(draw: Draw) -> dict[str, Any]:
    p_V, q_V = (1.5 * draw.normal(2, draw.randint(5, 9))).softmax(1)
    caution_V = torch.tensor([draw.uniform(0.3, 0.9) for _ in p_V])
    return {"p_V": p_V, "q_V": q_V, "keep_V": (p_V / q_V).clamp(max=1) * caution_V}


def instead_by_equations(p_V: Tensor, q_V: Tensor, keep_V: Tensor) -> Tensor:
    """One equation a token: all ways to get it, in unknown shares, add up to p."""
    p, q, keep = (each.double().tolist() for each in (p_V, q_V, keep_V))
    ways, known = np.zeros((len(p), len(p))), np.array(p)
    for draft in range(len(p)):
        known[draft] -= q[draft] * keep[draft]
        for token in range(len(p)):  # a refused draft, and this token in its place
            ways[token, token] += q[draft] * (1 - keep[draft])
    return torch.tensor(np.linalg.solve(ways, known), dtype=torch.float32)


def to_one(x_V: Tensor) -> Tensor:
    return x_V / x_V.sum()


def instead_picture(answer: Function) -> Drawing:
    place_V = torch.arange(12.0)
    p_V, q_V = ((-(((place_V - middle) / 2) ** 2) / 2).softmax(0) for middle in (4, 7))
    keep_V = 0.7 * (p_V / q_V).clamp(max=1)
    kept_V = q_V * keep_V
    instead_V = (1 - kept_V.sum()) * answer(p_V, q_V, keep_V)
    rows = {"drafted (q)": q_V, "drafted and kept": kept_V, "drawn instead": instead_V}
    rows |= {"comes out": kept_V + instead_V, "wanted (p)": p_V}
    return Drawing("maps", {
        "panels": {"a rule that keeps 70 % of what it could": torch.stack([*rows.values()])},
        "rows": "", "columns": "token", "unit": "probability", "ticks": [*rows],
    })  # fmt: skip


INSTEAD = Exercise(
    identifier="07.4", title="What to draw instead",
    difficulty=3, importance=4, minutes=15, lines=2,
    case=instead_case, oracle=instead_by_equations, picture=instead_picture,
    alt="five rows over twelve tokens. Drafts are likeliest around token 7, p is around token 4. "
    "What is kept lies between the two, what is drawn instead fills up the rest, and their sum "
    "looks like the last row, p.",
    wrong=(
        Wrong(lambda p, q, keep: p,
              "drawn from p; what is kept comes on top of it, so p would not come out", 22),
        Wrong(lambda p, q, keep: q,
              "drawn from q again; refused drafts would come back", 22),
        Wrong(lambda p, q, keep: to_one((p - q).clamp(min=0)),
              "the formula for drafts that are kept as often as possible; this rule keeps fewer",
              22),
        Wrong(lambda p, q, keep: to_one(q * (1 - keep)),
              "the refused drafts themselves; what is missing from p has to be drawn", 22),
        Wrong(lambda p, q, keep: to_one(p * (1 - keep)),
              "p, thinned by the rule; the rule thins what is drafted, and that is q", 22),
        Wrong(lambda p, q, keep: to_one((p - keep).clamp(min=0)),
              "`keep` is taken for the chance that a token comes out; it has to be drafted first",
              22),
        Wrong(lambda p, q, keep: p - q * keep,
              "right shares, but they do not add up to one"),
        Wrong(lambda p, q, keep: (p - q * keep).softmax(0),
              "a softmax of what is missing; it is divided by its sum"),
        Wrong(lambda p, q, keep: (p == p.max()).float(),
              "the likeliest token always; that is greedy decoding", 22),
    ),
)  # fmt: skip

# ------------------------------------------------------------------- 07.5 drawn, verified, replaced


def sample_case(draw: Draw) -> dict[str, Any]:
    rows, vocabulary = draw.randint(150, 250), draw.randint(5, 9)
    p_BV, q_BV = (1.5 * draw.normal(2, rows, vocabulary)).softmax(2)
    drafts = [draw.choices(range(vocabulary), row)[0] for row in q_BV.tolist()]
    return {
        "p_BV": p_BV, "q_BV": q_BV, "drafts_B": torch.tensor(drafts),
        **{name: torch.tensor([draw.uniform(0.001, 0.999) for _ in drafts])
           for name in ("chance_B", "second_B")},
    }  # fmt: skip


def sample_one_by_one(
    p_BV: Tensor, q_BV: Tensor, drafts_B: Tensor, chance_B: Tensor, second_B: Tensor
) -> tuple[Tensor, Tensor]:
    """A row at a time, walking along what is left of p until the second number is used up."""
    tokens, kept = [], []
    every = (each.tolist() for each in (p_BV, q_BV, drafts_B, chance_B, second_B))
    for p, q, draft, chance, second in zip(*every, strict=True):
        kept.append(chance < min(1.0, p[draft] / q[draft]))
        if kept[-1]:
            tokens.append(draft)
            continue
        left = [max(a - b, 0.0) for a, b in zip(p, q, strict=True)]
        to_go, token = second * sum(left), 0
        while to_go >= left[token]:
            to_go, token = to_go - left[token], token + 1
        tokens.append(token)
    return torch.tensor(tokens), torch.tensor(kept)


def sampling(
    keep: Callable[[Tensor, Tensor], Tensor] = lambda p, q: p / q,
    rest: Callable[[Tensor, Tensor], Tensor] = lambda p, q: (p - q).clamp(min=0),
    total: bool = True,
) -> Function:
    """The answer of somebody who keeps a draft with another chance, or draws from another rest."""

    def answer(
        p_BV: Tensor, q_BV: Tensor, drafts_B: Tensor, chance_B: Tensor, second_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        kept_B = chance_B < keep(p_BV, q_BV).gather(1, drafts_B[:, None])[:, 0]
        sums_BV = rest(p_BV, q_BV).cumsum(1)
        until_B1 = second_B[:, None] * (sums_BV[:, -1:] if total else 1)
        other_B = (sums_BV <= until_B1).sum(1).clamp(max=p_BV.shape[1] - 1)
        return torch.where(kept_B, drafts_B, other_B), kept_B

    return answer


def likeliest(p_BV: Tensor, q_BV: Tensor) -> Tensor:
    return (p_BV == p_BV.amax(1, keepdim=True)).float()


def sample_picture(answer: Function) -> Drawing:
    draw, rows, place_V = Draw(0), 5000, torch.arange(12.0)
    p_V, q_V = ((-(((place_V - middle) / 2) ** 2) / 2).softmax(0) for middle in (4, 7))
    drafts_B = torch.tensor(draw.choices(range(12), q_V.tolist(), k=rows))
    numbers = (torch.tensor([draw.random() for _ in range(rows)]) for _ in range(2))
    tokens, _ = answer(p_V.expand(rows, -1), q_V.expand(rows, -1), drafts_B, *numbers)
    shown = {"drafted": drafts_B.bincount(minlength=12) / rows}
    shown |= {"comes out": tokens.bincount(minlength=12) / rows, "wanted (p)": p_V}
    return Drawing("maps", {
        "panels": {"5,000 drafts from q, verified": torch.stack([*shown.values()])}, "rows": "",
        "columns": "token", "unit": "share", "ticks": [*shown],
    })  # fmt: skip


SAMPLE = Exercise(
    identifier="07.5", title="Drawn, verified, replaced",
    difficulty=3, importance=4, minutes=20, lines=6,
    case=sample_case, oracle=sample_one_by_one, picture=sample_picture,
    alt="three rows over twelve tokens. Drafts gather around token 7; what comes out gathers "
    "around token 4, as p does, up to the chance of 5,000 draws.",
    wrong=(
        Wrong(sampling(lambda p, q: q),
              "a draft is kept as often as the module is sure of it; p has no say", 22),
        Wrong(sampling(lambda p, q: p),
              "a draft is kept with probability p; it is drafted with q already, so it would "
              "come out p x q of the time", 22),
        Wrong(sampling(lambda p, q: q / p),
              "the ratio is turned; a draft that p likes better than q does is always kept", 22),
        Wrong(sampling(likeliest),
              "only p's likeliest token is kept; that is the greedy rule", 22),
        Wrong(sampling(rest=lambda p, q: p),
              "a refused draft is replaced by a draw from p; what is kept comes on top of it", 22),
        Wrong(sampling(rest=lambda p, q: q),
              "a refused draft is replaced by a draw from q, from which it came", 22),
        Wrong(sampling(rest=lambda p, q: (q - p).clamp(min=0)),
              "the difference is turned; what q leaves of p has to be drawn", 22),
        Wrong(sampling(rest=lambda p, q: (p - q).abs()),
              "differences of both signs are drawn from; where q is above p nothing is missing",
              22),
        Wrong(sampling(rest=likeliest),
              "a refused draft is replaced by p's likeliest token; it has to be drawn", 22),
        Wrong(sampling(total=False),
              "what is left of p is not brought to a sum of one, so the second number runs past "
              "it", 22),
    ),
)  # fmt: skip

EXERCISES = (SPEED, INSTEAD, SAMPLE)
