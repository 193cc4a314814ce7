"""Exercises of notebook 09, a layer: its backward pass in FP8, and its training from fp32 weights.

Legend: T tokens, I input width, O output width, i and o blocks of them, S steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dsv3_mini.course.checking import Draw, Drawing, Exercise, Function, Wrong
from dsv3_mini.course.exercises.nb08_numbers import nearest, numbers
from dsv3_mini.fp8_numbers import E4M3, dequantize, quantize

# ------------------------------------------------ 09.1 the backward pass, from what was kept, Fig 6


def cast(x: Tensor, side: int) -> Tensor:
    """As in the stub's cell."""
    return dequantize(*quantize(x, (1, side)), (1, side))


def backward_case(draw: Draw) -> dict[str, Any]:
    side = draw.randint(4, 6)
    tokens, inner, outer = (n * side + draw.randint(1, side - 1) for n in (3, 2, 1))
    kept, scale_x = quantize(draw.normal(tokens, inner), (1, side))
    weight, scale_w = quantize(draw.normal(outer, inner), (side, side))
    return {
        "x_TI": kept.float(),
        "scale_x_Ti": scale_x,
        "w_OI": weight.float(),
        "scale_w_oi": scale_w,
        "g_TO": draw.normal(tokens, outer),
        "side": side,
    }


@cache
def held() -> list[float]:
    return numbers(3, -6, 448.0)


def rounded(line: list[float], side: int) -> list[float]:
    """A line of numbers, tile by tile, each number the nearest of E4M3 by search."""
    out = []
    for start in range(0, len(line), side):
        tile = line[start : start + side]
        scale = max(map(abs, tile)) / 448 or 1.0
        out += [nearest(number / scale, held()) * scale for number in tile]
    return out


def backward_by_entry(
    x_TI: Tensor, scale_x_Ti: Tensor, w_OI: Tensor, scale_w_oi: Tensor, g_TO: Tensor, side: int
) -> tuple[Tensor, Tensor]:
    """One number of a gradient after the other, each from one line of tiles of either operand."""
    scale, block, g = scale_x_Ti.tolist(), scale_w_oi.tolist(), g_TO.tolist()
    x = [
        [code * scale[t][i // side] for i, code in enumerate(row)]
        for t, row in enumerate(x_TI.tolist())
    ]
    w = [
        [code * block[o // side][i // side] for i, code in enumerate(row)]
        for o, row in enumerate(w_OI.tolist())
    ]

    def sums(lines: list[list[float]], others: list[list[float]]) -> Tensor:
        pairs = [[zip(one, other, strict=True) for other in others] for one in lines]
        return torch.tensor([[sum(a * b for a, b in each) for each in row] for row in pairs])

    def columns(rows: list[list[float]]) -> list[list[float]]:
        return [list(column) for column in zip(*rows, strict=True)]

    tiles_g, tiles_x = ([rounded(line, side) for line in columns(each)] for each in (g, x))
    return sums([rounded(row, side) for row in g], columns(w)), sums(tiles_g, tiles_x)


def back(
    x_tiles: Callable[[Tensor, int], Tensor] = lambda x, side: cast(x.T, side).T,
    g_for_x: Callable[[Tensor, int], Tensor] = cast,
    g_for_w: Callable[[Tensor, int], Tensor] = lambda g, side: cast(g.T, side).T,
    scales: Callable[[Tensor, bool], Tensor] = lambda scale, of_input: scale,
    join: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda dx, dw: (dx, dw),
) -> Function:
    """The answer of somebody who casts so for the products; g, x and results with tokens first."""

    def answer(
        x_TI: Tensor, scale_x_Ti: Tensor, w_OI: Tensor, scale_w_oi: Tensor, g_TO: Tensor, side: int
    ) -> tuple[Tensor, Tensor]:
        x_TI = dequantize(x_TI, scales(scale_x_Ti, True), (1, side))
        w_OI = dequantize(w_OI, scales(scale_w_oi, False), (side, side))
        dw_OI = g_for_w(g_TO, side).T @ x_tiles(x_TI, side)
        return join(g_for_x(g_TO, side) @ w_OI, dw_OI)

    return answer


def whole(x: Tensor, side: int) -> Tensor:
    return cast(x.reshape(1, -1), x.numel()).view_as(x)


def whole_tiles(x: Tensor, side: int) -> Tensor:
    """Cast along tokens, and without the tokens after the last whole tile."""
    inside = torch.arange(len(x)) < len(x) // side * side
    return cast(x.T, side).T * inside[:, None]


def backward_picture(answer: Function) -> Drawing:
    eye, blocks = torch.eye(12), torch.ones(3, 3) / 448
    g_TO = 2.0 ** (Draw(0).normal(12, 12).tanh() + 24 * (torch.arange(12) == 5)[:, None])
    dx, dw = answer(448 * eye, torch.ones(12, 3) / 448, 448 * eye, blocks, g_TO, 4)
    panels = {
        "gradient of x (x and W: identity)": dx.clamp(min=2.0**-4).log2(),
        "gradient of W, transposed": dw.T.clamp(min=2.0**-4).log2(),
    }
    return Drawing(
        "maps",
        {"panels": panels, "rows": "token", "columns": "output", "unit": "power of two (-4: zero)"},
    )


BACKWARD = Exercise(
    identifier="09.1", title="The backward pass, from what was kept",
    difficulty=3, importance=5, minutes=20, lines=6,
    case=backward_case, oracle=backward_by_entry, picture=backward_picture,
    alt="gradients of 12 tokens, those of token 5 2^24 times larger, in tiles of 4. Left, the "
    "gradient of x: each token has tiles of its own, so all rows keep their numbers. Right, the "
    "gradient of W: tiles lie along tokens, and rows 4, 6 and 7, in one tile with 5, are zero.",
    wrong=(
        Wrong(back(x_tiles=lambda x, side: x),
              "x keeps its tiles along I for the gradient of the weight; over what does that sum "
              "run?"),
        Wrong(back(g_for_w=cast),
              "the gradient of the weight gets g in tiles along O; over what does that sum run?"),
        Wrong(back(g_for_x=lambda g, side: cast(g.T, side).T),
              "the gradient of x gets g in tiles along tokens; over what does that sum run?"),
        Wrong(back(x_tiles=lambda x, side: x, g_for_w=cast),
              "both operands of the gradient of the weight keep the tiles of the other products; "
              "along which axis can their scales be applied to a partial sum?"),
        Wrong(back(g_for_x=lambda g, side: g, g_for_w=lambda g, side: g),
              "g is not cast: only one operand of each product is FP8"),
        Wrong(back(g_for_x=whole, g_for_w=whole),
              "one scale for the whole of g; each tile has its own", 24),
        Wrong(back(scales=lambda s, _: s.mean().expand_as(s)),
              "the mean of the stored scales serves all; each tile and block has its own", 24),
        Wrong(back(x_tiles=whole_tiles, g_for_w=whole_tiles),
              "the tokens after the last whole tile are left out of the gradient of the "
              "weight", 24),
        Wrong(back(scales=lambda s, _: torch.ones_like(s)),
              "codes are multiplied without their scales"),
        Wrong(back(scales=lambda s, of_input: s if of_input else 1 / s),
              "the weight's codes are divided by their scales; a number is code x scale"),
        Wrong(back(join=lambda dx, dw: (dx, dw.T)),
              "the gradient of the weight is transposed; it has the weight's shape"),
        Wrong(back(join=lambda dx, dw: (dw, dx)),
              "the two gradients are in the wrong order"),
    ),
)  # fmt: skip

# --------------------------------------------------------------- 09.3 an update lost or kept, 3.3.2


def e4m3(x: Tensor) -> Tensor:
    """As in the stub's cell."""
    return x.clamp(-448, 448).to(E4M3).float()


def train_case(draw: Draw) -> dict[str, Any]:
    tokens, width = draw.choice([6, 8, 10]), draw.randint(3, 5)
    # Multiples of powers of two: fp32 makes no error, whatever the order of the sums.
    x_TI = draw.normal(tokens, width).mul(1.5).round().clamp(-2, 2)
    return {
        "w_I": draw.normal(width).mul(512).round() / 256,
        "x_TI": x_TI,
        "y_T": (x_TI @ (2 * draw.normal(width))).mul(16).round() / 16,
        "rate": 2.0**-7,
        "steps": draw.randint(12, 16),
    }


def with_and_without(
    function: Function, w_I: Tensor, x_TI: Tensor, y_T: Tensor, rate: float, steps: int
) -> dict[str, Any]:
    """Training with fp32 weights, and without."""
    names = {"with fp32 weights": True, "without": False}
    return {n: function(w_I, x_TI, y_T, rate, steps, master) for n, master in names.items()}


def train_by_entry(
    w_I: Tensor, x_TI: Tensor, y_T: Tensor, rate: float, steps: int, master: bool
) -> Tensor:
    """Number by number; of E4M3's 127 sizes the nearest, by search."""
    w, used = w_I.tolist(), []
    rows = list(zip(x_TI.tolist(), y_T.tolist(), strict=True))
    for _ in range(steps):
        seen = [nearest(each, held()) for each in w]
        for i in range(len(w)):
            slope = 0.0
            for x, y in rows:
                slope += x[i] * (sum(a * b for a, b in zip(x, seen, strict=True)) - y)
            w[i] -= rate * slope
        used.append(seen)
        if not master:
            w = [nearest(each, held()) for each in w]
    return torch.tensor(used)


def training(
    see: Callable[[Tensor], Tensor] = e4m3,
    store: Callable[[Tensor, Tensor, bool], Tensor] = lambda w, u, master: (
        w - u if master else e4m3(w - u)
    ),
    slope_at: Callable[[Tensor, Tensor], Tensor] = lambda w, seen: seen,
    shrink: Callable[[Tensor], float] = lambda x: 1.0,
    late: bool = False,
) -> Function:
    """The answer of somebody who sees weights so, and stores them so after an update u."""

    def answer(
        w_I: Tensor, x_TI: Tensor, y_T: Tensor, rate: float, steps: int, master: bool
    ) -> Tensor:
        used = []
        for _ in range(steps + late):
            used.append(see(w_I))
            slope_I = x_TI.T @ (x_TI @ slope_at(w_I, used[-1]) - y_T)
            w_I = store(w_I, rate * shrink(x_TI) * slope_I, master)
        return torch.stack(used[late:])

    return answer


def train_picture(answer: Function) -> Drawing:
    draw, steps = Draw(0), 40
    x_TI, w_I, best_I = draw.normal(8, 16).sign(), draw.normal(16), draw.normal(16)
    x_TI = torch.cat((x_TI, -x_TI.roll(1, 0))).repeat(2, 1)
    y_T = x_TI @ best_I
    curves = {}
    for name, master in {"with fp32 weights": True, "without": False}.items():
        used_SI = answer(w_I, x_TI, y_T, 2.0**-8, steps, master)
        curves[name] = (used_SI @ x_TI.T - y_T).square().mean(dim=1).tolist()
    return Drawing("lines", {
        "x": list(range(1, steps + 1)), "curves": curves, "xlabel": "step",
        "ylabel": "mean squared error",
        "title": "A linear layer whose products see E4M3 weights", "logy": True, "marks": False,
    })  # fmt: skip


TRAIN = Exercise(
    identifier="09.3", title="An update, lost or kept",
    difficulty=3, importance=4, minutes=15, lines=8, tolerance=1e-6,
    case=train_case, oracle=train_by_entry, picture=train_picture, run=with_and_without,
    alt="the squared error over 40 steps, on a logarithmic scale. For ten steps both lines fall "
    "alike. Without fp32 weights the error then stops falling, near 0.4: hardly an update is "
    "larger than half a step of E4M3 any more. With them it is below 0.1 at the end.",
    wrong=(
        Wrong(training(store=lambda w, u, master: e4m3(w - u)),
              "an update reaches rounded weights only, and a small one vanishes there: where are "
              "the fp32 weights that should collect it?"),
        Wrong(training(store=lambda w, u, master: w - u),
              "fp32 weights are kept in both cases; without them, what is stored after a step is "
              "rounded"),
        Wrong(training(see=lambda w: w),
              "the products see fp32 weights; they are cast each time they are used"),
        Wrong(training(slope_at=lambda w, seen: w),
              "the gradient is taken at the fp32 weights; the products saw others"),
        Wrong(training(store=lambda w, u, master: w - e4m3(u) if master else e4m3(w - e4m3(u))),
              "the update is rounded to E4M3, before it is added"),
        Wrong(training(late=True),
              "the weights after each step; asked for are those that each step saw"),
        Wrong(training(store=lambda w, u, master: w + u if master else e4m3(w + u)),
              "the step goes uphill: against the gradient is down"),
        Wrong(training(shrink=lambda x: 1 / len(x)),
              "the gradient is a mean over tokens; of a sum it is a sum"),
        Wrong(training(see=lambda w: w.round(),
                       store=lambda w, u, master: w - u if master else (w - u).round()),
              "rounding to whole numbers; E4M3 has steps of 1/8 between 1 and 2", 23),
        Wrong(training(see=lambda w: w.half().float(),
                       store=lambda w, u, master: w - u if master else (w - u).half().float()),
              "rounding to FP16; E4M3 has seven mantissa bits fewer", 23),
    ),
)  # fmt: skip

EXERCISES = (BACKWARD, TRAIN)
