"""Exercises of notebook 03, the decoupled key in a score, and YaRN's frequencies.

Legend: T tokens, H heads, D hidden, C latent, N content width, R rotary width, P = R / 2 pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv3_mini.course.checking import Draw, Drawing, Exercise, Function, Wrong
from dsv3_mini.course.exercises.nb02_cache import norm, turn, turn_halves

# ---------------------------------------------- 03.3 content and position in a score, eqs 2-4, 8-10


def score_case(draw: Draw) -> dict[str, Any]:
    heads, tokens, pairs = draw.randint(2, 4), draw.randint(3, 6), draw.randint(2, 3)
    nope, hidden = 2 * pairs + draw.randint(1, 4), draw.randint(10, 16)
    positions = draw.randint(0, 50) + torch.arange(tokens, dtype=torch.float32)
    return {
        "q_HTX": draw.normal(heads, tokens, nope + 2 * pairs),
        "h_TD": draw.normal(tokens, hidden),
        "c_TC": draw.normal(tokens, hidden),  # as wide as h: only the author can tell them apart
        "w_uk_HNC": draw.normal(heads, nope, hidden) / hidden**0.5,
        "w_kr_RD": draw.normal(2 * pairs, hidden) / hidden**0.5,
        "angle_TP": positions[:, None] * 20.0 ** -(torch.arange(pairs) / pairs),
    }


def score_one_by_one(
    q_HTX: Tensor, h_TD: Tensor, c_TC: Tensor, w_uk_HNC: Tensor, w_kr_RD: Tensor, angle_TP: Tensor
) -> Tensor:
    """Pair by pair: only the angle between query and key enters, as the phase of a product."""
    q, h, c, w_uk, w_kr, angle = (
        x.double().numpy() for x in (q_HTX, h_TD, c_TC, w_uk_HNC, w_kr_RD, angle_TP)
    )
    nope, tokens = w_uk.shape[1], len(h)
    out = np.zeros((len(q), tokens, tokens))
    for head, t, j in np.ndindex(out.shape):
        total = q[head, t, :nope] @ (w_uk[head] @ c[j])
        key, query = w_kr @ h[j], q[head, t, nope:]
        for pair, difference in enumerate(angle[j] - angle[t]):
            first, second = 2 * pair, 2 * pair + 1
            turned = complex(key[first], key[second]) * np.exp(1j * difference)
            total += (complex(query[first], -query[second]) * turned).real
        out[head, t, j] = total / math.sqrt(q.shape[2])
    return torch.tensor(out, dtype=torch.float32)


def scoring(
    rotary: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    key: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = lambda h, c, k_c, w: h @ w.T,
    content: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = lambda q, k, a: (q, k),
    latent: Callable[[Tensor, Tensor], Tensor] = lambda c, a: c,
    join: Callable[[Tensor, Tensor, int], Tensor] = lambda x, y, n: (x + y) / n**0.5,
) -> Function:
    """The answer of somebody who does one of these steps in another way.

    rotary: queries and keys, from unturned ones, for queries' and keys' angles
    key: the unturned rotary key, from hidden state, latent, content keys and W_KR
    content: content queries and keys, from those and the angles
    latent: the latent, from that and the angles
    join: the scores, from content scores, rotary scores and N + R
    """

    def answer(
        q_HTX: Tensor, h: Tensor, c: Tensor, w_uk: Tensor, w_kr: Tensor, angle: Tensor
    ) -> Tensor:
        q_c, q_r = q_HTX.tensor_split([w_uk.shape[1]], dim=2)
        k_c = latent(c, angle) @ w_uk.mT
        k_r = key(h, c, k_c, w_kr)
        q_r, k_r = (rotary or both_turned)(q_r, k_r, angle, angle)
        q_c, k_c = content(q_c, k_c, angle)
        return join(q_c @ k_c.mT, q_r @ k_r.mT, q_HTX.shape[2])

    return answer


def both_turned(q: Tensor, k: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return turned(q, a), turned(k, b)


def turned(x: Tensor, angle_TP: Tensor) -> Tensor:
    """x (..., T, at least R): its first R numbers are turned, neighbour with neighbour."""
    width = 2 * angle_TP.shape[1]
    heads = x.reshape(-1, *x.shape[-2:])
    made = [torch.cat((turn(head[:, :width], angle_TP), head[:, width:]), 1) for head in heads]
    return torch.stack(made).view_as(x)


def halves(q: Tensor, k: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return torch.stack([turn_halves(head, a) for head in q]), turn_halves(k, b)


def scale_of_each_part(q_HTX: Tensor, *rest: Tensor) -> Tensor:
    nope = rest[2].shape[1]
    rotary = q_HTX.shape[2] - nope
    wider = torch.tensor([q_HTX.shape[2] / nope] * nope + [q_HTX.shape[2] / rotary] * rotary)
    return score_one_by_one(q_HTX * wider.sqrt(), *rest)


def score_picture(answer: Function) -> Drawing:
    draw, tokens = Draw(5), 32
    h_TD, c_TC = draw.normal(1, 16).expand(tokens, -1), draw.normal(1, 16).expand(tokens, -1)
    w_uk_HNC, w_kr_RD = draw.normal(1, 8, 16) / 4, 2 * draw.normal(8, 16) / 4
    query_TR = (h_TD @ w_kr_RD.T)[None]  # it asks for its own token: highest at distance 0
    q_HTX = torch.cat((draw.normal(1, 1, 8).expand(1, tokens, -1), query_TR), dim=2)
    panels = {}
    for start in (0, 1000):
        position_T1 = start + torch.arange(float(tokens))[:, None]
        angle_TP = position_T1 * torch.tensor([1.0, 0.3, 0.1, 0.03])
        scores_HTT = answer(q_HTX, h_TD, c_TC, w_uk_HNC, w_kr_RD, angle_TP)
        panels[f"positions {start:,} to {start + tokens - 1:,}"] = scores_HTT[0]
    return Drawing("maps", {
        "panels": panels, "rows": "query's token", "columns": "key's token", "unit": "score",
    })  # fmt: skip


SCORE = Exercise(
    identifier="03.3", title="Content and position in one score",
    difficulty=3, importance=5, minutes=20, lines=7,
    case=score_case, oracle=score_one_by_one, picture=score_picture,
    alt="scores of the same token with itself, at 32 positions from 0 and from 1,000 on. Both show "
    "the same diagonal stripes, brightest on the diagonal: a score depends on distance only.",
    wrong=(
        Wrong(scoring(lambda q, k, a, b: (q, k)),
              "nothing is turned; the scores do not know where the tokens stand", 2),
        Wrong(scoring(key=lambda h, c, k_c, w: c @ w.T),
              "the rotary key is made from the latent; what does equation 3 make it from?", 2),
        Wrong(scoring(key=lambda h, c, k_c, w: k_c[..., : len(w)]),
              "each head has a rotary key of its own, cut from its content key", 2),
        Wrong(scoring(join=lambda x, y, n: x / n**0.5),
              "the rotary part of the score is missing", 2),
        Wrong(scoring(content=lambda q, k, a: (turned(q, a), turned(k, a))),
              "content queries and keys are turned too; position belongs to one part alone", 3),
        Wrong(scoring(lambda q, k, a, b: (q, k), content=lambda q, k, a: (turned(q, a),
                                                                       turned(k, a))),
              "the content part is turned instead of the rotary part", 3),
        Wrong(scoring(latent=turned),
              "the latent is turned before it makes keys; position never touches it", 3),
        Wrong(scoring(lambda q, k, a, b: (q, turned(k, b))),
              "keys are turned and queries are not; it takes both to measure a distance"),
        Wrong(scoring(lambda q, k, a, b: (turned(q, -a), turned(k, b))),
              "queries and keys turn in opposite directions; the score then depends on the sum of "
              "their positions"),
        Wrong(scoring(halves),
              "number i is paired with i + R/2; the checkpoint's pairs are neighbours", 7),
        Wrong(scoring(key=lambda h, c, k_c, w: norm(h @ w.T)),
              "the rotary key is normalised; it goes past the norm", 4),
        Wrong(scale_of_each_part,
              "content and rotary scores with a scale each; their sum has one", 5),
        Wrong(lambda *x: score_one_by_one(*x) * (x[0].shape[2] / x[3].shape[1]) ** 0.5,
              "the scale of the content part alone; a query has N + R numbers", 5),
        Wrong(scoring(join=lambda x, y, n: x + y),
              "the scale is missing", 5),
    ),
)  # fmt: skip

# ------------------------------------------------------------------------- 03.4 YaRN, report 4.3


def yarn_case(draw: Draw) -> dict[str, Any]:
    pairs, theta = draw.choice([16, 24, 32, 48]), draw.choice([5e3, 1e4, 5e4, 1e5])
    return {
        "speed_P": theta ** -(torch.arange(pairs) / pairs),
        "trained": draw.randint(1000, 5000), "factor": draw.randint(4, 40),
        "fast": draw.randint(20, 40), "slow": draw.randint(1, 3), "width": draw.randint(100, 200),
    }  # fmt: skip


def yarn_by_logarithms(
    speed_P: Tensor, trained: int, factor: int, fast: int, slow: int, width: int
) -> tuple[Tensor, float]:
    """Nothing is counted: the ends of the ramp follow from how speeds fall, as in released code."""
    speeds = speed_P.double().tolist()
    fall = math.log(speeds[0] / speeds[-1]) / (len(speeds) - 1)
    low, high = (math.log(trained / math.tau * speeds[0] / turns) / fall for turns in (fast, slow))
    ends = [math.floor(low), math.ceil(high)]
    made = [np.interp(p, ends, [speed, speed / factor]) for p, speed in enumerate(speeds)]
    scale = (math.log(factor) / 10 + 1) ** 2 / math.sqrt(width)
    return torch.tensor(np.array(made), dtype=torch.float32), scale


def stretching(
    share: Callable[[Tensor, Tensor, int, int], Tensor] | None = None,
    blend: Callable[[Tensor, Tensor, int], Tensor] = lambda v, x, s: v * (1 - x) + v / s * x,
    scale: Callable[[float, int], float] = lambda m, width: m * m / width**0.5,
) -> Function:
    """The answer of somebody who does one of these steps in another way.

    share: how far each pair is divided, from numbers of pairs, their turns, fast and slow
    blend: the frequencies, from the plain ones, the shares and the factor
    scale: what scores are multiplied by, from 0.1 ln s + 1 and the width
    """

    def answer(
        speed_P: Tensor, trained: int, factor: int, fast: int, slow: int, width: int
    ) -> tuple[Tensor, float]:
        turns_P, pair_P = trained * speed_P / math.tau, torch.arange(len(speed_P))
        share_P = (share or ramp)(pair_P, turns_P, fast, slow).clamp(0, 1)
        return blend(speed_P, share_P, factor), scale(0.1 * math.log(factor) + 1, width)

    return answer


def ramp(pair_P: Tensor, turns_P: Tensor, fast: int, slow: int) -> Tensor:
    low, high = int((turns_P >= fast).sum()) - 1, int((turns_P > slow).sum())
    return (pair_P - low) / (high - low)


def yarn_picture(answer: Function) -> Drawing:
    speed_P = 1e4 ** -(torch.arange(32) / 32)
    stretched_P, _ = answer(speed_P, 4096, 40, 32, 1, 192)
    return Drawing("lines", {
        "x": list(range(32)), "curves": {"V3": (stretched_P / speed_P).tolist()},
        "xlabel": "pair", "ylabel": "new speed / old speed",
    })  # fmt: skip


YARN = Exercise(
    identifier="03.4", title="YaRN: which pairs are slowed",
    difficulty=4, importance=4, minutes=20, lines=8,
    case=yarn_case, oracle=yarn_by_logarithms, picture=yarn_picture,
    alt="how much of its speed each of V3's 32 pairs keeps. Pairs 0 to 10 keep all of it, those "
    "from 23 on a fortieth, and between them the share falls in a straight line.",
    wrong=(
        Wrong(stretching(lambda p, turns, fast, slow: torch.ones_like(turns)),
              "every frequency is divided, which is plain interpolation; fast pairs have seen "
              "whole turns and stay", 6),
        Wrong(stretching(lambda p, turns, fast, slow: (p - slow) / (fast - slow)),
              "fast and slow are taken for numbers of pairs; they count turns", 6),
        Wrong(stretching(scale=lambda m, width: 1 / width**0.5),
              "the frequencies are right, but the scores are not sharpened", 6),
        Wrong(stretching(scale=lambda m, width: m / width**0.5),
              "the frequencies are right; the sharpening is counted once, but queries and keys "
              "each bring one", 6),
        Wrong(stretching(scale=lambda m, width: m * m),
              "the frequencies are right; the scale by the width of a query is missing", 5),
        Wrong(stretching(lambda *x: 1 - ramp(*x)),
              "the fast pairs are divided and the slow ones stay; which of them meet new angles?",
              6),
        Wrong(stretching(lambda p, turns, fast, slow: (turns < slow).float()),
              "a jump from one pair to the next; between the two ends pairs are blended"),
        Wrong(stretching(lambda p, turns, fast, slow: (fast - turns) / (fast - slow)),
              "the ramp runs over turns; here it runs over the numbers of the pairs"),
        Wrong(stretching(lambda p, turns, fast, slow: ramp(p, turns * math.tau, fast, slow)),
              "radians are taken for turns; a turn has 2 pi of them"),
        Wrong(stretching(blend=lambda v, x, s: v / (1 + x * (s - 1))),
              "divisors are blended; blend the frequencies, the plain one and the divided one"),
        Wrong(stretching(blend=lambda v, x, s: v * (1 - x) + v * s * x),
              "slow pairs are multiplied by the factor; they are to turn slower"),
    ),
)  # fmt: skip

EXERCISES = (SCORE, YARN)
