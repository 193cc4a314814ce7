"""Exercises of notebook 08, the blocks: a scale for each, and a sum that is promoted.

Legend: R rows, C columns, r and c blocks of them; M and N rows of two operands, K products of a
sum, G groups of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_mini.course.checking import Draw, Drawing, Exercise, Function, Wrong
from dsv3_mini.fp8_numbers import cut

# ------------------------------------------------------------- 08.3 a scale for every block, 3.3.2


def scale_case(draw: Draw) -> dict[str, Any]:
    side = draw.randint(4, 6)
    rows = draw.randint(2, 3) * side + draw.randint(1, side - 2)
    columns = draw.randint(4, 5) * side + draw.randint(1, side - 2)
    w_RC = draw.normal(rows, columns) * 2 ** (2 * draw.normal(rows, columns))
    corner = side * draw.randint(0, 1), side * draw.randint(0, 3)
    w_RC[corner[0] : corner[0] + side, corner[1] : corner[1] + side] = 0.0
    return {"w_RC": w_RC, "side": side}


def scale_block_by_block(w_RC: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """One block after the other, and in it one number after the other."""
    w, scaled, scales = w_RC.tolist(), torch.zeros_like(w_RC), []
    for top in range(0, len(w), side):
        scales.append([0.0] * len(range(0, len(w[0]), side)))
        for left in range(0, len(w[0]), side):
            block = {
                (i, j): w[i][j]
                for i in range(top, min(top + side, len(w)))
                for j in range(left, min(left + side, len(w[0])))
            }
            largest = max(max(block.values()), -min(block.values()))
            scales[-1][left // side] = largest / 448 or 1.0
            for place, number in block.items():
                scaled[place] = number / scales[-1][left // side]
    return torch.tensor(scales), scaled


def scaling(
    scale: Callable[[Tensor], Tensor] = lambda w_rscs: w_rscs.abs().amax((1, 3)) / 448,
    shared: Callable[[Tensor], Tensor] = lambda scale_rc: scale_rc,
    spread: Callable[[Tensor, int], Tensor] = lambda scale_rc, side: scale_rc.repeat_interleave(
        side, 0
    ).repeat_interleave(side, 1),
    join: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda scale_rc, scaled_RC: (
        scale_rc,
        scaled_RC,
    ),
    empty: float = 1.0,
) -> Function:
    """The answer of somebody who takes such scales of blocks (r, side, c, side)."""

    def answer(w_RC: Tensor, side: int) -> tuple[Tensor, Tensor]:
        rows, columns = w_RC.shape
        padded = F.pad(w_RC, (0, -columns % side, 0, -rows % side))
        scale_rc = scale(padded.unflatten(1, (-1, side)).unflatten(0, (-1, side)))
        scale_rc = shared(torch.where(scale_rc > 0, scale_rc, empty))
        return join(scale_rc, w_RC / spread(scale_rc, side)[:rows, :columns])

    return answer


def whole_blocks(w_RC: Tensor, side: int) -> tuple[Tensor, Tensor]:
    rows, columns = (size // side * side for size in w_RC.shape)
    return scaling()(w_RC[:rows, :columns], side)


def even_pieces(w_RC: Tensor, side: int) -> tuple[Tensor, Tensor]:
    count_r, count_c = (-(-size // side) for size in w_RC.shape)
    parts = [rows.tensor_split(count_c, dim=1) for rows in w_RC.tensor_split(count_r)]
    done = [[scaling()(part, 2 * side) for part in row] for row in parts]  # one block a part
    scale_rc = torch.cat([torch.cat([s for s, _ in row], dim=1) for row in done])
    return scale_rc, torch.cat([torch.cat([q for _, q in row], dim=1) for row in done])


def of_rows(w_RC: Tensor, side: int) -> tuple[Tensor, Tensor]:
    done = [scaling()(row, side) for row in w_RC.split(1)]
    return torch.cat([s for s, _ in done]), torch.cat([q for _, q in done])


def scale_picture(answer: Function) -> Drawing:
    power_RC = -(torch.arange(14.0)[:, None] + torch.arange(26.0)) / 4
    power_RC[9, 17] = 1.0
    scale_rc, _ = answer(2**power_RC, 4)
    spread_RC = scale_rc.repeat_interleave(4, 0).repeat_interleave(4, 1)[:14, :26]
    panels = {
        "size of the numbers": power_RC,
        "448 x scale of their block": (448 * spread_RC).log2(),
    }
    return Drawing(
        "maps", {"panels": panels, "rows": "row", "columns": "column", "unit": "power of two"}
    )


SCALE = Exercise(
    identifier="08.3", title="A scale for every block",
    difficulty=3, importance=5, minutes=20, lines=6,
    case=scale_case, oracle=scale_block_by_block, picture=scale_picture,
    alt="left, a matrix (14, 26) whose numbers shrink evenly from the upper left to the lower "
    "right corner, with one outlier in row 9 and column 17. Right, what the scales of its 4x4 "
    "blocks stand for: a coarse mosaic of the same slope, with one bright block around the "
    "outlier. At the right edge blocks are half as wide, at the lower edge half as high.",
    wrong=(
        Wrong(scaling(shared=lambda s: s.amax().expand_as(s).clone()),
              "one scale for the whole tensor: an outlier anywhere costs every block its small "
              "numbers", 24),
        Wrong(scaling(shared=lambda s: s.mean().expand_as(s).clone()),
              "the mean of the blocks' scales serves them all; some exceed 448, others go to "
              "zero", 24),
        Wrong(of_rows,
              "a tile of a single row shares a scale, as activations do it; weights have square "
              "blocks", 24),
        Wrong(whole_blocks,
              "the ragged edges are left out: numbers beyond the last whole block have no "
              "scale", 24),
        Wrong(even_pieces,
              "blocks are made equally large; all have this side, and only those at the far edges "
              "may be smaller", 24),
        Wrong(scaling(lambda w: w.abs().amax((1, 3)) / 127),
              "the largest number becomes 127, as for integers of eight bits", 23),
        Wrong(scaling(lambda w: w.abs().mean((1, 3)) / 448),
              "a block's mean is brought to 448, so all above the mean would be cut off"),
        Wrong(scaling(lambda w: w.amax((1, 3)) / 448),
              "the largest number with its sign; a larger negative one is beyond -448 then"),
        Wrong(scaling(join=lambda scale, scaled: (1 / scale, scaled)),
              "the scales are inverted: code x scale must give the number back"),
        Wrong(scaling(empty=0.0),
              "a block of zeros is divided by zero, and is NaN now"),
        Wrong(scaling(spread=lambda scale, side: scale.repeat(side, side)),
              "the scales are right and land on the wrong numbers: copies of a scale belong side "
              "by side"),
    ),
)  # fmt: skip

# ------------------------------------------------------------- 08.4 few bits, and promotion, 3.3.2

ALIGNED = 32


def sum_case(draw: Draw) -> dict[str, Any]:
    rows, columns, every = draw.randint(2, 4), draw.randint(5, 7), draw.choice([64, 96])
    inner = 2 * every + draw.randint(ALIGNED + 1, every - 1)
    # Whole numbers up to 8 are E4M3 numbers, and fp32 adds their products without an error.
    a_MK, b_NK = (
        torch.tensor([[float(draw.randint(-8, 8)) for _ in range(inner)] for _ in range(n)])
        for n in (rows, columns)
    )
    return {
        "a_MK": a_MK,
        "b_NK": b_NK,
        "scale_a_MG": draw.normal(rows, 3).abs() + 0.3,
        "scale_b_NG": draw.normal(columns, 3).abs() + 0.3,
        "every": every,
        "bits": draw.randint(5, 7),
    }


def sum_in_integers(
    a_MK: Tensor, b_NK: Tensor, scale_a_MG: Tensor, scale_b_NG: Tensor, every: int, bits: int
) -> Tensor:
    """Product by product in whole numbers, each a 2^18th; bits are dropped by shifting."""

    def one(a: list[int], b: list[int], scales: list[float]) -> float:
        total = held = pending = 0
        promoted = 0.0
        for place, (x, y) in enumerate(zip(a, b, strict=True), start=1):
            pending += x * y
            last = place % every == 0 or place == len(a)
            if (place - 1) % every % ALIGNED == ALIGNED - 1 or last:
                total = held + pending
                drop = max(0, abs(total).bit_length() - bits)
                held, pending = (abs(total) >> drop << drop) * (1 if total > 0 else -1), 0
            if last:
                promoted, held = promoted + held * scales[(place - 1) // every], 0
        return promoted

    rows = zip((512 * a_MK).int().tolist(), scale_a_MG.double() / 512, strict=True)
    columns = list(zip((512 * b_NK).int().tolist(), scale_b_NG.double() / 512, strict=True))
    return torch.tensor([[one(a, b, (s * r).tolist()) for b, r in columns] for a, s in rows])


def adding(
    narrow: Callable[[Tensor, Tensor, int], Tensor] | None = None,
    scales: Callable[[Tensor], Tensor] = lambda scale: scale,
    register: Callable[[Tensor, int], Tensor] = lambda total, bits: total,
    go_on: bool = False,
    part: int = ALIGNED,
    promoted_too_often: bool = False,
) -> Function:
    """The answer of somebody who adds so: each wrong way is a change of one of these."""
    step = narrow or (lambda held, few, bits: cut(held + few, bits))

    def answer(
        a_MK: Tensor, b_NK: Tensor, scale_a_MG: Tensor, scale_b_NG: Tensor, every: int, bits: int
    ) -> Tensor:
        total = held = torch.zeros(len(a_MK), len(b_NK))
        pairs = zip(a_MK.split(every, 1), b_NK.split(every, 1), strict=True)
        for group, (a, b) in enumerate(pairs):
            scale = scales(scale_a_MG)[:, group, None] * scales(scale_b_NG)[:, group]
            held = held if go_on else torch.zeros_like(total)
            for few_a, few_b in zip(a.split(part, 1), b.split(part, 1), strict=True):
                held = step(torch.zeros_like(held) if promoted_too_often else held,
                            few_a @ few_b.T, bits)  # fmt: skip
                total = total + held * scale if promoted_too_often else total
            total = total if promoted_too_often else register(total + held * scale, bits)
        return total

    return answer


def never_promoted(
    a_MK: Tensor, b_NK: Tensor, scale_a_MG: Tensor, scale_b_NG: Tensor, every: int, bits: int
) -> Tensor:
    inner = a_MK.shape[1]
    a_MK = a_MK * scale_a_MG.repeat_interleave(every, 1)[:, :inner]
    b_NK = b_NK * scale_b_NG.repeat_interleave(every, 1)[:, :inner]
    one_M1, one_N1 = torch.ones(len(a_MK), 1), torch.ones(len(b_NK), 1)
    return adding()(a_MK, b_NK, one_M1, one_N1, inner, bits)


def whole_groups(
    a_MK: Tensor, b_NK: Tensor, scale_a_MG: Tensor, scale_b_NG: Tensor, every: int, bits: int
) -> Tensor:
    inner = a_MK.shape[1] // every * every
    return adding()(a_MK[:, :inner], b_NK[:, :inner], scale_a_MG, scale_b_NG, every, bits)


def sum_picture(answer: Function) -> Drawing:
    draw, inner, bits = Draw(0), 2048, [8, 10, 12, 14, 16, 18]
    a_MK, b_NK = (draw.normal(6, inner).to(torch.float8_e4m3fn).float() for _ in range(2))
    exact = a_MK.double() @ b_NK.double().T
    curves = {}
    for name, every in {"never": inner, "every 512": 512, "every 128": 128}.items():
        ones = torch.ones(6, inner // every)
        wrong = [(answer(a_MK, b_NK, ones, ones, every, n) - exact).abs().max() for n in bits]
        curves[name] = [float(100 * each / exact.square().mean().sqrt()) for each in wrong]
    return Drawing("lines", {
        "x": bits, "curves": curves, "xlabel": "bits of the accumulator",
        "ylabel": "largest error, % of the result's rms", "logy": True,
        "title": f"K = {inner:,}, promoted",
    })  # fmt: skip


SUM = Exercise(
    identifier="08.4", title="Few bits, promoted and scaled",
    difficulty=3, importance=5, minutes=20, lines=7, tolerance=1e-5,
    case=sum_case, oracle=sum_in_integers, picture=sum_picture,
    alt="the error of a product with K = 2,048 against the bits of the accumulator, on a "
    "logarithmic scale. Each bit halves it, roughly, so the three lines fall side by side: never "
    "promoted lies highest, every 512 below it, every 128 lowest, worth about four bits.",
    wrong=(
        Wrong(adding(lambda held, few, bits: held + few),
              "everything is added in fp32: right as mathematics, but then there is no error for "
              "promotion to cure", 25),
        Wrong(never_promoted,
              "nothing is promoted: numbers are scaled first and one narrow accumulator runs to "
              "the end", 25),
        Wrong(adding(go_on=True),
              "the narrow accumulator is never emptied; after its promotion it starts anew", 25),
        Wrong(adding(part=10**6),
              "bits are cut once a group, at its promotion; the narrow accumulator loses them "
              "after each 32 products", 25),
        Wrong(adding(promoted_too_often=True),
              "each 32 products are promoted; the narrow accumulator should hold the sum of a "
              "whole group", 25),
        Wrong(adding(register=cut),
              "the promoted sum is cut as well; it lives in an fp32 register", 25),
        Wrong(adding(scales=lambda scale: scale[:, :1].expand_as(scale)),
              "the first group's scale is used for all; each group has its own", 24),
        Wrong(adding(scales=lambda scale: scale.mean(dim=1, keepdim=True).expand_as(scale)),
              "the mean of a row's scales is used for all groups; each has its own", 24),
        Wrong(whole_groups,
              "the last group is left out because it is shorter", 24),
        Wrong(adding(scales=lambda scale: 1 / scale),
              "divided by the scales; a number is code x scale"),
    ),
)  # fmt: skip

EXERCISES = (SCALE, SUM)
