"""Exercises of notebook 08, the numbers: what a format can hold, and how a cast rounds.

Legend: N numbers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from itertools import count, product, takewhile
from math import log2
from typing import Any

import torch
from torch import Tensor

from dsv3_mini.course.checking import Draw, Drawing, Exercise, Function, Wrong

# -------------------------------------------------------------- 08.1 what a format can hold, 3.3.2


def limits_case(draw: Draw) -> dict[str, Any]:
    return {
        "exponent_bits": draw.randint(3, 5),
        "mantissa_bits": draw.randint(2, 5),
        "infinities": draw.random() < 0.5,
    }


def limits_by_listing(
    exponent_bits: int, mantissa_bits: int, infinities: bool
) -> tuple[float, float, float]:
    """Decode every code of positive sign, bit by bit, and look which are numbers."""
    normal, small = [], []
    for bits in product("01", repeat=exponent_bits + mantissa_bits):
        exponent, mantissa = "".join(bits[:exponent_bits]), "".join(bits[exponent_bits:])
        if "0" not in exponent and (infinities or "0" not in mantissa):
            continue
        power = int(exponent, 2) - int("0" + "1" * (exponent_bits - 1), 2)
        fraction = sum(0.5**place for place, bit in enumerate(mantissa, start=1) if bit == "1")
        if "1" in exponent:
            normal.append(2.0**power * (1 + fraction))
        elif fraction:
            small.append(2.0 ** (power + 1) * fraction)
    return min(small), min(normal), max(normal)


def limits(
    bias: Callable[[int], int] = lambda e: 2 ** (e - 1) - 1,
    smallest: Callable[[int, int], int] = lambda bias, m: 1 - bias - m,
    normal: Callable[[int], int] = lambda bias: 1 - bias,
    lost: Callable[[bool], int | None] = lambda infinities: None if infinities else 1,
) -> Function:
    """The answer of somebody who counts so; ``lost``: codes of the top exponent that are NaN."""

    def answer(e: int, m: int, infinities: bool) -> tuple[float, float, float]:
        b, codes = bias(e), lost(infinities)
        top, steps = (2**e - 2, 1) if codes is None else (2**e - 1, 1 + codes)
        return 2.0 ** smallest(b, m), 2.0 ** normal(b), 2.0 ** (top - b) * (2 - steps / 2**m)

    return answer


def limits_picture(answer: Function) -> Drawing:
    formats = {
        "E2M5": (2, 5, False), "E3M4": (3, 4, False), "E4M3": (4, 3, False), "E5M2": (5, 2, True),
        "FP16 (E5M10)": (5, 10, True),
    }  # fmt: skip
    ends = {name: answer(*sizes) for name, sizes in formats.items()}
    groups = {name: log2(most / least) for name, (least, _, most) in ends.items()}
    return Drawing("bars", {"groups": groups, "ylabel": "powers of two, smallest to largest"})


LIMITS = Exercise(
    identifier="08.1", title="What a format can hold",
    difficulty=2, importance=3, minutes=10, lines=5,
    case=limits_case, oracle=limits_by_listing, picture=limits_picture,
    alt="how many powers of two lie between the smallest and the largest number of four formats of "
    "eight bits and of FP16. A bit moved from mantissa to exponent adds more each time: 7.95 in "
    "E2M5, 10.9 in E3M4, 17.8 in E4M3, 31.8 in E5M2. FP16, with the exponent bits of E5M2, has 40: "
    "its longer mantissa lets it go further down.",
    wrong=(
        Wrong(limits(lost=lambda infinities: None),
              "the top exponent is taken from numbers in every format, so that E4M3 ends at 240. "
              "Which of its codes are no numbers where there are no infinities?", 23),
        Wrong(limits(lost=lambda infinities: None if infinities else 0),
              "the code of all ones counts as a number, so that E4M3 ends at 480; what is it?", 23),
        Wrong(limits(lost=lambda infinities: 1),
              "only one code is no number, even where there are infinities and many NaN"),
        Wrong(lambda e, m, infinities: (1.0, 1.0, 2.0 ** (e + m) - 1),
              "codes are counted as whole numbers, all equally far apart; these are floats", 23),
        Wrong(limits(bias=lambda e: 2 ** (e - 1)),
              "the bias is one too large: it is one less than half of the exponent's 2^e values"),
        Wrong(limits(smallest=lambda bias, m: 1 - bias),
              "subnormal numbers are forgotten; what does a code with E = 0 and M = 1 stand for?"),
        Wrong(limits(smallest=lambda bias, m: -bias - m),
              "the smallest number has the power -bias; with E = 0 it is that of E = 1"),
        Wrong(limits(normal=lambda bias: -bias),
              "E = 0 is counted as normal; the smallest normal number has E = 1"),
    ),
)  # fmt: skip

# -------------------------------------------------------------------- 08.2 the cast, by hand, 3.3.2


def cast_case(draw: Draw) -> dict[str, Any]:
    m, lowest, top = draw.randint(2, 4), draw.randint(-6, -3), draw.randint(3, 7)
    largest = 2.0**top * (2 - draw.randint(1, 2) / 2**m)
    wide_N = draw.normal(40).sign() * 2 ** (draw.normal(40) * 4 + (lowest + top) / 2)
    power = draw.randint(lowest, top - 1)
    halfway = [2.0 ** (power - m) * (2**m + place + 0.5) for place in range(2**m - 1)]
    halfway += [-(2.0 ** (lowest - m)) * (place + 0.5) for place in range(4)]
    tiny = [2.0 ** (lowest - m) * factor for factor in (0.3, -0.7, 1.2, -1.8, 2.6)]
    beyond = [largest * factor for factor in (1.02, -1.3, 1.8, -3.0)]
    rest = torch.tensor([*halfway, *tiny, *beyond, 1e5, -1e6, 0.0])
    x_N = torch.cat((wide_N, rest))
    return {
        "x_N": x_N[draw.normal(len(x_N)).argsort()],
        "mantissa_bits": m,
        "lowest": lowest,
        "largest": largest,
    }


def numbers(mantissa_bits: int, lowest: int, largest: float) -> list[float]:
    """All that are not negative, in the order of their codes."""

    def decode(code: int) -> float:
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        leading = 2**mantissa_bits if exponent else 0
        return float(2.0 ** (lowest + max(exponent, 1) - 1 - mantissa_bits) * (leading + mantissa))

    return list(takewhile(lambda number: number <= largest, map(decode, count())))


def nearest(x: float, held: list[float]) -> float:
    """Of the numbers held, by search; of two as near the one whose code is even."""
    below = bisect_right(held, abs(x)) - 1
    around = [code for code in (below, below + 1) if code < len(held)]
    best = min(around, key=lambda code: (abs(held[code] - abs(x)), code % 2))
    return held[best] if x > 0 else -held[best]


def cast_by_search(x_N: Tensor, mantissa_bits: int, lowest: int, largest: float) -> Tensor:
    """All numbers of the format in a list, and the nearest of them for each x."""
    held = numbers(mantissa_bits, lowest, largest)
    return torch.tensor([nearest(x, held) for x in x_N.tolist()])


def casting(
    power: Callable[[Tensor, int], Tensor] = lambda size, lowest: (
        size.log2().floor().clamp(min=lowest)
    ),
    to_whole: Callable[[Tensor], Tensor] = torch.round,
    end: Callable[[Tensor, float], Tensor] = lambda y, largest: y.clamp(-largest, largest),
    fewer: int = 0,
) -> Function:
    """The answer of somebody who takes these powers of two, rounds so, and ends so."""

    def answer(x_N: Tensor, mantissa_bits: int, lowest: int, largest: float) -> Tensor:
        step_N = 2.0 ** (power(x_N.abs(), lowest) - mantissa_bits + fewer)
        return end(to_whole(x_N / step_N) * step_N, largest)

    return answer


def without_small(x_N: Tensor, mantissa_bits: int, lowest: int, largest: float) -> Tensor:
    return casting()(x_N, mantissa_bits, lowest, largest) * (x_N.abs() >= 2.0**lowest)


def of_positive(x_N: Tensor, mantissa_bits: int, lowest: int, largest: float) -> Tensor:
    return casting(lambda _, lowest: x_N.log2().floor().clamp(min=lowest))(
        x_N, mantissa_bits, lowest, largest
    )


def cast_picture(answer: Function) -> Drawing:
    x = torch.linspace(0, 9, 721)
    curves = {
        "x itself": x.tolist(),
        "cast": answer(x, 2, 0, 7.0).tolist(),
    }
    return Drawing("lines", {
        "x": x.tolist(), "curves": curves, "xlabel": "x", "ylabel": "value", "marks": False,
        "title": "2 mantissa bits, normal from 1, largest 7",
    })  # fmt: skip


CAST = Exercise(
    identifier="08.2", title="A cast by hand",
    difficulty=3, importance=5, minutes=20, lines=4, tolerance=1e-7,
    case=cast_case, oracle=cast_by_search, picture=cast_picture,
    alt="a staircase along the diagonal, for a format with 2 mantissa bits. Its steps are a "
    "quarter high below 2, a half from 2 to 4, and 1 from 4 on. At 7 it ends: beyond, it is flat.",
    wrong=(
        Wrong(lambda x, m, lowest, largest: x.round().clamp(-largest, largest),
              "rounding to whole numbers; a float's steps grow with the number", 23),
        Wrong(lambda x, m, lowest, largest: x.half().float(),
              "rounding to FP16; it has ten mantissa bits, and how many has this format?", 23),
        Wrong(casting(end=lambda y, largest: y),
              "no saturation: some results are larger than the largest number of the format", 23),
        Wrong(casting(end=lambda y, largest: y.where(y.abs() <= largest, torch.nan)),
              "NaN from overflow; which number of the format is the nearest to one beyond it?", 23),
        Wrong(casting(lambda size, lowest: torch.full_like(size, lowest)),
              "one step for all numbers, that of the smallest; each power of two has its own", 23),
        Wrong(casting(to_whole=torch.trunc),
              "bits are cut off, which rounds towards zero; the nearest number is meant"),
        Wrong(casting(to_whole=lambda y: y.sign() * (y.abs() + 0.5).floor()),
              "of two numbers as near, always the larger; look at what is asked halfway"),
        Wrong(casting(lambda size, lowest: size.log2().floor().clamp(min=-60)),
              "steps go on shrinking below the smallest normal number; subnormals share a step"),
        Wrong(without_small,
              "what is below the smallest normal number becomes zero; there are subnormals"),
        Wrong(casting(lambda size, lowest: size.log2().round().clamp(min=lowest)),
              "the power of two is rounded to the nearest; which one lies at or below 1.9?"),
        Wrong(casting(fewer=1),
              "steps are twice too wide: the leading one is not a bit of the mantissa"),
        Wrong(of_positive,
              "the logarithm of a negative number is NaN; the sign has a bit of its own"),
    ),
)  # fmt: skip

EXERCISES = (LIMITS, CAST)
