"""Exercises of notebook 04, the second half: the layer, and which tests can see a routing bug.

Legend: T tokens, E experts, K chosen, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dsv3_mini.course.checking import Draw, Drawing, Exercise, Function, Wrong

# ----------------------------------------------------- 04.3 every token through its experts, eq 12


def layer_case(draw: Draw) -> dict[str, Any]:
    tokens, hidden, chosen = draw.randint(16, 24), draw.randint(5, 8), draw.randint(2, 3)
    experts = draw.randint(10, 14)
    gates_TK = draw.normal(tokens, chosen).abs() + 0.2
    return {
        "u_TD": draw.normal(tokens, hidden),
        "chosen_TK": draw.normal(tokens, experts).argsort(dim=1)[:, :chosen],
        "gates_TK": 2.5 * gates_TK / gates_TK.sum(dim=1, keepdim=True),
        "w_EDD": draw.normal(experts, hidden, hidden) / hidden**0.5,
        "shared_DD": draw.normal(hidden, hidden) / hidden**0.5,
    }


def layer_one_by_one(
    u_TD: Tensor, chosen_TK: Tensor, gates_TK: Tensor, w_EDD: Tensor, shared_DD: Tensor
) -> Tensor:
    """Token by token and expert by expert."""
    experts, shared = w_EDD.double().numpy(), shared_DD.double().numpy()
    out = []
    rows = zip(u_TD.double().numpy(), chosen_TK.tolist(), gates_TK.tolist(), strict=True)
    for u, chosen, gates in rows:
        total = shared @ u
        for expert, gate in zip(chosen, gates, strict=True):
            total = total + gate * (experts[expert] @ u)
        out.append(total)
    return torch.tensor(np.array(out), dtype=torch.float32)


def counted(
    function: Function, u: Tensor, chosen: Tensor, gates: Tensor, w: Tensor, shared: Tensor
) -> Any:
    """The output, and whether about K + 1 experts worked for each token."""
    with FlopCounterMode(display=False) as counter:
        output = function(u, chosen, gates, w, shared)
    needed = 2 * shared.numel() * len(u) * (chosen.shape[1] + 1)
    return {"output": output, "few operations": counter.get_total_flops() <= 1.5 * needed}


def layer(
    join: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] = lambda routed, shared, *_: (
        routed + shared
    ),
    weigh: Callable[[Tensor, Tensor], Tensor] = lambda gates, chosen: gates,
) -> Function:
    """The answer of somebody who weighs the routed outputs so, and joins the shared one so."""

    def answer(
        u_TD: Tensor, chosen_TK: Tensor, gates_TK: Tensor, w_EDD: Tensor, shared_DD: Tensor
    ) -> Tensor:
        routed_TD = torch.zeros_like(u_TD)
        weight_TK = weigh(gates_TK, chosen_TK)
        for expert, w_DD in enumerate(w_EDD):
            token, place = (chosen_TK == expert).nonzero(as_tuple=True)
            routed_TD[token] += weight_TK[token, place, None] * (u_TD[token] @ w_DD.T)
        return join(routed_TD, u_TD @ shared_DD.T, u_TD, gates_TK, chosen_TK)

    return answer


def last_only(gates_TK: Tensor, chosen_TK: Tensor) -> Tensor:
    return gates_TK * (chosen_TK == chosen_TK.amax(dim=1, keepdim=True))


def with_room(gates_TK: Tensor, chosen_TK: Tensor) -> Tensor:
    """Zero for tokens that come to an expert after it has had its even share of them."""
    flat, experts = chosen_TK.flatten(), int(chosen_TK.max()) + 1
    came_before = torch.stack([(flat[:n] == e).sum() for n, e in enumerate(flat)])
    return gates_TK * (came_before < -(-len(flat) // experts)).view_as(gates_TK)


def tokens_of_last(shared_TD: Tensor, chosen_TK: Tensor) -> Tensor:
    return shared_TD * (chosen_TK == chosen_TK.max()).any(dim=1, keepdim=True)


def every_expert(
    u_TD: Tensor, chosen_TK: Tensor, gates_TK: Tensor, w_EDD: Tensor, shared_DD: Tensor
) -> Tensor:
    gates_TE = u_TD.new_zeros(len(u_TD), len(w_EDD)).scatter(1, chosen_TK, gates_TK)
    made_ETD = u_TD @ w_EDD.mT
    return (gates_TE.T[:, :, None] * made_ETD).sum(dim=0) + u_TD @ shared_DD.T


def layer_picture(answer: Function) -> Drawing:
    u_TD = torch.eye(9)[:1].expand(12, -1)
    shifts_EDD = torch.stack([torch.eye(9).roll(e + 1, 0) for e in range(8)])
    scores_TE = Draw(0).normal(12, 8).sigmoid()
    top = scores_TE.topk(3, dim=1)
    gates_TK = 2.5 * top.values / top.values.sum(dim=1, keepdim=True)
    out = answer(u_TD, top.indices, gates_TK, shifts_EDD, torch.eye(9))
    return Drawing("maps", {
        "panels": {"column 0: the shared expert; column e + 1: expert e": out},
        "rows": "token", "columns": "number of the output", "unit": "value",
    })  # fmt: skip


LAYER = Exercise(
    identifier="04.3", title="Each token through its own experts",
    difficulty=3, importance=4, minutes=20, lines=6,
    case=layer_case, oracle=layer_one_by_one, picture=layer_picture, run=counted,
    alt="12 equal tokens, 1 at place 0 and else 0. The shared expert leaves that as it is, and "
    "expert e moves it to place e + 1. Column 0 is 1 in every row; beside it each row has three "
    "cells, its own three experts, whose values sum to 2.5.",
    wrong=(
        Wrong(layer(lambda routed, shared, *_: routed),
              "the shared expert is missing", 15),
        Wrong(layer(lambda routed, shared, u, gates, _: routed + gates.sum(1, True) * shared),
              "the shared expert is scaled as the routed ones are; has it a gate in eq 12?", 15),
        Wrong(layer(lambda routed, shared, u, gates, _: routed + gates.shape[1] * shared),
              "the shared expert comes in once for each chosen expert, inside the loop", 15),
        Wrong(layer(lambda routed, shared, u, gates, k: routed + tokens_of_last(shared, k)),
              "the shared expert runs only for the tokens of the last expert of a loop", 15),
        Wrong(layer(lambda routed, shared, u, *_: u + routed + shared),
              "u is in the result; that is the residual, which the block adds"),
        Wrong(layer(weigh=lambda gates, _: torch.ones_like(gates)),
              "the gates are not used: every chosen expert counts the same"),
        Wrong(layer(weigh=lambda gates, _: gates / gates.sum(1, True)),
              "gates are normalised a second time; what they sum to is meant", 13),
        Wrong(layer(weigh=last_only),
              "each expert overwrites what the ones before it gave to the same token"),
        Wrong(layer(weigh=with_room),
              "an expert with many tokens drops some of them; V3 drops none"),
        Wrong(lambda u, k, gates, w, shared: layer()(u, k, gates, w.mT, shared.T),
              "the matrices are transposed: rows of w are outputs, so a token u becomes w @ u"),
        Wrong(every_expert,
              "the right numbers, the long way: experts ran on tokens that did not choose them"),
    ),
)  # fmt: skip

# ------------------------------------------------------------- 04.4 a test that cannot see anything


def seen_case(draw: Draw) -> dict[str, Any]:
    groups, size = draw.choice([(1, 8), (3, 1), (4, 1), (4, 2), (3, 4)])
    kept = draw.randint(1, groups)
    chosen = draw.randint(1, kept * size)
    return {"experts": groups * size, "groups": groups, "kept": kept, "chosen": chosen}


def with_fewest_and_most(
    function: Function, experts: int, groups: int, kept: int, chosen: int
) -> Any:
    """The answer for this many chosen, for one, and for all that the kept groups hold."""
    numbers = (chosen, 1, kept * experts // groups)
    return {f"with {n} chosen": function(experts, groups, kept, n) for n in numbers}


@cache
def seen_by_searching(experts: int, groups: int, kept: int, chosen: int) -> tuple[bool, ...]:
    """Right and wrong routers side by side on 500 random tokens, each with its own bias."""
    random = np.random.default_rng(experts + 97 * groups)
    s = random.random((500, experts))
    b = random.uniform(-2, 0.5, (len(s), 1)) + random.uniform(-0.7, 0.7, s.shape)

    def gates(by_best: int = 2, lost: float = -np.inf, choose: Any = b, count: Any = 0.0) -> Any:
        score = s + choose
        members = np.sort(score.reshape(len(s), groups, -1), axis=2)[:, :, -by_best:].sum(axis=2)
        losers = np.argsort(-members, axis=1)[:, kept:]
        for token, row in enumerate(losers):
            score[token].reshape(groups, -1)[row] = lost
        weight = s + count
        out = np.argsort(-score, axis=1, kind="stable")[:, chosen:]
        np.put_along_axis(weight, out, 0.0, axis=1)
        return weight / weight.sum(axis=1, keepdims=True)

    bugs = ({"choose": 0.0}, {"count": b}, {"by_best": 1}, {"lost": 0.0})
    return tuple(not np.allclose(gates(), gates(**bug)) for bug in bugs)


def seen_picture(answer: Function) -> Drawing:
    every = {
        "8 experts,\nall 8 chosen": (8, 1, 1, 8),
        "8 experts,\n1 chosen": (8, 1, 1, 1),
        "16 experts,\n4 chosen": (16, 1, 1, 4),
        "16 experts,\n4 chosen,\n4 of 4 groups": (16, 4, 4, 4),
        "mini: 16, 4,\n2 of 4 groups": (16, 4, 2, 4),
        "V3: 256, 8,\n4 of 8 groups": (256, 8, 4, 8),
    }
    groups = {name: sum(answer(*sizes)) for name, sizes in every.items()}
    return Drawing("bars", {"groups": groups, "ylabel": "bugs that can show (of 4)"})


SEEN = Exercise(
    identifier="04.4", title="Could this test fail?",
    difficulty=3, importance=5, minutes=15, lines=5,
    case=seen_case, oracle=seen_by_searching, picture=seen_picture,
    run=with_fewest_and_most,
    alt="how many of the four bugs can show. Where all 8 of 8 experts are chosen, or 1 of 8, only "
    "one can. With 4 of 16 chosen it is two, whether there are no groups or all of 4 groups stay. "
    "The sizes of mini and of V3 can show all four.",
    wrong=(
        Wrong(lambda e, g, kept, k: (True,) * 4,
              "every configuration is taken to show every bug. Choose all experts by hand: does "
              "a changed b change who is chosen?", 17),
        Wrong(lambda e, g, kept, k: (k < e,) * 4,
              "one condition for all four bugs; some of them do not depend on who is chosen", 17),
        Wrong(lambda e, g, kept, k: (k < e, k > 1, g > 1 and e > g, g > 1),
              "having groups is taken to be enough; what does a limit change that no group "
              "exceeds?", 17),
        Wrong(lambda e, g, kept, k: (k < e, k > 1, kept < g, kept < g),
              "ranking by the best expert is taken to show wherever groups lose; how many experts "
              "does a group need for that?", 17),
        Wrong(lambda e, g, kept, k: (k < e, True, kept < g < e, kept < g),
              "a bias in the gates is taken to show always; normalise the gate of one expert", 17),
        Wrong(lambda e, g, kept, k: (k < e, k < e, kept < g < e, kept < g),
              "a bias in the gates is taken to hide where nothing is left to choose; write down "
              "the gates for that case", 17),
        Wrong(lambda e, g, kept, k: (k < kept * e // g, k > 1, kept < g < e, kept < g),
              "the surviving groups are counted as if the bias did not choose them too", 17),
    ),
)  # fmt: skip

EXERCISES = (LAYER, SEEN)
