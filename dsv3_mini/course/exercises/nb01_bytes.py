"""Exercises of notebook 01, counting: what a token leaves behind, and what a step has to read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dsv3_mini.course.checking import Draw, Drawing, Exercise, Function, Wrong

# ------------------------------------------------- 01.1 what a token leaves behind, V2's table 1


def token_case(draw: Draw) -> dict[str, Any]:
    key_heads = draw.randint(2, 5)
    counts = {"heads": key_heads * draw.randint(2, 5), "key_heads": key_heads}
    widths = {"width": draw.randint(8, 16), "latent": draw.randint(20, 40)}
    return counts | widths | {"rope": draw.randint(4, 8), "layers": draw.randint(2, 9)}


def tensor_by_tensor(
    heads: int, key_heads: int, width: int, latent: int, rope: int, layers: int
) -> dict[str, int]:
    """Lay out every vector that is stored, and let torch count its bytes."""
    pair = [width, width]
    stored = {"MHA": heads * pair, "GQA": key_heads * pair, "MQA": pair, "MLA": [latent, rope]}
    total = dict.fromkeys(stored, 0)
    for kind, vectors in stored.items():
        for _ in range(layers):
            for size in vectors:
                total[kind] += torch.empty(size, dtype=torch.bfloat16, device="meta").nbytes
    return total


def storing(**other: Callable[[int, int, int, int, int], int]) -> Function:
    """The answer of somebody who stores other numbers for a token and layer, in these kinds."""

    def answer(*sizes: int) -> dict[str, int]:
        mine = {kind: 2 * sizes[5] * numbers(*sizes[:5]) for kind, numbers in other.items()}
        return tensor_by_tensor(*sizes) | mine

    return answer


def token_picture(answer: Function) -> Drawing:
    return Drawing("bars", {
        "groups": answer(128, 8, 128, 512, 64, 61), "ylabel": "bytes a token",
        "title": "V3's sizes: 61 layers, 128 heads of 128 (GQA: 8 key heads)",
    })  # fmt: skip


TOKEN = Exercise(
    identifier="01.1", title="What a token leaves behind",
    difficulty=1, importance=5, minutes=10, lines=7,
    case=token_case, oracle=tensor_by_tensor, picture=token_picture,
    alt="four bars, the bytes that a token leaves behind at V3's sizes: MHA towers over the others "
    "with 3,997,696, GQA with 8 key heads has 249,856, MQA 31,232 and MLA 70,272.",
    wrong=(
        Wrong(storing(MLA=lambda h, g, d, c, r: h * (2 * d + r)),
              "MLA's row has every head's finished key and value; it makes those from something "
              "smaller, and stores only that", 1),
        Wrong(storing(MLA=lambda h, g, d, c, r: c),
              "MLA's latent is counted alone; position travels beside it", 9),
        Wrong(storing(MLA=lambda h, g, d, c, r: c + h * r),
              "MLA's rotary key is counted once a head; how many heads share it?", 2),
        Wrong(storing(MLA=lambda h, g, d, c, r: 2 * (c + r)),
              "MLA's latent is counted for keys and again for values; both are made from one"),
        Wrong(storing(MHA=lambda h, g, d, c, r: h * d, GQA=lambda h, g, d, c, r: g * d,
                      MQA=lambda h, g, d, c, r: d),
              "keys without values; attention looks up both"),
        Wrong(storing(MHA=lambda h, g, d, c, r: 3 * h * d, GQA=lambda h, g, d, c, r: (h + 2*g) * d,
                      MQA=lambda h, g, d, c, r: (h + 2) * d),
              "queries are stored too; who asks for the query of an earlier token?"),
        Wrong(storing(GQA=lambda h, g, d, c, r: 2 * h // g * d),
              "key_heads is taken for the heads in a group; it is the number of groups"),
        Wrong(lambda *sizes: {kind: n // 2 for kind, n in tensor_by_tensor(*sizes).items()},
              "numbers are counted, not bytes; how many bytes has a BF16 number?"),
        Wrong(lambda h, g, d, c, r, layers: tensor_by_tensor(h, g, d, c, r, 1),
              "the bytes of one layer; every layer has its own cache"),
    ),
)  # fmt: skip

# ------------------------------------------------------- 01.4 the shortest time of a decode step


def step_case(draw: Draw) -> dict[str, Any]:
    bandwidth = 10**9 * draw.randint(1, 50)
    return {
        "batch": draw.randint(2, 16), "context": draw.randint(500, 5000),
        "weights": 10**5 * draw.randint(5, 50), "cached": draw.randint(100, 999),
        "uses": draw.randint(2, 16), "size": draw.choice([2, 4]),
        "bandwidth": bandwidth, "speed": bandwidth * draw.randint(2, 12),
    }  # fmt: skip


def step_in_turn(
    batch: int, context: int, weights: int, cached: int, uses: int, size: int,
    bandwidth: int, speed: int,
) -> float:  # fmt: skip
    """Sequence by sequence and token by token, with a clock for reading and one for computing."""
    reading, computing = weights * size / bandwidth, 0.0
    for _ in range(batch):
        computing += (weights + weights) / speed
        for _ in range(context):
            reading += cached * size / bandwidth
            computing += (cached + cached) * uses / speed
    return reading if reading > computing else computing


def timing(
    numbers: Callable[[int, int, int, int], float] = lambda b, w, c, u: w + b * c,
    operations: Callable[[int, int, int, int], float] = lambda b, w, c, u: 2 * b * (w + u * c),
    both: Callable[[float, float], float] = max,
) -> Function:
    """The answer of somebody who counts these numbers and operations: batch, weights, cache, uses.

    ``cache`` is the number of stored numbers of one sequence.
    """

    def answer(
        batch: int, context: int, weights: int, cached: int, uses: int, size: int,
        bandwidth: int, speed: int,
    ) -> float:  # fmt: skip
        counts = batch, weights, context * cached, uses
        return both(numbers(*counts) * size / bandwidth, operations(*counts) / speed)

    return answer


def step_picture(answer: Function) -> Drawing:
    batches = [2**power for power in range(9)]
    machine = 2, 10**12, 10**14
    kinds = {"MHA": (2 * 32 * 128 * 32, 1), "MLA, absorbed": (576 * 32, 60)}
    curves = {
        name: [batch / answer(batch, 4096, 10**9, *kind, *machine) for batch in batches]
        for name, kind in kinds.items()
    }
    return Drawing("lines", {
        "x": batches, "curves": curves, "xlabel": "sequences at once",
        "ylabel": "tokens per second, at most", "logx": True, "logy": True,
    })  # fmt: skip


STEP = Exercise(
    identifier="01.4", title="The shortest time of a decode step",
    difficulty=3, importance=4, minutes=15, lines=4,
    case=step_case, oracle=step_in_turn, picture=step_picture,
    alt="tokens per second against sequences at once, a billion weights, 4,096 tokens of context, "
    "32 layers. MHA soon stops gaining below 500, since each sequence brings its own cache to "
    "read. Absorbed MLA goes on, to more than ten times as many.",
    wrong=(
        Wrong(timing(both=lambda reading, computing: reading + computing),
              "reading and computing one after the other; they overlap, so the slower one decides"),
        Wrong(timing(both=min),
              "the faster of the two decides; a step ends when both are done"),
        Wrong(timing(lambda b, w, c, u: b * (w + c)),
              "the weights are read for every sequence; one reading serves the whole batch"),
        Wrong(timing(lambda b, w, c, u: w + c),
              "one cache is read for the whole batch; each sequence has its own text"),
        Wrong(timing(lambda b, w, c, u: w),
              "the cache is not read; every earlier token is looked at in every step"),
        Wrong(timing(lambda b, w, c, u: w + b * u * c),
              "a cached number is read once for each use; read once, it can be used by many heads"),
        Wrong(timing(operations=lambda b, w, c, u: b * (w + u * c)),
              "a multiply-add is counted as one operation; it is two"),
        Wrong(timing(operations=lambda b, w, c, u: 2 * (w + b * u * c)),
              "a weight is used once for the whole batch; it is read once, and used by each token"),
        Wrong(timing(operations=lambda b, w, c, u: 2 * b * (w + c)),
              "a cached number is used once; how often is among the arguments"),
        Wrong(lambda b, n, w, c, u, size, *machine: step_in_turn(b, n, w, c, u, 1, *machine),
              "numbers are read, not bytes; the memory's speed is in bytes per second"),
    ),
)  # fmt: skip

EXERCISES = (TOKEN, STEP)
