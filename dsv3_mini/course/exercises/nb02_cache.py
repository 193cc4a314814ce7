"""Exercises of notebook 02, the first half: how much MLA stores, and what a token leaves behind.

Legend: T tokens, D hidden, C latent, R rotary width, K = C + R, P = R / 2 pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv3_mini.course.checking import Draw, Drawing, Exercise, Function, Wrong

# -------------------------------------------------------------------- 02.1 how long a context fits


def cache_case(draw: Draw) -> dict[str, Any]:
    counts = {name: draw.randint(2, 9) for name in ("sequences", "layers", "heads")}
    widths = {"nope": (9, 16), "rope": (5, 8), "value": (17, 32), "latent": (33, 64)}
    drawn = {name: draw.randint(*ends) for name, ends in widths.items()}
    return {"memory": draw.randint(10**8, 10**9), **counts, **drawn}


def longest_by_trying(
    memory: int, sequences: int, layers: int, heads: int, nope: int, rope: int, value: int,
    latent: int,
) -> int:  # fmt: skip
    """Tensors that take no memory, longer and shorter, until one token more does not fit."""
    fits, too_many = 0, memory
    while too_many - fits > 1:
        tokens = (fits + too_many) // 2
        shape = (layers, sequences, tokens, latent + rope)
        if torch.empty(shape, dtype=torch.bfloat16, device="meta").nbytes <= memory:
            fits = tokens
        else:
            too_many = tokens
    return fits


def storing(numbers: Callable[[int, int, int, int, int], int]) -> Function:
    """The answer of somebody who stores so many numbers for a token and layer."""

    def answer(memory: int, sequences: int, layers: int, *sizes: int) -> int:
        return memory // (2 * sequences * layers * numbers(*sizes))

    return answer


def cache_picture(answer: Function) -> Drawing:
    batches = [2**power for power in range(9)]
    curves = {
        f"{gib} GiB": [answer(gib * 2**30, batch, 61, 128, 128, 64, 128, 512) for batch in batches]
        for gib in (16, 64)
    }
    return Drawing("lines", {
        "x": batches, "curves": curves, "xlabel": "sequences at once",
        "ylabel": "longest context (tokens)", "logx": True, "logy": True,
    })  # fmt: skip


LONGEST_CONTEXT = Exercise(
    identifier="02.1", title="How long a context fits?",
    difficulty=1, importance=4, minutes=10, lines=3,
    case=cache_case, oracle=longest_by_trying, picture=cache_picture,
    alt="two falling straight lines on log scales. With V3's sizes, twice the sequences leave half "
    "the context to each, and 64 GiB hold four times as much as 16 GiB.",
    wrong=(
        Wrong(storing(lambda h, n, r, v, c: c),
              "the rotary key is not counted; each token stores it beside the latent", 9),
        Wrong(storing(lambda h, n, r, v, c: h * (n + r + v)),
              "the keys and values of all heads are stored; MLA makes them from the latent", 1),
        Wrong(storing(lambda h, n, r, v, c: c + h * r),
              "a rotary key for each head is stored; all heads share one", 2),
        Wrong(storing(lambda h, n, r, v, c: h * (n + v)),
              "plain multi-head attention's cache, a key and a value for each head"),
        Wrong(storing(lambda h, n, r, v, c: 2 * c + r),
              "one latent for keys and one for values; 'joint' means that they share one"),
        Wrong(lambda memory, n, layers, *sizes: longest_by_trying(2 * memory, n, layers, *sizes),
              "numbers are counted, not bytes; a BF16 number has two"),
        Wrong(lambda memory, n, layers, *sizes: longest_by_trying(memory, 1, layers, *sizes),
              "one sequence gets all the memory; each has its own share of it"),
        Wrong(lambda memory, n, layers, *sizes: longest_by_trying(memory, n, 1, *sizes),
              "the cache of one layer; each layer has its own"),
    ),
)  # fmt: skip

# ------------------------------------------------------------------ 02.2 what a token leaves behind


def remember_case(draw: Draw) -> dict[str, Any]:
    tokens, hidden, latent = draw.randint(2, 6), draw.randint(10, 20), draw.randint(8, 12)
    pairs = draw.randint(2, 4)
    positions = draw.randint(0, 50) + torch.arange(tokens, dtype=torch.float32)
    return {
        "h_TD": draw.normal(tokens, hidden),
        "w_KD": draw.normal(latent + 2 * pairs, hidden) / hidden**0.5,
        "g_C": draw.normal(latent).abs() + 0.5,
        "angle_TP": positions[:, None] * 100.0 ** -(torch.arange(pairs) / pairs),
    }


def remember_one_by_one(h_TD: Tensor, w_KD: Tensor, g_C: Tensor, angle_TP: Tensor) -> Tensor:
    """Token by token; a pair of the key is a complex number, and a product turns it."""
    h, w, g, angle = (each.double().numpy() for each in (h_TD, w_KD, g_C, angle_TP))
    rows = []
    for token, angles in zip(h, angle, strict=True):
        row = [sum(a * b for a, b in zip(line, token, strict=True)) for line in w]
        latent, key = row[: len(g)], row[len(g) :]
        length = np.sqrt(sum(a * a for a in latent) / len(latent) + 1e-6)
        kept = [a / length * weight for a, weight in zip(latent, g, strict=True)]
        for pair, a in enumerate(angles):
            z = complex(key[2 * pair], key[2 * pair + 1]) * np.exp(1j * a)
            kept += [z.real, z.imag]
        rows.append(kept)
    return torch.tensor(np.array(rows), dtype=torch.float32)


def turn(x_TR: Tensor, angle_TP: Tensor) -> Tensor:
    z_TP = torch.view_as_complex(x_TR.unflatten(-1, (-1, 2)).contiguous())
    turned_TP = z_TP * torch.polar(torch.ones_like(angle_TP), angle_TP)
    return torch.view_as_real(turned_TP).flatten(-2)


def turn_halves(x_TR: Tensor, angle_TP: Tensor) -> Tensor:
    pairs_TR = x_TR.unflatten(-1, (2, -1)).mT.flatten(-2)
    return turn(pairs_TR, angle_TP).unflatten(-1, (-1, 2)).mT.flatten(-2)


def turn_sorted(x_TR: Tensor, angle_TP: Tensor) -> Tensor:
    return turn(x_TR, angle_TP).unflatten(-1, (-1, 2)).mT.flatten(-2)


def turn_start(x_TC: Tensor, angle_TP: Tensor) -> Tensor:
    turned, rest = x_TC.tensor_split([2 * angle_TP.shape[1]], dim=1)
    return torch.cat((turn(turned, angle_TP), rest), dim=1)


def norm(x: Tensor, over: Tensor | None = None) -> Tensor:
    over = x if over is None else over
    return x / (over.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()


def keeping(make: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Function:
    """The answer of somebody who makes latent and rotary key of c, k, g and the angles so."""

    def answer(h_TD: Tensor, w_KD: Tensor, g_C: Tensor, angle_TP: Tensor) -> Tensor:
        c_TC, k_TR = (h_TD @ w_KD.T).tensor_split([len(g_C)], dim=1)
        return torch.cat(make(c_TC, k_TR, g_C, angle_TP), dim=1)

    return answer


def remember_picture(answer: Function) -> Drawing:
    draw, position_T1 = Draw(0), torch.arange(24.0)[:, None]
    h_TD, w_KD = draw.normal(1, 32).expand(24, -1), draw.normal(24, 32) / 32**0.5
    rows = answer(h_TD, w_KD, torch.ones(16), position_T1 * torch.tensor([1, 0.5, 0.2, 0.1]))
    return Drawing("maps", {
        "panels": {"latent: columns 0 to 15; rotary key: 16 to 23": rows},
        "rows": "position of the token", "columns": "number", "unit": "value",
    })  # fmt: skip


REMEMBER = Exercise(
    identifier="02.2", title="What a token leaves behind",
    difficulty=3, importance=5, minutes=20, lines=7,
    case=remember_case, oracle=remember_one_by_one, picture=remember_picture,
    alt="one row a position, for the same token at 24 positions. The latent's 16 columns are the "
    "same from top to bottom; the rotary key's eight go up and down, the left ones fastest.",
    wrong=(
        Wrong(keeping(lambda c, k, g, a: (c, turn(k, a))),
              "the norm on the latent is missing", 4),
        Wrong(keeping(lambda c, k, g, a: (norm(c), turn(k, a))),
              "the norm's weight g is missing", 4),
        Wrong(keeping(lambda c, k, g, a: (norm(c) * g, norm(turn(k, a)))),
              "the rotary key is normalised too; it goes past the norm", 4),
        Wrong(keeping(lambda c, k, g, a: (norm(c, over=torch.cat((c, k), 1)) * g, turn(k, a))),
              "the norm's mean runs over the whole row; it belongs to the latent alone", 4),
        Wrong(keeping(lambda c, k, g, a: (norm(c) * g, k)),
              "the rotary key is not turned, so nothing stored knows its position", 2),
        Wrong(keeping(lambda c, k, g, a: (norm(c) * g, turn((norm(c) * g)[:, : k.shape[1]], a))),
              "the rotary key is made from the latent; it comes from the hidden state", 2),
        Wrong(keeping(lambda c, k, g, a: (turn_start(norm(c) * g, a), turn(k, a))),
              "the latent is turned too; position belongs to the rotary key alone", 3),
        Wrong(keeping(lambda c, k, g, a: (norm(c) * g, turn_halves(k, a))),
              "number i is paired with i + R/2; the checkpoint's pairs are neighbours", 7),
        Wrong(keeping(lambda c, k, g, a: (norm(c) * g, turn_sorted(k, a))),
              "all a come first and then all b; each pair stays at its two places", 7),
        Wrong(keeping(lambda c, k, g, a: (norm(c) * g, turn(k, -a))),
              "the pairs are turned backwards: (a cos - b sin, a sin + b cos) turns forwards"),
    ),
)  # fmt: skip

EXERCISES = (LONGEST_CONTEXT, REMEMBER)
