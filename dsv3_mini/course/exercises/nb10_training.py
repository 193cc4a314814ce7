"""Exercises of notebook 10: how fast to learn, and a batch that does not fit into memory at once.

Legend: N positions, V vocabulary, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dsv3_mini.course.checking import Draw, Drawing, Exercise, Function, Wrong

# ------------------------------------------------------------- 10.1 the report's schedule, its 4.2


def rate_case(draw: Draw) -> dict[str, Any]:
    warm, until = draw.randint(10, 30), draw.randint(100, 200)
    fall, tail = draw.randint(60, 90), draw.randint(8, 20)
    peak = draw.randint(11, 30) / 10
    sizes = {"warm": warm, "until": until, "fall": fall, "tail": tail}
    rates = {"peak": peak, "low": draw.randint(20, 40) / 100, "final": draw.randint(5, 15) / 100}
    return {"seen": draw.randint(1, until + fall)} | sizes | rates


def in_every_part(function: Function, seen: int, *schedule: Any) -> Any:
    """The rate after ``seen`` tokens, and at a place or two in every part of the schedule."""
    warm, until, fall, tail = schedule[:4]
    down = until + fall
    places = {
        f"after {seen}": seen, "in the warm-up": 0.4 * warm, "after the warm-up": warm + 5,
        "before the fall": until - 5, "in the fall": until + 0.2 * fall,
        "late in the fall": until + 0.9 * fall, "after the fall": down + 0.6 * tail,
        "near the end": down + 1.7 * tail,
    }  # fmt: skip
    return {name: function(place, *schedule) for name, place in places.items()}


def rate_by_table(
    seen: float, warm: int, until: int, fall: int, tail: int, peak: float, low: float, final: float
) -> float:
    """The parts in a table, the cosine as the height of a point that turns half a circle."""
    turned = np.exp(1j * np.pi * (seen - until) / fall)
    middle, radius = (peak + low) / 2, (peak - low) / 2
    parts = [
        (warm, np.interp(seen, [0, warm], [0, peak])), (until, peak),
        (until + fall, middle + radius * turned.real), (until + fall + tail, low), (np.inf, final),
    ]  # fmt: skip
    return float(next(rate for end, rate in parts if seen < end))


def half_wave(part: float, peak: float, low: float) -> float:
    return low + (peak - low) * (1 + math.cos(math.pi * part)) / 2


def scheduling(
    rise: Callable[[float, float, float], float] = lambda part, peak, low: peak * part,
    part: Callable[[float, int, int, int], float] = lambda seen, warm, until, fall: (
        (seen - until) / fall
    ),
    down: Callable[[float, float, float], float] = half_wave,
    ending: bool = True,
) -> Function:
    """The answer of somebody whose warm-up, way down and end are such."""

    def answer(
        seen: float, warm: int, until: int, fall: int, tail: int,
        peak: float, low: float, final: float,
    ) -> float:  # fmt: skip
        if seen < warm:
            return rise(seen / warm, peak, low)
        passed = part(seen, warm, until, fall)
        if passed >= 1:
            return final if ending and (passed - 1) * fall > tail else low
        return down(max(passed, 0.0), peak, low)

    return answer


def rate_picture(answer: Function) -> Drawing:
    tokens = [*range(0, 30, 5), *range(50, 14_800, 50)]
    sizes = 25, 10_000, 4_300, 333
    curves = {"rate": [1e4 * answer(n, *sizes, 2.2e-4, 2.2e-5, 7.3e-6) for n in tokens]}
    return Drawing("lines", {
        "x": [n / 1000 for n in tokens], "curves": curves, "marks": False,
        "xlabel": "tokens seen (trillions)", "ylabel": "learning rate (1e-4)",
    })  # fmt: skip


RATE = Exercise(
    identifier="10.1", title="How fast V3 learned",
    difficulty=2, importance=4, minutes=15, lines=6,
    case=rate_case, oracle=rate_by_table, picture=rate_picture, run=in_every_part,
    alt="V3's learning rate over 14.8 trillion tokens. It jumps to 2.2e-4, as the warm-up is too "
    "short to be seen, and stays there for two thirds of the training. From 10 to 14.3 it falls "
    "in an S to a tenth of that. Near the end there is one small step down.",
    wrong=(
        Wrong(scheduling(part=lambda s, w, u, f: (s - w) / (u + f - w)),
              "the constant part is missing: the rate falls as soon as the warm-up is over"),
        Wrong(scheduling(part=lambda s, w, u, f: (s - w - u) / f),
              "the constant part is counted from the end of the warm-up; `until` counts every "
              "token"),
        Wrong(scheduling(down=lambda part, peak, low: peak + (low - peak) * part),
              "the rate falls along a straight line; a cosine begins and ends flat"),
        Wrong(scheduling(down=lambda part, peak, low: half_wave(part, peak, 0.0)),
              "the cosine goes down to zero, and then the rate jumps up to `low`; where should the "
              "wave have its lowest point?"),
        Wrong(scheduling(down=lambda part, peak, low: max(low, half_wave(part, peak, 0.0))),
              "the cosine goes down to zero and is cut off at `low`; where should the wave have "
              "its lowest point?"),
        Wrong(scheduling(down=lambda part, peak, low: half_wave(part, peak, low * peak)),
              "`low` is taken for a share of the peak; it is a rate itself"),
        Wrong(scheduling(down=lambda part, peak, low: half_wave(2 * part, peak, low)),
              "a whole wave, which comes up to the peak again; half a wave ends at the bottom"),
        Wrong(scheduling(down=lambda part, peak, low: (
            low + (peak - low) * math.cos(math.pi / 2 * part))),
              "a quarter of a wave, which ends where it is steepest; half a wave ends flat"),
        Wrong(scheduling(down=lambda part, peak, low: half_wave(180 / math.pi * part, peak, low)),
              "the cosine is given degrees; `math.cos` takes radians"),
        Wrong(scheduling(rise=lambda part, peak, low: low + (peak - low) * part),
              "the warm-up begins at `low`; it begins at zero"),
        Wrong(scheduling(rise=lambda part, peak, low: peak),
              "there is no warm-up; the first steps take the full rate"),
        Wrong(scheduling(ending=False),
              "the rate stays at `low` to the end; one part is still missing"),
    ),
)  # fmt: skip

# ------------------------------------------------------------ 10.3 one step from several small ones


def batch_case(draw: Draw) -> dict[str, Any]:
    size, hidden, vocabulary = draw.randint(5, 7), draw.randint(3, 4), draw.randint(8, 10)
    positions = 3 * size + draw.randint(2, size - 2)
    target_N = torch.tensor([draw.randrange(vocabulary) for _ in range(positions)])
    for start, few in ((0, size - 1), (size, 1), (2 * size, 2)):  # as where texts have an end
        target_N[start : start + few] = -100
    return {
        "h_ND": draw.normal(positions, hidden), "w_VD": 0.5 * draw.normal(vocabulary, hidden),
        "target_N": target_N, "size": size, "clip": draw.choice([0.1, 9.0]),
    }  # fmt: skip


def batch_by_hand(h_ND: Tensor, w_VD: Tensor, target_N: Tensor, size: int, clip: float) -> Tensor:
    """Position by position in numpy: the gradient of a logit is p, less 1 for the right token."""
    h, w, total = h_ND.double().numpy(), w_VD.double().numpy(), np.zeros(tuple(w_VD.shape))
    asked = [(row, token) for row, token in zip(h, target_N.tolist(), strict=True) if token >= 0]
    for row, token in asked:
        p = np.exp(w @ row) / np.exp(w @ row).sum()
        p[token] -= 1
        total += np.outer(p, row) / len(asked)
    shorter = min(1.0, clip / float(np.linalg.norm(total)))
    return torch.tensor(total * shorter, dtype=torch.float32)


class Products(TorchFunctionMode):
    """Remembers how many numbers the largest product of matrices has made."""

    most = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "").strip("_") in (
            "matmul",
            "rmatmul",
            "mm",
            "bmm",
            "linear",
            "einsum",
        ):
            self.most = max(self.most, made.numel())
        return made


def in_little_memory(function: Function, h: Tensor, w: Tensor, *more: Any) -> Any:
    """The gradient, and whether logits were made for at most ``size`` positions at once."""
    with Products() as products:
        gradient = function(h, w, *more)
    few = products.most <= more[1] * len(w)
    return {"gradient": gradient, "one micro-batch at a time": few}


def gradient_of(h_ND: Tensor, w_VD: Tensor, target_N: Tensor, reduction: str = "sum") -> Tensor:
    w_VD = w_VD.clone().requires_grad_()
    loss = F.cross_entropy(h_ND @ w_VD.T, target_N, reduction=reduction)
    return torch.autograd.grad(loss, w_VD)[0]


def clipped(gradient: Tensor, clip: float) -> Tensor:
    return gradient * min(1.0, clip / gradient.norm().item())


def accumulating(
    reduction: str = "sum",
    over: Callable[[Tensor, int], float] = lambda target_N, parts: int((target_N >= 0).sum()),
    each: Callable[[Tensor, float], Tensor] = lambda gradient, clip: gradient,
    limit: Callable[[Tensor, float], Tensor] = clipped,
    kept: Callable[[list[Any], int], list[Any]] = lambda parts, size: parts,
) -> Function:
    """The answer of somebody who adds such gradients of such parts, divides and clips so."""

    def answer(h_ND: Tensor, w_VD: Tensor, target_N: Tensor, size: int, clip: float) -> Tensor:
        parts = kept(list(zip(h_ND.split(size), target_N.split(size), strict=True)), size)
        total = torch.zeros_like(w_VD)
        for h, target in parts:
            total += each(gradient_of(h, w_VD, target, reduction), clip)
        return limit(total / over(target_N, len(parts)), clip)

    return answer


def batch_picture(answer: Function) -> Drawing:
    before_N = torch.arange(24) % 6
    panels = {
        name: answer(torch.eye(6)[before_N], torch.zeros(6, 6), (before_N + 1) % 6, size, 1.0)
        for name, size in {"1 at a time": 1, "7 at a time": 7, "all 24 at once": 24}.items()
    }
    return Drawing("maps", {
        "panels": panels, "rows": "token v", "columns": "place in the hidden state",
        "unit": "gradient of w",
    })  # fmt: skip


BATCH = Exercise(
    identifier="10.3", title="A batch in small pieces",
    difficulty=3, importance=4, minutes=20, lines=7,
    case=batch_case, oracle=batch_by_hand, picture=batch_picture, run=in_little_memory,
    alt="the gradient of a head that has learned nothing, from 24 positions in pieces of 1, of 7 "
    "and in one: three times the same picture. After token d always comes d + 1, and after 5 comes "
    "0. So one cell in each column is negative, that of the token to come, and all others are "
    "equal, slightly above zero.",
    wrong=(
        Wrong(accumulating("mean", lambda target, parts: parts),
              "the mean of the pieces' means: a piece in which little is asked weighs as much as a "
              "full one"),
        Wrong(accumulating("mean", lambda target, parts: 1),
              "the pieces' means are added up, so that more pieces make longer steps"),
        Wrong(accumulating(over=lambda target, parts: 1),
              "the gradient of the sum; divide by the number of positions that are asked"),
        Wrong(accumulating(over=lambda target, parts: len(target)),
              "divided by all positions; those with -100 are not asked"),
        Wrong(accumulating(kept=lambda parts, size: parts[-1:]),
              "the last piece alone: each gradient replaces the one before"),
        Wrong(accumulating(kept=lambda parts, size: [p for p in parts if len(p[1]) == size]),
              "the last piece is left out because it is shorter"),
        Wrong(accumulating(limit=lambda gradient, clip: gradient),
              "the gradient is not clipped"),
        Wrong(accumulating(limit=lambda gradient, clip: gradient * clip / gradient.norm()),
              "short gradients are made longer; clipping only shortens"),
        Wrong(accumulating(limit=lambda gradient, clip: gradient.clamp(-clip, clip)),
              "each number is clipped on its own, which turns the gradient; its norm is meant"),
        Wrong(accumulating(each=clipped),
              "each piece is clipped before it is added; clipping comes once, at the end"),
        Wrong(lambda h, w, target, size, clip: clipped(gradient_of(h, w, target, "mean"), clip),
              "the right gradient, but all logits were in memory at once; take `size` positions at "
              "a time"),
    ),
)  # fmt: skip

EXERCISES = (RATE, BATCH)
