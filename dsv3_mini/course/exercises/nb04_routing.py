"""Exercises of notebook 04, the first half: who is chosen, and how much a chosen expert counts.

Legend: T tokens, E experts, G groups, K chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv3_mini.course.checking import Draw, Drawing, Exercise, Function, Wrong

# ---------------------------------------------------- 04.1 chosen with the bias, counted without it


def gates_case(draw: Draw) -> dict[str, Any]:
    experts = draw.randint(6, 10)
    return {
        "logits_TE": draw.normal(draw.randint(8, 12), experts),
        "b_E": 0.5 * draw.normal(experts),
        "chosen": draw.randint(2, 4),
        "factor": draw.choice([1.5, 2.0, 2.5]),
    }


def gates_one_by_one(logits_TE: Tensor, b_E: Tensor, chosen: int, factor: float) -> Tensor:
    """Token by token, sorting a list."""
    bias, gates = b_E.double().numpy(), np.zeros(tuple(logits_TE.shape))
    for gate, logits in zip(gates, logits_TE.double().numpy(), strict=True):
        s = [1 / (1 + np.exp(-x)) for x in logits]
        ranked = sorted(range(len(s)), key=lambda e: s[e] + bias[e], reverse=True)
        for e in ranked[:chosen]:
            gate[e] = factor * s[e] / sum(s[other] for other in ranked[:chosen])
    return torch.tensor(gates, dtype=torch.float32)


def counting(make: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Function:
    """The answer of somebody who makes so, of logits and bias, what chooses and what counts."""

    def answer(logits_TE: Tensor, b_E: Tensor, chosen: int, factor: float) -> Tensor:
        choice_TE, weight_TE = make(logits_TE, b_E)
        kept_TE = weight_TE * best(choice_TE, chosen)
        return factor * kept_TE / kept_TE.sum(dim=1, keepdim=True)

    return answer


def summing_to(total: Callable[[Tensor, Tensor, float], Tensor]) -> Function:
    """The answer of somebody who divides, and multiplies, right affinities so."""

    def answer(logits_TE: Tensor, b_E: Tensor, chosen: int, factor: float) -> Tensor:
        s_TE = logits_TE.sigmoid()
        kept_TE = s_TE * best(s_TE + b_E, chosen)
        return total(kept_TE, s_TE, factor)

    return answer


def best(choice_TE: Tensor, chosen: int) -> Tensor:
    top_TK = choice_TE.topk(chosen, dim=1).indices
    return torch.zeros_like(choice_TE, dtype=torch.bool).scatter(1, top_TK, True)


def gates_picture(answer: Function) -> Drawing:
    logits_TE, b_E = Draw(0).normal(12, 8), torch.zeros(8)
    logits_TE[:, 5] = -2.0
    favoured_E = b_E.clone()
    favoured_E[5] = 1.0
    panels = {
        "no bias": answer(logits_TE, b_E, 3, 2.5),
        "expert 5 has a bias of 1": answer(logits_TE, favoured_E, 3, 2.5),
    }
    return Drawing("maps", {"panels": panels, "rows": "token", "columns": "expert", "unit": "gate"})


GATES = Exercise(
    identifier="04.1", title="The bias chooses and does not count",
    difficulty=2, importance=5, minutes=15, lines=5,
    case=gates_case, oracle=gates_one_by_one, picture=gates_picture,
    alt="gates of 8 experts for 12 tokens, 3 of 8 chosen, each row summing to 2.5. Expert 5 suits "
    "nobody: without a bias its column is empty. With a bias of 1 every token chooses it, and yet "
    "its gates stay small.",
    wrong=(
        Wrong(counting(lambda x, b: (x.sigmoid() + b, x.sigmoid() + b)),
              "the bias reaches the gates; it has a say in the choice only", 11),
        Wrong(counting(lambda x, b: (x.sigmoid(), x.sigmoid())),
              "a router without a bias: nothing fails, and no rule can ever balance it", 18),
        Wrong(counting(lambda x, b: (x + b, x.sigmoid())),
              "the bias is added before the sigmoid; which quantity does equation 16 add it to?"),
        Wrong(counting(lambda x, b: (x.softmax(1) + b, x.softmax(1))),
              "softmax affinities, as V2 had them; in equation 15 no expert knows of another", 13),
        Wrong(counting(lambda x, b: (x.sigmoid() + b, x.exp())),
              "chosen by sigmoids, but weighed by a softmax over the chosen", 13),
        Wrong(summing_to(lambda kept, s, factor: factor * kept),
              "the gates are not normalised; look at what each row should sum to", 13),
        Wrong(summing_to(lambda kept, s, factor: factor * kept / s.sum(1, keepdim=True)),
              "the gates are divided by a sum over all experts; who is in the sum of eq 13?", 13),
        Wrong(summing_to(lambda kept, s, factor: kept / kept.sum(1, keepdim=True)),
              "the routed scaling factor is missing: each row sums to 1", 13),
        Wrong(summing_to(lambda kept, s, factor: factor * (kept / kept.sum(0).clamp(min=1e-9))),
              "each expert's gates are normalised over the tokens; each token has its own sum"),
    ),
)  # fmt: skip

# ----------------------------------------------------------------- 04.2 groups that survive, 2.1.2


def choose_case(draw: Draw) -> dict[str, Any]:
    groups, size = draw.randint(3, 4), draw.randint(3, 4)
    kept = draw.randint(1, groups - 1)
    experts, level = groups * size, draw.choice([0.0, -0.8])
    return {
        "s_TE": draw.normal(draw.randint(12, 16), experts).sigmoid(),
        "b_E": level + 0.3 * draw.normal(experts),
        "groups": groups,
        "kept": kept,
        "chosen": draw.randint(2, min(4, kept * size - 1)),
    }


def choose_by_trying(s_TE: Tensor, b_E: Tensor, groups: int, kept: int, chosen: int) -> Tensor:
    """Every set of groups is tried, and then every set of experts in the best of them."""
    mask, size = torch.zeros(s_TE.shape, dtype=torch.bool), s_TE.shape[1] // groups
    for token, row in enumerate((s_TE.double() + b_E.double()).tolist()):
        members = [row[group * size :][:size] for group in range(groups)]
        ranks = [max(a + b for a, b in combinations(each, 2)) for each in members]
        survive = max(combinations(range(groups), kept), key=lambda each: sum_of(ranks, each))
        allowed = [expert for expert in range(len(row)) if expert // size in survive]
        top = max(combinations(allowed, chosen), key=lambda each: sum_of(row, each))
        mask[token, list(top)] = True
    return mask


def sum_of(values: list[float], places: tuple[int, ...]) -> float:
    return sum(values[place] for place in places)


def grouping(
    rank: Callable[[Tensor, Tensor], Tensor] = lambda choice, s: choice.topk(2).values.sum(-1),
    lost: float = -torch.inf,
    biased: bool = True,
) -> Function:
    """The answer of somebody who ranks groups so, from biased and raw scores (T, G, E / G)."""

    def answer(s_TE: Tensor, b_E: Tensor, groups: int, kept: int, chosen: int) -> Tensor:
        choice_TE = s_TE + b_E * biased
        by_group = (each.unflatten(1, (groups, -1)) for each in (choice_TE, s_TE))
        keep_TG = best(rank(*by_group), kept)
        keep_TE = keep_TG.repeat_interleave(s_TE.shape[1] // groups, dim=1)
        return best(choice_TE.masked_fill(~keep_TE, lost), chosen)

    return answer


def in_turns(s_TE: Tensor, b_E: Tensor, groups: int, kept: int, chosen: int) -> Tensor:
    order = torch.arange(len(b_E)).unflatten(0, (-1, groups)).T.flatten()
    mask_TE = grouping()(s_TE[:, order], b_E[order], groups, kept, chosen)
    return mask_TE[:, order.argsort()]


def choose_picture(answer: Function) -> Drawing:
    s_TE, b_E = Draw(0).normal(12, 16).sigmoid(), torch.zeros(16)
    panels = {
        f"{kept} of 4 groups kept": answer(s_TE, b_E, 4, kept, 4).float() for kept in (1, 2, 4)
    }
    return Drawing(
        "maps",
        {"panels": panels, "rows": "token", "columns": "expert (4 a group)", "unit": "chosen"},
    )


CHOOSE = Exercise(
    identifier="04.2", title="Only the best groups",
    difficulty=3, importance=5, minutes=20, lines=8,
    case=choose_case, oracle=choose_by_trying, picture=choose_picture,
    alt="the same 12 tokens three times, 4 of 16 experts chosen in each row. With one group kept "
    "the four stand side by side; with two they lie in at most two blocks of four columns; with "
    "all four groups they scatter over the row.",
    wrong=(
        Wrong(grouping(lambda choice, s: choice.amax(-1)),
              "a group counts by its best expert alone; V2 did that, V3 looks at more of them", 14),
        Wrong(grouping(lambda choice, s: choice.sum(-1)),
              "a group counts the sum of all its experts; the many that lose should not matter"),
        Wrong(grouping(lambda choice, s: s.topk(2).values.sum(-1)),
              "groups are ranked without the bias; it has a say in every choice", 14),
        Wrong(grouping(lost=0.0),
              "losing groups are masked with 0, and 0 beats a survivor with a negative s + b", 14),
        Wrong(grouping(biased=False),
              "a router without a bias: nothing fails, and no rule can ever balance it", 18),
        Wrong(lambda s, b, groups, kept, chosen: best(s + b, chosen),
              "no limit: experts of any group are chosen, so a token may travel to every node"),
        Wrong(grouping(lambda choice, s: -choice.topk(2).values.sum(-1)),
              "the groups that should lose are kept"),
        Wrong(in_turns,
              "experts are dealt out to the groups in turn; a group is a run of neighbours"),
    ),
)  # fmt: skip

EXERCISES = (GATES, CHOOSE)
